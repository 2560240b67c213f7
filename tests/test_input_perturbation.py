"""A perturbation inside a mask, an eps ball and the value bounds."""

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.inputs.perturbation import Ball


def test_the_ball_projects_exactly():
    x = torch.tensor([0.0, 0.5, 1.0, 0.5]).view(1, 1, 2, 2)
    delta = torch.tensor([-0.3, 0.3, 0.3, 0.05]).view(1, 1, 2, 2)
    mask = Mask(torch.tensor([[[True, True], [True, False]]]), Unstructured((0,)))
    assert torch.allclose(Ball(0.1, 0.0, 1.0).project(delta, mask, x).flatten(), torch.tensor([0.0, 0.1, 0.0, 0.0]))
    free = Ball(0.1).project(delta, mask).flatten()
    assert torch.allclose(free, torch.tensor([-0.1, 0.1, 0.1, 0.0]))
    bins = Mask(torch.tensor([[True, False]]), Unstructured((0,)))  # mel bins of (1, bins, frames)
    assert Ball(0.1).project(torch.ones(1, 2, 3), bins).tolist() == [[[pytest.approx(0.1)] * 3, [0.0] * 3]]
    nan = torch.tensor([0.1, 0.1, 0.1, float("nan")]).view(1, 1, 2, 2)
    assert Ball(0.1).descend(delta, nan, mask, 0.01, x).isfinite().all()  # NaN under the mask changes nothing
    with pytest.raises(BadInput, match="NaN"):
        Ball(0.1).descend(delta, nan.flip(-1).flip(-2), mask, 0.01, x)
    for says, call in (
        ("shape", lambda: Ball(0.1).project(delta, mask, x[..., :1])),
        ("leave", lambda: Ball(0.1, 0.0, 0.9).project(delta, mask, x)),
        ("gradient", lambda: Ball(0.1).descend(delta, nan[..., :1], mask, 0.01)),
        ("low < high", lambda: Ball(0.1, 1.0, 0.0)),
    ):
        with pytest.raises(BadInput, match=says):
            call()


def test_a_step_follows_the_sign_and_leaves_what_has_no_slope():
    delta, mask = torch.zeros(1, 1, 1, 3), Mask(torch.ones(1, 1, 3, dtype=torch.bool), Unstructured((0,)))
    gradient = torch.tensor([2.0, -0.001, 0.0]).view(1, 1, 1, 3)
    down = Ball(0.1).descend(delta, gradient, mask, 0.03).flatten()
    assert torch.allclose(down, torch.tensor([-0.03, 0.03, 0.0]))
    assert torch.allclose(Ball(0.1).descend(delta, gradient, mask, -0.3).flatten(), torch.tensor([0.1, -0.1, 0.0]))
    for eps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput):
            Ball(eps)
