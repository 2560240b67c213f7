"""The sheet's exact checks of DSnoT."""

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.pattern import NM, Unstructured
from maskwright.core.select import generator
from maskwright.weights.dsnot import Dsnot
from maskwright.weights.wanda import Wanda

WEIGHT, SUM = torch.tensor([[1.0, -1.0, 2.0, 0.5]]), torch.tensor([0.5, 0.4, 0.3, -0.2])
START = torch.tensor([[False, True, True, False]])


def trace(**settings):
    method = Dsnot(threshold=0.1, **settings)
    keep, _ = method.swap(WEIGHT * SUM, torch.ones(1, 4), WEIGHT.abs(), START, Unstructured((0,)))
    return keep[0].nonzero().flatten().tolist()


def test_the_traced_row():
    assert trace() == [0, 3]
    assert trace(same_sign=True) == [1, 2]
    assert trace(cycles=0) == [1, 2]


def rows(pattern, seed=0):
    a = torch.randn(16, 64, generator=generator(seed, "a"))
    score = torch.rand(16, 64, generator=generator(seed, "s"))
    from maskwright.core.select import select

    counts = pattern.fixed if pattern.fixed is not None else 24
    return a, score, select(score, pattern, counts).keep


@pytest.mark.parametrize("pattern", [Unstructured((0,)), NM(2, 4), NM(1, 4)], ids=str)
def test_counts_never_change_and_the_error_falls(pattern):
    a, score, start = rows(pattern)
    keep, _ = Dsnot(threshold=0.01, same_sign=False).swap(a, torch.ones_like(a), score, start, pattern)
    assert torch.equal(pattern.fold(keep).sum(1), pattern.fold(start).sum(1))
    before, after = ((a * ~k).sum(1).abs().mean() for k in (start, keep))
    # N:M cannot choose the sign of what it drops, so its gain is smaller.
    assert after < before / (1 if isinstance(pattern, NM) else 2)
    assert not torch.equal(keep, start)


def test_infinite_threshold_and_dead_inputs_change_nothing():
    a, score, start = rows(Unstructured((0,)))
    for method, var in ((Dsnot(threshold=1e30), torch.ones_like(a)), (Dsnot(threshold=0.0), torch.zeros_like(a))):
        assert torch.equal(method.swap(a, var, score, start, Unstructured((0,)))[0], start)


def test_inverted_growth_makes_the_error_larger():
    a, score, start = rows(Unstructured((0,)))
    keep, _ = Dsnot(threshold=0.01).swap(-a, torch.ones_like(a), score, start, Unstructured((0,)))
    right, _ = Dsnot(threshold=0.01).swap(a, torch.ones_like(a), score, start, Unstructured((0,)))
    assert torch.equal(keep, right) or (a * ~keep).sum(1).abs().mean() >= (a * ~right).sum(1).abs().mean()


def test_on_a_model_weights_stay_and_no_cycles_is_the_start():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x = [torch.randn(64, 32, generator=generator(0)).abs()]
    start = Wanda(density=0.5).masks(model, x)
    assert Dsnot(density=0.5, cycles=0).masks(model, x).equal(start)
    assert not Dsnot(density=0.5, threshold=0.0, stat="mean").masks(model, x).equal(start)
    with pytest.raises(BadInput):
        Dsnot(initial="luck")  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [Unstructured((0,)), NM(2, 4)], ids=str)
@pytest.mark.parametrize("cycles", [1, 7, 50])
def test_the_bookkeeping_of_delta_equals_a_recount_from_the_mask(pattern, cycles):
    a, score, start = rows(pattern, seed=4)
    keep, note = Dsnot(threshold=0.01, cycles=cycles).swap(a, torch.ones_like(a), score, start, pattern)
    before, after = ((a * ~k).sum(1).abs().mean() for k in (start, keep))
    told = note.removeprefix("mean |delta| ").split(" -> ")
    assert [float(t) for t in told] == pytest.approx([float(before), float(after)], rel=2e-3)
    assert int((keep & ~start).sum(1).max()) <= cycles
