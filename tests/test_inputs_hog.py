"""HOG targets: hand-made gradients, a plain loop beside them, and the invariances that the whitened form promises."""

import math

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.hog import hog, hog_tokens

ROWS, COLUMNS = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")


def image(seed=0, *shape):
    return torch.rand(shape or (2, 3, 8, 8), generator=generator(seed), dtype=torch.float64)


def loop(x, cell, bins):
    """One channel (height, width), pixel by pixel."""
    height, width = x.shape
    out = torch.zeros(height // cell, width // cell, bins, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            down = float(x[i + 1, j] - x[i - 1, j]) if 0 < i < height - 1 else 0.0
            across = float(x[i, j + 1] - x[i, j - 1]) if 0 < j < width - 1 else 0.0
            which = min(bins - 1, int(math.degrees(math.atan2(down, across)) % 180 // (180 / bins)))
            out[i // cell, j // cell, which] += math.hypot(down, across) / cell**2
    return out


def test_a_plain_loop_gives_the_same():
    x = image(1)
    for cell, bins in ((4, 9), (8, 9), (2, 6)):
        found = hog(x, cell, bins=bins, whiten=False)
        assert found.shape == (2, 3, 8 // cell, 8 // cell, bins)
        for sample in range(2):
            for channel in range(3):
                assert torch.allclose(found[sample, channel], loop(x[sample, channel], cell, bins), atol=1e-12)


def test_an_even_image_gives_zeros_and_no_nan():
    even = torch.full((1, 2, 8, 8), 0.7)
    assert torch.equal(hog(even, 4), torch.zeros(1, 2, 2, 2, 9))
    assert torch.equal(hog(even, 4, whiten=False), torch.zeros(1, 2, 2, 2, 9))


def test_a_horizontal_ramp_is_all_in_bin_0_and_its_quarter_turn_90_degrees_on():
    found = hog(COLUMNS[None, None], 8, whiten=False)[0, 0, 0, 0]
    # 6 of 8 columns have a centred difference of 2, the border columns none
    assert found.tolist() == [1.5, 0, 0, 0, 0, 0, 0, 0, 0]
    turned = hog(ROWS[None, None], 8, whiten=False)[0, 0, 0, 0]
    assert turned.tolist() == [0, 0, 0, 0, 1.5, 0, 0, 0, 0]  # 90 degrees lie in 80..100


def test_a_quarter_turn_of_any_image_moves_the_energy_by_90_degrees():
    x = image(2)
    for whiten in (False, True):
        straight, turned = (hog(y, 4, bins=18, whiten=whiten) for y in (x, x.rot90(1, (2, 3))))
        assert torch.allclose(turned, straight.rot90(1, (2, 3)).roll(9, -1), atol=1e-12)
    slanted = (ROWS + 0.3 * COLUMNS)[None, None]  # 73 degrees, and 163 after the turn
    inner = hog(slanted, 8, whiten=False)[0, 0, 0, 0]
    assert inner.argmax() == 3 and hog(slanted.rot90(1, (2, 3)), 8, whiten=False)[0, 0, 0, 0].argmax() == 8


def test_contrast_does_not_matter_when_whitened():
    x = image(3)
    for factor in (0.5, 3.0, 20.0):
        assert torch.allclose(hog(factor * 255 * x, 4), hog(255 * x, 4), atol=1e-6)
        assert torch.allclose(hog(factor * x, 4, whiten=False), factor * hog(x, 4, whiten=False))
    cells = hog(x, 4, whiten=False)  # eps is felt where the gradients are faint
    centred = cells - cells.mean(-1, keepdim=True)
    assert torch.allclose(hog(x, 4), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-9)
    white = hog(x, 4)
    assert torch.allclose(white.mean(-1), torch.zeros(2, 3, 2, 2, dtype=x.dtype), atol=1e-9)


def test_tokens_hold_their_own_cells_in_the_stated_order():
    x = image(4, 2, 3, 16, 32)
    cells, rows = hog(x, 8), hog_tokens(x, 16)
    assert rows.shape == (2, 2, 2 * 2 * 9 * 3)  # the paper's 108 values of a 16 x 16 patch
    for token in range(2):
        for at in range(108):
            down, right, which, channel = at // 54, at // 27 % 2, at // 3 % 9, at % 3
            assert torch.equal(rows[:, token, at], cells[:, channel, down, 2 * token + right, which])
    assert torch.equal(hog_tokens(x, 4), hog_tokens(x, 4, 4)) and hog_tokens(x, 4).shape == (2, 32, 27)


def test_directions_at_the_borders_of_the_bins_stay_inside():
    hair = torch.zeros(1, 1, 3, 3)
    hair[0, 0, 1, 2], hair[0, 0, 2, 1] = 1.0, -1e-9  # a direction a hair below 0 degrees
    found = hog(hair, 3, whiten=False)[0, 0, 0, 0]
    assert found[8] > 0 and found.isfinite().all()
    left = torch.zeros(1, 1, 3, 3)
    left[0, 0, 1, 0] = 1.0  # 180 degrees is 0
    assert hog(left, 3, whiten=False)[0, 0, 0, 0].argmax() == 0


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(BadInput, match="3 x 3 does not divide images of 8 x 8"):
        hog(x, 3)
    with pytest.raises(BadInput, match="cells of 3 x 3 pixels do not divide patches of 4 x 4"):
        hog_tokens(x, 4, 3)
    with pytest.raises(BadInput, match="at least 1 bin, got 0"):
        hog(x, 4, bins=0)
    x[0, 0, 2, 3] = float("nan")
    with pytest.raises(BadInput, match=r"NaN or infinite at \(0, 0, 2, 3\)"):
        hog(x, 4)
