"""hide, visible, weigh: entries are left out, never multiplied away; NaN under a mask changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright import Mask, SoftMask
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs import Exact, hide, masked_loss, patches, spread, unpatched, visible, weigh

NAN = float("nan")


def rng(seed=0):
    return generator(seed, "test")


def half(*shape, seed=0):
    return Exact(0.5)(shape, rng=rng(seed))


def test_patches_by_hand_and_back():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    tokens = patches(image, 2)
    assert tokens[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(unpatched(tokens, 2, (2, 2)), image)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_patches_invert(batch, channels, rows, columns, side):
    images = torch.rand(batch, channels, rows * side, columns * side, generator=rng())
    assert torch.equal(unpatched(patches(images, side), side, (rows, columns)), images)


def test_patches_that_do_not_divide_are_refused():
    with pytest.raises(BadInput, match="patch of 3 x 3 does not divide images of 8 x 9"):
        patches(torch.zeros(1, 1, 8, 9), 3)
    with pytest.raises(BadInput, match="no 2 x 2 grid"):
        unpatched(torch.zeros(1, 5, 4), 2, (2, 2))


def test_spread_repeats_each_cell():
    grid = torch.tensor([[[True, False]]])
    assert spread(grid, (2, 4))[0].tolist() == [[True, True, False, False]] * 2
    with pytest.raises(BadInput, match="whole multiples"):
        spread(grid, (2, 3))


def test_hide_places_the_features_dim():
    grid = half(2, 2, 2)
    images = torch.ones(2, 3, 4, 4)
    shown = hide(images, grid)
    assert torch.equal(shown[:, 0], spread(grid.keep, (4, 4)).float()) and torch.equal(shown[:, 0], shown[:, 2])
    tokens = hide(torch.ones(2, 8, 5), half(2, 8), fill=torch.arange(5.0))
    assert torch.equal(tokens[~half(2, 8).keep], torch.arange(5.0).expand(8, 5))
    video = hide(torch.ones(2, 3, 4, 2, 2), half(2, 4, 2, 2))
    assert video.sum() == 3 * half(2, 4, 2, 2).count
    assert hide(torch.ones(2, 8), half(2, 8)).sum() == 8
    last = hide(torch.ones(2, 4, 4, 3), half(2, 4, 4), features=-1)
    assert last.sum() == 3 * 16


def test_hidden_nan_changes_nothing_and_visible_nan_is_refused():
    mask, x = half(2, 8), torch.randn(2, 8, 3, generator=rng())
    clean, dirty = x.clone().requires_grad_(), torch.where(mask.keep[..., None], x, NAN).requires_grad_()
    for value in (clean, dirty):
        hide(value, mask).square().sum().backward()
    assert torch.equal(hide(clean, mask), hide(dirty, mask)) and torch.equal(clean.grad, dirty.grad)
    assert (clean.grad[~mask.keep] == 0).all()
    with pytest.raises(BadInput, match=r"hide: data of shape .* are NaN at \(0, "):
        hide(torch.where(mask.keep[..., None], NAN, x), mask)


def test_hide_refuses_other_shapes():
    for x in (torch.ones(3, 8), torch.ones(2, 7), torch.ones(2, 8, 3, 3, 3)):
        with pytest.raises(BadInput, match="mask"):
            hide(x, half(2, 8))


def test_visible_gathers_and_puts_back():
    mask, x = half(3, 10), torch.randn(3, 10, 4, generator=rng())
    seen = visible(x, mask)
    assert seen.values.shape == (3, 5, 4)
    for row in range(3):
        assert torch.equal(seen.values[row], x[row][mask.keep[row]])
    assert torch.equal(seen.put_back(seen.values), hide(x, mask))
    token = torch.arange(4.0)
    assert torch.equal(seen.put_back(seen.values, token), hide(x, mask, token))
    dirty = torch.where(mask.keep[..., None], x, NAN)
    assert torch.equal(visible(dirty, mask).values, seen.values)


def test_put_back_passes_gradients_to_values_and_fill():
    mask, x = half(2, 6), torch.randn(2, 6, 3, dtype=torch.float64, generator=rng()).requires_grad_()
    fill = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: visible(a, mask).put_back(visible(a, mask).values.sin(), b), (x, fill))


def test_visible_refuses_ragged_rows_nan_and_shapes():
    ragged = Mask(torch.tensor([[True, True], [True, False]]))
    with pytest.raises(BadInput, match="keep 1 to 2 tokens"):
        visible(torch.zeros(2, 2, 1), ragged)
    with pytest.raises(BadInput, match="NaN"):
        visible(torch.full((2, 6, 1), NAN), half(2, 6))
    with pytest.raises(BadInput, match="token rows"):
        visible(torch.zeros(2, 5, 1), half(2, 6))
    with pytest.raises(BadInput, match="do not go back"):
        visible(torch.zeros(2, 6, 1), half(2, 6)).put_back(torch.zeros(2, 4, 1))


def test_weigh_by_hand():
    loss = torch.tensor([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]])
    mask = Mask(torch.tensor([[True, True, False], [True, False, False]]))
    assert weigh(loss, mask).item() == pytest.approx(7 / 3)
    assert weigh(loss, mask, over="samples").item() == pytest.approx((1.5 + 4) / 2)
    assert weigh(loss, mask, over="none").item() == 7
    soft = SoftMask(torch.tensor([[0.5, 0.0, 0.0], [2.0, 0.0, 0.0]]))
    assert weigh(loss, soft).item() == pytest.approx((0.5 * 1 + 2 * 4) / 2.5)


def test_weigh_counts_features_and_spreads():
    loss = torch.randn(2, 3, 4, 4, generator=rng()).square()
    mask = half(2, 2, 2)
    keep = spread(mask.keep, (4, 4)).unsqueeze(1).expand_as(loss)
    assert weigh(loss, mask).item() == pytest.approx(loss[keep].mean().item())


def test_weigh_ignores_nan_under_the_mask_and_refuses_others():
    mask, loss = half(2, 8), torch.rand(2, 8, generator=rng())
    dirty = torch.where(mask.keep, loss, NAN)
    assert weigh(dirty, mask) == weigh(loss, mask)
    with pytest.raises(BadInput, match="weigh: .* NaN"):
        weigh(torch.where(mask.keep, NAN, loss), mask)
    empty = Mask(torch.tensor([[True, True], [False, False]]))
    with pytest.raises(BadInput, match="keeps no entry of sample 1"):
        weigh(torch.ones(2, 2), empty, over="samples")
    with pytest.raises(BadInput, match="keeps no entry of a loss"):
        weigh(torch.ones(2, 2), Mask(torch.zeros(2, 2, dtype=torch.bool)))


def test_masked_loss_lets_no_nan_into_the_gradient():
    mask = half(2, 8)
    target = torch.rand(2, 8, 3, generator=rng())
    dirty = torch.where(mask.keep[..., None], target, NAN)
    grads = []
    for goal in (target, dirty):
        guess = torch.zeros(2, 8, 3, requires_grad=True)
        masked_loss(guess, goal, mask).backward()
        grads.append(guess.grad)
    assert torch.equal(*grads) and (grads[0][~mask.keep] == 0).all()
    assert masked_loss(torch.zeros(2, 8, 3), dirty, mask).item() == pytest.approx(target[mask.keep].square().mean().item())
    with pytest.raises(BadInput, match="has a target of shape"):
        masked_loss(torch.zeros(2, 8, 3), target[:, :4], mask)
