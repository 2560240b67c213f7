"""select, draw and global_ against brute force: exact counts, ties to the lower index, infinities, NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.budget import Units, erk_densities, global_, owl_densities, uniform, whole
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import NM, Block, Group, Unstructured, parse
from maskwright.core.rewire import rewire
from maskwright.core.select import disjoint, draw, generator, select, top

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def brute(units, counts):
    kept = torch.zeros(units.shape, dtype=torch.bool)
    for g in range(units.shape[0]):
        order = sorted(range(units.shape[1]), key=lambda i: (-float(units[g, i]), i))
        kept[g, order[: int(counts[g])]] = True
    return kept


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(1, 150), st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(1, 40))
def test_top_equals_brute_force_with_ties_and_infinities(groups, width, dtype, seed, levels):
    rng = torch.Generator().manual_seed(seed)
    units = torch.randint(-levels, levels, (groups, width), generator=rng).to(dtype)
    units[torch.rand(groups, width, generator=rng) < 0.05] = -0.0
    forced = torch.rand(groups, width, generator=rng)
    units[forced < 0.1], units[forced > 0.9] = math.inf, -math.inf
    low, high = (units == math.inf).sum(1), width - (units == -math.inf).sum(1)
    counts = low + (torch.rand(groups, generator=rng) * (high - low + 1)).long().clamp(max=high - low)
    got = top(units, counts)
    assert torch.equal(got, brute(units, counts))


PATTERNS = (
    (Unstructured(), (1,)), (Unstructured(), (3, 4)), (Unstructured((0,)), (3, 5)), (Unstructured((1,)), (3, 5)),
    (Unstructured((0, 2)), (2, 3, 4)), (NM(2, 4), (3, 8)), (NM(1, 4), (2, 4)), (NM(1, 4, 0), (8, 3)), (NM(3, 8), (2, 16)),
    (NM(2, 4, 1), (3, 8, 2, 2)), (Block((2, 2)), (4, 6)), (Block((2, 3), (0,)), (4, 6)), (Block((2, 2), pad=True), (3, 5)),
    (Group((0,)), (4, 3)), (Group((1,)), (4, 3)), (Unstructured(), (0,)), (Unstructured((0,)), (0, 4)),
)  # fmt: skip


@pytest.mark.parametrize(("pattern", "shape"), PATTERNS, ids=str)
def test_every_pattern_folds_back_parses_and_selects_exactly(pattern, shape):
    score = torch.randint(0, 4, shape, generator=generator(1, str(shape))).float()
    assert parse(pattern.spec()) == pattern
    units = pattern.fold(score)
    assert tuple(units.shape) == pattern.grid(shape)
    counts = torch.full((units.shape[0],), pattern.fixed if pattern.fixed is not None else units.shape[1] // 2)
    mask = select(score, pattern, counts)
    assert torch.equal(mask.keep, pattern.unfold(brute(units, counts), shape))
    mask.check()


def test_what_cannot_be_selected_is_refused_in_one_line():
    for score, pattern, counts in (
        (torch.tensor([1.0, math.nan]), Unstructured(), 1),
        (torch.tensor([math.inf, math.inf]), Unstructured(), 1),
        (torch.tensor([-math.inf, 1.0]), Unstructured(), 2),
        (torch.ones(3), Unstructured(), 4),
        (torch.ones(3), Unstructured(), -1),
        (torch.ones(2, 6), NM(2, 4), None),
        (torch.ones(3, 3), Block((2, 2)), 1),
        (torch.ones(3), Unstructured(), None),
    ):
        with pytest.raises(BadInput) as error:
            select(score, pattern, counts)
        assert "\n" not in str(error.value)


def test_the_number_of_threads_does_not_matter():
    score = torch.randint(0, 50, (300, 700), generator=generator(0, "threads")).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = select(score, Unstructured((0,)), 350)
    finally:
        torch.set_num_threads(threads)
    assert one.equal(select(score, Unstructured((0,)), 350))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**31), st.floats(0, 1))
def test_global_budget_equals_one_ranking_over_all_sites(groups, width, seed, density):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randint(-4, 5, (groups, width), generator=rng).double() / 3
    b = torch.randint(-4, 5, (1, 17), generator=rng).double() / 3
    sites = {"a": Units(groups, width, (groups, width), lambda: a), "b": Units(1, 17, (17,), lambda: b)}
    counts = global_(sites, density)
    total = whole(density, groups * width + 17)
    kept = brute(torch.cat([a.flatten(), b.flatten()])[None], torch.tensor([total]))[0]
    assert torch.equal(counts["a"], kept[: groups * width].reshape(groups, width).sum(1))
    assert int(counts["b"]) == int(kept[groups * width :].sum())


def test_whole_counts_follow_the_decimal_and_round_half_to_even():
    assert [whole(0.8, 100), whole(0.29, 100), whole(0.5, 5), whole(0.5, 7), whole(0.07, 100)] == [80, 29, 2, 4, 7]
    assert uniform({"x": Units(2, 5, (2, 5))}, 0.5)["x"].tolist() == [2, 2]


def test_erk_densities_of_the_sheets():
    shapes = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
    got = erk_densities(shapes, 0.5)
    assert [round(v, 6) for v in got.values()] == [0.434099, 1.0, 1.0]
    assert [round(v, 6) for v in erk_densities(shapes, 0.2).values()] == [0.162241, 0.469362, 1.0]
    assert [round(v, 6) for v in erk_densities(shapes, 0.05).values()] == [0.038484, 0.111334, 0.918507]
    conv = {"1": (16, 3, 3, 3), "2": (16, 16, 3, 3), "3": (32, 16, 3, 3), "4": (10, 32)}
    assert [round(v, 6) for v in erk_densities(conv, 0.2).values()] == [0.599873, 0.170964, 0.121474, 1.0]
    assert len(set(erk_densities(shapes, 0.3, power=0).values())) == 1


def test_owl_densities():
    outliers, sizes = {"a": 1.0, "b": 3.0, "c": 2.0}, {"a": 10, "b": 10, "c": 20}
    got = owl_densities(outliers, sizes, 0.5, 0.08)
    assert got["b"] > got["c"] > got["a"] and abs(got["b"] - got["a"] - 0.16) < 1e-12
    assert abs(sum(got[k] * sizes[k] for k in got) / 40 - 0.5) < 1e-12
    assert set(owl_densities(outliers, sizes, 0.5, 0.0).values()) == {0.5}


def test_draw_is_exact_seeded_and_independent_of_order():
    one = draw(Unstructured(), (40,), 10, rng=generator(3, "x"))
    assert one.count == 10 and one.equal(draw(Unstructured(), (40,), 10, rng=generator(3, "x")))
    assert not one.equal(draw(Unstructured(), (40,), 10, rng=generator(4, "x")))
    assert not one.equal(draw(Unstructured(), (40,), 10, rng=generator(3, "y")))
    parts = list(disjoint(Unstructured((0,)), (3, 10), 3, rng=generator(0)))
    assert torch.equal(sum(p.keep.long() for p in parts), torch.ones(3, 10, dtype=torch.long))


def test_rewire_hand_case_of_the_sheet():
    weight = torch.tensor([3, -1, 0.5, 2, 0, 0, 0, 0]).abs()
    old = Mask(torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool())
    grad = torch.tensor([9.0, 9, 9, 9, 1, 4, 2, 3])
    assert rewire(old, weight, grad, 0.5).equal(old)
    assert rewire(old, weight, grad, 0.5, regrow=False).indices().tolist() == [0, 3, 5, 7]
    assert rewire(old, weight, grad, 0.0).equal(old)
