"""Budgets: exact whole counts, the sheets' densities, one ranking over all sites, no say for the order of sites."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.core.budget import (
    BUDGETS,
    Budget,
    Counts,
    Units,
    er,
    erk,
    erk_densities,
    erk_plus,
    fixed,
    floor,
    global_,
    owl,
    owl_densities,
    uniform,
    whole,
)
from maskwright.core.errors import BadInput
from maskwright.core.pattern import Group, Pattern, Unstructured
from maskwright.core.select import select

INF = float("inf")
QUICK = settings(max_examples=80, deadline=None, derandomize=True)

# papers/random-pruning.md and papers/sparse-ift.md, "Exact checks"
MLP = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}
CONV = {"1": (16, 3, 3, 3), "2": (16, 16, 3, 3), "3": (32, 16, 3, 3), "4": (10, 32)}
IFT = {"1": (64, 64), "2": (64, 10), "3": (256, 64)}


def units(shape: tuple[int, ...], groups: int = 1, **more: object) -> Units:
    return Units(groups, math.prod(shape) // groups, shape, **more)  # type: ignore[arg-type]


def sites_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Units]:
    return {name: units(shape) for name, shape in shapes.items()}


def total(counts: Counts) -> int:
    return sum(int(count.sum()) for count in counts.values())


def plain(counts: Counts) -> dict[str, list[int]]:
    return {name: count.tolist() for name, count in counts.items()}


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [
        (0.8, 100, 80),  # 1 - 0.2 and 100 x 0.8 in floats both go wrong somewhere; the decimal does not
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.07, 100, 7),
        (0.1, 30, 3),
        (0.5, 1, 0),  # half to even
        (0.5, 3, 2),
        (0.5, 5, 2),
        (0.25, 10, 2),
        (0.15, 10, 2),  # 1.5 exactly, though the float 0.15 lies below
        (1e-5, 10**9, 10**4),
        (0.3, 10**12 + 10, 3 * 10**11 + 3),
        (0.0, 7, 0),
        (1.0, 7, 7),
        (0.5, 0, 0),
    ],
)
def test_whole_rounds_the_decimal_half_to_even(density: float, size: int, count: int) -> None:
    assert whole(density, size) == count


def test_uniform_gives_every_group_the_same_count() -> None:
    sites = {"a": units((3, 7), 3), "b": units((5,)), "none": Units(0, 0, (0, 4))}
    assert plain(uniform(sites, 0.5)) == {"a": [4, 4, 4], "b": [2], "none": []}
    assert total(uniform(sites, 0.0)) == 0 and total(uniform(sites, 1.0)) == 26


def test_fixed_needs_a_density_for_each_site_and_no_other() -> None:
    sites = {"a": units((2, 10), 2), "b": units((10,))}
    assert plain(fixed({"a": 0.3, "b": 1.0})(sites, 0.5)) == {"a": [3, 3], "b": [10]}
    for densities in ({"a": 0.3}, {"a": 0.3, "b": 1.0, "c": 1.0}):
        with pytest.raises(BadInput, match=r"disagree on [bc]"):
            fixed(densities)(sites, 0.5)
    for wrong in (1.2, -0.1, math.nan):
        with pytest.raises(BadInput, match=r"b: a density lies in \[0, 1\]"):
            fixed({"a": 0.3, "b": wrong})(sites, 0.5)


def test_floor_raises_groups_and_nothing_else() -> None:
    sites = {"a": units((2, 10), 2), "b": units((1000,))}
    inner = fixed({"a": 0.1, "b": 0.3})
    assert plain(floor(inner, 0.2)(sites, 0.5)) == {"a": [2, 2], "b": [300]}
    assert plain(floor(inner, 0.0)(sites, 0.5)) == plain(inner(sites, 0.5))
    with pytest.raises(BadInput, match="floor"):
        floor(inner, 1.5)
    assert floor(global_, 0.1).needs_scores and floor(owl(), 0.1).needs_facts == ("outliers", "block")


@pytest.mark.parametrize("budget", [uniform, erk(), er(), erk_plus({}), global_, fixed({})], ids=str)
@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, INF])
def test_densities_outside_0_1_are_refused(budget: Budget, density: float) -> None:
    with pytest.raises(BadInput, match=r"density lies in \[0, 1\]"):
        budget({}, density)


# --- Erdos-Renyi


@pytest.mark.parametrize(
    ("shapes", "density", "expected"),
    [
        (MLP, 0.5, (0.434099, 1, 1)),
        (MLP, 0.2, (0.162241, 0.469362, 1)),
        (MLP, 0.1, (0.079568, 0.230189, 1)),
        (MLP, 0.05, (0.038484, 0.111334, 0.918507)),
        (CONV, 0.2, (0.599873, 0.170964, 0.121474, 1)),
        (CONV, 0.1, (0.278942, 0.079499, 0.056486, 0.632642)),
        (IFT, 0.2, (0.252874, 0.935632, 0.158046)),
        (IFT, 0.5, (0.691964, 1, 0.432478)),
    ],
)
def test_erk_densities_of_the_sheets(shapes: dict, density: float, expected: tuple[float, ...]) -> None:
    got = erk_densities(shapes, density)
    assert [round(value, 6) for value in got.values()] == [*expected]
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    assert math.isclose(sum(got[n] * size[n] for n in shapes), density * sum(size.values()), abs_tol=1e-9)


def test_erk_eps_of_the_sheet() -> None:
    # kept entries of a free layer = eps x the sum of its dims
    for density, eps in ((0.5, 94.1882), (0.2, 35.2022), (0.05, 8.35006)):
        got = erk_densities(MLP, density)["1"]
        assert math.isclose(got * 300 * 784 / (300 + 784), eps, rel_tol=1e-5)


def test_er_takes_the_first_two_dims() -> None:
    assert erk_densities(MLP, 0.2, kernel=False) == erk_densities(MLP, 0.2)
    got = erk_densities(CONV, 0.1, kernel=False)
    assert math.isclose(got["2"] / got["3"], (32 / 256) / (48 / 512))
    assert not math.isclose(got["1"], erk_densities(CONV, 0.1)["1"], rel_tol=1e-2)
    assert total(er()(sites_of(CONV), 0.1)) == total(erk()(sites_of(CONV), 0.1)) == whole(0.1, 7664)


def test_erk_edges() -> None:
    for shapes in (MLP, CONV, IFT):
        assert set(erk_densities(shapes, 1.0).values()) == {1.0}
        assert set(erk_densities(shapes, 0.0).values()) == {0.0}
        for value in erk_densities(shapes, 0.3, power=0).values():
            assert math.isclose(value, 0.3)
        # Below the first layer to reach 1, density_l is proportional to the density.
        low, high = erk_densities(shapes, 0.01), erk_densities(shapes, 0.02)
        assert all(math.isclose(2 * low[name], high[name]) for name in shapes)
    assert erk_densities({}, 0.5) == {}
    assert erk_densities({"empty": (0, 4), "b": (8, 8)}, 0.5) == {"empty": 1.0, "b": 0.5}
    assert erk_densities({"empty": (0, 4)}, 0.5) == {"empty": 1.0}
    assert erk_densities({"scalar": ()}, 0.5) == {"scalar": 0.5}


@QUICK
@given(
    shapes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=8),
    density=st.integers(0, 100).map(lambda percent: percent / 100),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
def test_erk_totals_are_exact_and_the_order_of_sites_is_not_heard(
    shapes: list[list[int]], density: float, power: float, data: st.DataObject
) -> None:
    sites = {}
    for number, shape in enumerate(shapes):
        # Group patterns: a unit is many entries, and not as many in every site.
        pattern: Pattern = data.draw(st.sampled_from([Unstructured(), Unstructured((0,)), Group((0,))]))
        sites[f"s{number}"] = Units(*pattern.grid(tuple(shape)), tuple(shape))
    target = whole(density, sum(site.total for site in sites.values()))
    mixed = dict(data.draw(st.permutations(list(sites.items()))))
    for budget in (erk(power), er(power), erk_plus({}, power), uniform):
        counts = budget(sites, density)
        assert list(counts) == list(sites)
        assert budget is uniform or total(counts) == target
        for name, count in counts.items():
            assert count.dtype == torch.int64 and len(count) == sites[name].groups
            assert 0 <= int(count.min()) and int(count.max()) <= sites[name].units
            assert int(count.max()) - int(count.min()) <= 1
        other = budget(mixed, density)
        assert list(other) == list(mixed) and all(torch.equal(counts[name], other[name]) for name in sites)


def test_erk_with_groups_of_entries_counts_units() -> None:
    # 110 units of 10 and 1000 entries: a mean over entries would keep 58 units, not 55.
    sites = {"a": Units(1, 100, (100, 10)), "b": Units(1, 10, (10, 1000))}
    assert total(erk()(sites, 0.5)) == 55


def test_erk_plus_keeps_what_is_stated() -> None:
    sites = sites_of(MLP)
    counts = erk_plus({"3": 1.0})(sites, 0.1)
    assert int(counts["3"]) == 1000 and total(counts) == whole(0.1, 266_200)
    free = erk_densities({name: MLP[name] for name in ("1", "2")}, (26_620 - 1000) / 265_200)
    assert all(abs(int(counts[name]) - free[name] * math.prod(MLP[name])) <= 1 for name in free)
    stated = {"a": units((101,)), "b": units((64, 64)), "c": units((64, 8))}
    assert int(erk_plus({"a": 0.5})(stated, 0.3)["a"]) == whole(0.5, 101) == 50
    everything = erk_plus({"a": 1.0, "b": 0.0, "c": 0.0})(stated, 101 / 4709)
    assert plain(everything) == {"a": [101], "b": [0], "c": [0]}


def test_infeasible_stated_densities_are_refused_with_the_least_feasible() -> None:
    sites = sites_of({"a": (50, 1), "b": (50, 1)})
    with pytest.raises(BadInput, match=r"stated densities keep 50 of 100 units.*ask 0\.5 or more"):
        erk_plus({"a": 1.0})(sites, 0.4)
    with pytest.raises(BadInput, match="stated densities keep 10"):
        erk_plus({"a": 0.2})(sites, 0.9)  # the other 50 cannot make 80
    with pytest.raises(BadInput, match="no site named c"):
        erk_plus({"c": 1.0})(sites, 0.5)
    with pytest.raises(BadInput, match="a: a density lies in"):
        erk_plus({"a": 1.5})(sites, 0.9)


# --- one ranking


def ranked(scores: Mapping[str, Tensor], density: float) -> dict[str, list[int]]:
    """Brute force: concatenate (in the order of names), sort by (-score, place), count per group."""
    entries = [
        (-float(value), name, group)
        for name in sorted(scores)
        for group, row in enumerate(scores[name].double().tolist())
        for value in row
    ]
    order = sorted(range(len(entries)), key=lambda place: (entries[place][0], place))
    counts = {name: [0] * len(scores[name]) for name in scores}
    for place in order[: whole(density, len(entries))]:
        _, name, group = entries[place]
        counts[name][group] += 1
    return counts


def scored(scores: Mapping[str, Tensor]) -> dict[str, Units]:
    return {n: Units(len(s), s.shape[1], tuple(s.shape), (lambda s=s: s)) for n, s in scores.items()}


@settings(QUICK, max_examples=150)
@given(
    widths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    values=st.sampled_from(
        [[0.0, -0.0], [0.0, -0.0, 1.0, -1.0, INF, -INF, 5e-324], [0.1, 0.1 + 2**-56, -0.1, 1e300, -1e300], [7.0]]
    ),
    density=st.integers(0, 20).map(lambda twentieth: twentieth / 20),
    data=st.data(),
)
def test_global_is_one_ranking_over_all_sites(
    widths: list[tuple[int, int]], dtype: torch.dtype, values: list[float], density: float, data: st.DataObject
) -> None:
    scores = {}
    for number, (rows, columns) in enumerate(widths):
        drawn = data.draw(st.lists(st.sampled_from(values), min_size=rows * columns, max_size=rows * columns))
        scores[f"s{number}"] = torch.tensor(drawn, dtype=torch.float64).to(dtype).reshape(rows, columns)
    counts = global_(scored(scores), density)
    assert plain(counts) == ranked(scores, density)
    mixed = dict(data.draw(st.permutations(list(scores.items()))))
    assert plain(global_(scored(mixed), density)) == plain(counts)


def test_global_on_many_close_scores() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = {f"s{i}": torch.randn(50, 40, generator=rng, dtype=torch.float64) * 10.0**-i for i in range(3)}
    for density in (0.001, 0.37, 0.999):
        assert plain(global_(scored(scores), density)) == ranked(scores, density)


def test_global_masks_are_the_best_entries_of_all() -> None:
    scores = {"a": torch.tensor([[3.0, 1, 2]]), "b": torch.tensor([[9.0, 0], [1, 1]])}
    counts = global_(scored(scores), 4 / 7)
    assert plain(counts) == {"a": [3], "b": [1, 0]}  # 9 3 2 and, of the three 1s, the first
    assert select(scores["b"], Unstructured((0,)), counts["b"]).indices().tolist() == [0]


def test_global_refuses_nan_and_missing_scores() -> None:
    with pytest.raises(BadInput, match="NaN"):
        global_(scored({"a": torch.tensor([[math.nan, 1.0]])}), 0.5)
    with pytest.raises(BadInput, match="needs scores"):
        global_({"a": units((4,))}, 0.5)
    assert plain(global_({}, 0.5)) == {}
    assert plain(global_(scored({"a": torch.zeros(0, 4), "b": torch.ones(1, 2)}), 0.5)) == {"a": [], "b": [1]}


# --- owl


def owl_sites(shares: Mapping[str, float], shape: tuple[int, ...] = (8, 33)) -> dict[str, Units]:
    return {
        f"{block}.{part}": units(shape, 8, facts={"outliers": share, "block": int(block)})
        for block, share in shares.items()
        for part in ("q", "up")
    }


def test_owl_densities_by_hand() -> None:
    # r = (0, 0.08, 0.16), mean 0.08: densities 0.42, 0.5, 0.58
    got = owl_densities({"a": 1.0, "b": 2.0, "c": 3.0}, dict.fromkeys("abc", 100), 0.5, 0.08)
    assert {block: round(density, 12) for block, density in got.items()} == {"a": 0.42, "b": 0.5, "c": 0.58}
    # weighted by size: the small block's lift costs the large one little
    got = owl_densities({"a": 1.0, "b": 3.0}, {"a": 300, "b": 100}, 0.5, 0.1)
    assert math.isclose(got["a"], 0.45) and math.isclose(got["b"], 0.65)


def test_owl_exact_checks_of_the_sheet() -> None:
    shares = {"0": 0.5, "1": 4.0, "2": 1.5, "3": 1.5}
    sites = owl_sites(shares)
    size = sum(site.total for site in sites.values())
    for density in (0.3, 0.5, 0.77):
        assert set(owl_densities(shares, dict.fromkeys(shares, 5), density, 0.0).values()) == {density}
        counts = owl(0.08)(sites, density)
        assert total(counts) == whole(density, size)
        share = {b: sum(int(counts[f"{b}.{part}"].sum()) for part in ("q", "up")) for b in shares}
        assert share["1"] > share["2"] > share["0"] and abs(share["2"] - share["3"]) <= 2
        even = owl(0.0)(sites, density)
        assert total(even) == whole(density, size)
        assert all(abs(int(count.sum()) - density * 264) <= 1 for count in even.values())
        mixed = dict(reversed(sites.items()))
        assert {name: counts[name].tolist() for name in mixed} == plain(owl(0.08)(mixed, density))
    equal = owl_sites(dict.fromkeys(shares, 2.0))
    assert all(abs(int(count.sum()) - 132) <= 1 for count in owl(0.08)(equal, 0.5).values())


def test_owl_counts_of_unequal_blocks_come_to_the_whole_to_the_entry() -> None:
    """The mean weighted by size is the density asked, after rounding too, however unlike the blocks are."""
    shapes = {"0": (8, 33), "1": (8, 5), "2": (8, 301), "3": (8, 1)}
    sites = {
        f"{block}.{part}": units(shape, 8, facts={"outliers": float(3 * int(block) % 4), "block": int(block)})
        for block, shape in shapes.items()
        for part in ("q", "up")
    }
    size = sum(site.total for site in sites.values())
    for density in (0.3, 1 / 3, 0.5, 0.77, 0.9):
        for spread in (0.0, 0.05, 0.08):
            assert total(owl(spread)(sites, density)) == whole(density, size)


def test_owl_refuses() -> None:
    with pytest.raises(BadInput, match=r"owl asks density 1\.0.* of block b"):
        owl_densities({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 0.97, 0.08)
    with pytest.raises(BadInput, match=r"owl asks density -0\.0.* of block a"):
        owl_densities({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 0.05, 0.08)
    with pytest.raises(BadInput, match="a: no outlier share"):
        owl()({"a": units((4,))}, 0.5)


def test_the_named_budgets_say_what_they_need() -> None:
    assert {name: budget.needs_scores for name, budget in BUDGETS.items() if budget.needs_scores} == {"global": True}
    assert BUDGETS["owl"].needs_facts == ("outliers", "block")
