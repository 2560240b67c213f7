"""DARE: what stays is rescaled, in expectation nothing changes (more in tests/test_updates_merging.py)."""

import torch

from maskwright.updates import merge
from maskwright.updates.dare import Dare


def test_survivors_are_divided_by_the_density():
    base, tuned = {"w": torch.zeros(2000)}, {"w": torch.ones(2000)}
    out = merge(base, [tuned], Dare(density=0.25), seed=3)
    assert set(out.state["w"].tolist()) == {0.0, 4.0}
    kept = int((out.state["w"] == 4).sum())
    assert out.report["w"].kept == [kept] and abs(kept - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert set(merge(base, [tuned], Dare(density=0.25, rescale="none"), seed=3).state["w"].tolist()) == {0.0, 1.0}


def test_models_draw_masks_of_their_own_that_no_other_seed_repeats():
    base, tuned = {"w": torch.zeros(512)}, {"w": torch.ones(512)}

    def masks(seed):
        both = merge(base, [tuned, {"w": torch.full((512,), 1024.0)}], Dare(density=0.5, rescale="none"), seed=seed)
        value = both.state["w"]
        return value % 1024 == 1, value >= 1024

    (a, b), (c, d) = masks(0), masks(1)
    assert not torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, c) and not torch.equal(b, d)


def test_signs_may_be_elected():
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([3.0, 1, 1, 1])}, {"w": torch.tensor([-1.0, 1, 1, 1])}]
    assert merge(base, tuned, Dare(density=1.0, elect=True)).state["w"].tolist() == [3, 2, 2, 2]
    assert merge(base, tuned, Dare(density=1.0)).state["w"].tolist() == [2, 2, 2, 2]
