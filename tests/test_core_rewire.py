"""rewire: the sheet's hand case, counts that never move, refusals; force and Score beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import NM, Block, Group, Unstructured
from maskwright.core.rewire import rewire
from maskwright.core.score import Score, force, magnitude, score, uniform_random
from maskwright.core.select import draw, generator

# papers/sparse-ift.md: W and |g|, the first four active, half of them dropped
WEIGHT = torch.tensor([3, -1, 0.5, 2, 0, 0, 0, 0])
GRAD = torch.tensor([9.0, 9, 9, 9, 1, 4, 2, 3])
FIRST = Mask(torch.arange(8) < 4)


def test_hand_case_of_the_sheet() -> None:
    assert rewire(FIRST, WEIGHT.abs(), GRAD, 0.5).indices().tolist() == [0, 1, 2, 3]  # both come straight back
    assert rewire(FIRST, WEIGHT.abs(), GRAD, 0.5, regrow=False).indices().tolist() == [0, 3, 5, 7]


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.25, [0, 1, 3, 5]), (0.75, [0, 5, 6, 7]), (1.0, [4, 5, 6, 7])],
)
def test_fraction_is_cut_to_whole_units(fraction: float, kept: list[int]) -> None:
    assert rewire(FIRST, WEIGHT.abs(), GRAD, fraction, regrow=False).indices().tolist() == kept


def test_fraction_of_a_decimal_is_not_one_short() -> None:
    old = Mask(torch.arange(200) < 100)
    drop = torch.arange(200).float()
    for percent in range(101):
        new = rewire(old, drop, drop, percent / 100, regrow=False)
        assert (old - new).count == percent, percent  # 0.29 x 100 is 28.999...


def test_only_kept_units_are_dropped() -> None:
    # Kept weights of exactly 0 (just grown) tie with the dropped ones; ranked over the whole tensor they would be lost.
    weight = torch.tensor([0.0, 0, 5, 0, 0, 0])
    old = Mask(torch.tensor([False, True, True, True, False, False]))
    new = rewire(old, weight.abs(), torch.tensor([9.0, 0, 0, 0, 1, 2]), 0.34, regrow=False)
    assert new.indices().tolist() == [0, 1, 2]
    # the same under negative scores: a dropped unit's 0 must not beat a kept -1
    new = rewire(old, torch.tensor([0.0, -3, -1, -2, 0, 0]), torch.zeros(6), 1 / 3, regrow=False)
    assert new.indices().tolist() == [0, 2, 3]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from([Unstructured(), Unstructured((0,)), Block((2, 3)), Block((2, 2), pad=True), Group((1,))]),
    seed=st.integers(0, 999),
    fraction=st.floats(0, 1),
    regrow=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_counts_never_move(pattern, seed: int, fraction: float, regrow: bool, dtype: torch.dtype) -> None:
    shape = (4, 9)
    rng = generator(seed)
    groups, units = pattern.grid(shape)
    old = draw(pattern, shape, torch.randint(0, units // 2 + 1, (groups,), generator=rng), rng=rng)
    drop, grow = (torch.randint(-3, 4, shape, generator=rng).to(dtype) for _ in range(2))
    new = rewire(old, drop, grow, fraction, regrow=regrow)
    before, after = (pattern.fold(mask.check().keep.float()).gt(0).sum(1) for mask in (old, new))
    assert torch.equal(before, after) and new.pattern == pattern
    assert rewire(old, drop, grow, fraction, regrow=regrow).equal(new)
    left = pattern.fold((old - new).keep.float()).gt(0).sum(1)
    moved = (before.double() * fraction + 1e-9).long()
    assert bool((left == moved).all()) if not regrow else bool((left <= moved).all())


def test_refusals() -> None:
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match=r"fraction in \[0, 1\]"):
            rewire(FIRST, WEIGHT, GRAD, fraction)
    with pytest.raises(BadInput, match="fixes its count"):
        rewire(draw(NM(2, 4), (8,), rng=generator(0)), WEIGHT, GRAD, 0.5)
    full = Mask(torch.ones(8).bool())
    assert rewire(full, WEIGHT, GRAD, 0.5).equal(full)
    with pytest.raises(BadInput, match="may be kept"):
        rewire(full, WEIGHT, GRAD, 0.5, regrow=False)  # nothing left to grow
    for drop, grow in ((WEIGHT * math.nan, GRAD), (WEIGHT, GRAD * math.nan)):
        with pytest.raises(BadInput, match="NaN"):
            rewire(FIRST, drop, grow, 0.5)


def test_what_nobody_asks_about_may_be_nan() -> None:
    # A dropped weight's drop score and a surviving weight's grow score have no say.
    drop, grow = WEIGHT.abs(), GRAD.clone()
    drop[4:], grow[[0, 3]] = math.nan, math.nan
    assert rewire(FIRST, drop, grow, 0.5, regrow=False).indices().tolist() == [0, 3, 5, 7]


# --- force and Score


def test_force_writes_infinities() -> None:
    keep, drop = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    for values in (torch.tensor([1.0, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).bfloat16()):
        before = values.clone()
        assert force(values, keep, drop).tolist() == [math.inf, 2, -math.inf]
        assert torch.equal(values, before)
        assert force(values).tolist() == [1, 2, 3]
    with pytest.raises(BadInput, match=r"1 entries of shape \(3,\) are forced both ways"):
        force(torch.zeros(3), keep, torch.tensor([True, False, True]))


class Spot:
    """The least a score asks of a site."""

    name, seed = "w", 3
    value = torch.tensor([[1.0, -2.0]], requires_grad=True)

    def stat(self, name: str) -> torch.Tensor:
        raise KeyError(name)


def test_scores() -> None:
    spot = Spot()
    assert magnitude(spot).tolist() == [[1.0, 2.0]] and not magnitude(spot).requires_grad
    assert torch.equal(uniform_random(spot), uniform_random(Spot())) and magnitude.needs == frozenset()

    @score("input_norm")
    def first(site: Spot) -> torch.Tensor:
        return site.value[:, :1]

    assert first.needs == {"input_norm"} and first.name == "first"
    with pytest.raises(BadInput, match=r"w: score first has shape \(1, 1\), the site \(1, 2\)"):
        first(spot)
    with pytest.raises(BadInput, match=r"unknown needs \['luck'\]; known: .*input_norm"):
        Score(lambda site: site.value, frozenset({"luck"}))
