"""Samplers of the inputs place: exact counts, views that cover, regions in space; by brute force and properties."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs import Bands, Bernoulli, Blocks, Exact, Regions, Tubes, Views, salient

DENSITIES = st.integers(1, 99).map(lambda percent: percent / 100)


def rng(seed=0):
    return generator(seed, "test")


@pytest.mark.parametrize(
    ("units", "density", "kept"),
    [(100, 1 - 0.8, 20), (10, 1 - 0.9, 1), (196, 0.25, 49), (256, 0.25, 64), (49, 0.4, 20), (16, 0.4, 6), (64, 0.4, 26)],
)
def test_counts_have_no_float_traps(units, density, kept):
    mask = Exact(density)((3, units), rng=rng())
    assert mask.keep.sum(1).tolist() == [kept] * 3


@given(st.integers(1, 4), st.integers(1, 40), DENSITIES, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_sample_keeps_the_exact_count_or_is_refused(batch, tokens, density, seed):
    count = round(Fraction(str(density)) * tokens)
    if not count:
        with pytest.raises(BadInput, match="keeps none of the"):
            Exact(density)((batch, tokens), rng=rng(seed))
        return
    mask = Exact(density)((batch, tokens), rng=rng(seed)).check()
    assert mask.keep.sum(1).tolist() == [count] * batch
    assert mask.equal(Exact(density)((batch, tokens), rng=rng(seed)))


def test_samples_and_seeds_differ():
    mask = Exact(0.5)((2, 64), rng=rng())
    assert not torch.equal(*mask.keep) and not mask.equal(Exact(0.5)((2, 64), rng=rng(1)))


def test_bernoulli_keeps_each_entry_by_itself():
    mask = Bernoulli(0.3)((64, 1000), rng=rng())
    counts = mask.keep.sum(1).double()
    assert abs(counts.mean() - 300) < 4 * (1000 * 0.3 * 0.7 / 64) ** 0.5
    assert abs(counts.var() - 210) < 4 * 210 * (2 / 63) ** 0.5


def test_blocks_are_whole_and_counted():
    mask = Blocks(0.25, (2, 2))((3, 8, 6), rng=rng()).check()
    cells = mask.keep.unflatten(1, (4, 2)).unflatten(3, (3, 2))
    assert (cells == cells[:, :, :1, :, :1]).all()
    assert mask.keep.sum((1, 2)).tolist() == [3 * 4] * 3
    with pytest.raises(BadInput, match="not divisible"):
        Blocks(0.25, (2, 2))((1, 5, 6), rng=rng())


def test_tubes_last_all_of_the_time():
    mask = Tubes(0.5, (2, 1))((2, 5, 4, 3), rng=rng())
    assert (mask.keep == mask.keep[:, :1]).all() and mask.keep[:, 0].sum((1, 2)).tolist() == [6, 6]
    assert (mask.keep[:, :, 0::2] == mask.keep[:, :, 1::2]).all()
    with pytest.raises(BadInput, match="tubes lie in"):
        Tubes(0.5)((2, 4, 3), rng=rng())


@pytest.mark.parametrize(("along", "dim"), [("bins", 2), ("frames", 1)])
def test_bands_are_whole_bins_or_frames(along, dim):
    mask = Bands(0.25, along)((2, 8, 12), rng=rng())
    line = mask.keep.any(dim)
    assert torch.equal(line, mask.keep.all(dim))
    assert line.sum(1).tolist() == [2, 2] if along == "bins" else [3, 3]
    with pytest.raises(BadInput, match="'bins' or 'frames'"):
        Bands(0.25, "time")((2, 8, 12), rng=rng())


def test_forced_entries_stay_and_go():
    score = torch.zeros(2, 8)
    score[:, 5], score[:, 6] = torch.inf, -torch.inf
    for seed in range(9):
        keep = Exact(0.25)((2, 8), rng=rng(seed), score=score).keep
        assert keep[:, 5].all() and not keep[:, 6].any() and keep.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [Exact, Bernoulli, Blocks, Tubes, Bands, Views, Regions])
def test_a_density_outside_its_range_is_refused(kind, density):
    with pytest.raises(BadInput, match="density"):
        kind(density)


def test_shapes_without_batch_or_grid_are_refused():
    for shape in ((8,), (2, 0), (0, 8)):
        with pytest.raises(BadInput, match=r"\(batch, \*grid\)"):
            Exact(0.5)(shape, rng=rng())


# Views: the sheet's figures of disjoint masking.
def test_two_views_of_ten_tokens_by_hand():
    """L = 10, rho .6, pi 1: 4 visible, 6 hidden; union 10, intersection 2."""
    first, second = Views(0.4, 2, 1.0)((5, 10), rng=rng()).keep
    assert first.sum(1).tolist() == second.sum(1).tolist() == [4] * 5
    assert (~first | ~second).sum(1).tolist() == [10] * 5 and (~first & ~second).sum(1).tolist() == [2] * 5


def test_density_a_quarter_of_196():
    first, second = Views(0.25, 2, 1.0)((1, 196), rng=rng()).keep
    assert (first.sum(), second.sum(), (~first | ~second).sum(), (first & second).sum()) == (49, 49, 196, 0)


def test_half_gives_a_mask_and_its_complement():
    first, second = Views(0.5)((3, 4, 4), rng=rng()).keep
    assert torch.equal(first, ~second)


def test_a_cover_of_one_view_makes_the_views_the_same():
    first, second = Views(0.4, 2, 0.6)((3, 10), rng=rng()).keep
    assert torch.equal(first, second)


def test_views_of_blocks_are_whole_cells():
    keep = Views(0.4, 2, 1.0, (2, 2))((3, 8, 8), rng=rng()).check().keep
    cells = keep.unflatten(2, (4, 2)).unflatten(4, (4, 2))
    assert (cells == cells[:, :, :, :1, :, :1]).all()
    assert (keep.sum((2, 3)) == 4 * 6).all() and (~keep).any(0).all()  # round(16 * .4) = 6 cells


@given(st.integers(2, 30), DENSITIES, st.integers(1, 4), DENSITIES, st.integers(0, 2))
@settings(max_examples=120, deadline=None)
def test_views_cover_exactly_what_was_asked(tokens, density, n, cover, seed):
    hide, target = tokens - round(Fraction(str(density)) * tokens), round(Fraction(str(cover)) * tokens)
    if hide == tokens or not hide <= target <= min(tokens, n * hide):
        with pytest.raises(BadInput):
            Views(density, n, cover)((2, tokens), rng=rng(seed))
        return
    keep = Views(density, n, cover)((2, tokens), rng=rng(seed)).keep
    assert (keep.sum(2) == tokens - hide).all()
    assert (~keep).any(0).sum(1).tolist() == [target, target]


def test_three_views_prefer_what_none_has_hidden():
    keep = Views(0.7, 3, 0.9)((4, 10), rng=rng()).keep
    assert (keep.sum(2) == 7).all() and ((~keep).sum(0) <= 1).all()


def test_salient_keeps_the_best_of_each_sample_ties_low():
    score = torch.tensor([[1.0, 5.0, 5.0, 5.0], [9.0, 0.0, 1.0, 8.0]])
    assert salient(score, 0.5).keep.tolist() == [[False, True, True, False], [True, False, False, True]]
    with pytest.raises(BadInput, match="NaN"):
        salient(score * float("nan"), 0.5)
    with pytest.raises(BadInput, match="density"):
        salient(score, 0.0)


# Regions: boxes in space.
def cube(side=10):
    return torch.tensor(list(itertools.product(range(side), repeat=3)), dtype=torch.float32)


@pytest.mark.parametrize(("grid", "density", "gone"), [(4, 0.25, 48), (8, 0.25, 384)])
def test_boxes_are_counted_exactly(grid, density, gone):
    points = cube(16)
    mask, box = Regions(density, grid)(points, rng=rng())
    hidden = box[~mask.keep].unique()
    assert len(hidden) == gone and len(box.unique()) == grid**3
    assert not (set(hidden.tolist()) & set(box[mask.keep].tolist()))  # a box stays or goes whole


def test_the_released_borders_never_hide_first_and_last_values():
    """u = 0..9, G = 4: stride 2, borders 0, 2, 4, 6, 8; x = 0 and x = 9 lie in no box."""
    points = cube()
    _, box = Regions(0.25, 4, reference=True)(points, rng=rng())
    outside = ((points == 0) | (points == 9)).any(1)
    assert torch.equal(box == -1, outside)
    _, ours = Regions(0.25, 4)(points, rng=rng())
    assert (ours >= 0).all()
    x = ours // 16  # 0, 1, 2 | 3, 4 | 5, 6 | 7, 8, 9
    assert [sorted(set(points[x == part, 0].int().tolist())) for part in range(4)] == [[0, 1, 2], [3, 4], [5, 6], [7, 8, 9]]


def test_regions_follow_the_points_and_leave_other_scenes_alone():
    points, scene = torch.cat([cube(6), cube(6) + 100]), torch.arange(432) // 216
    before = points.clone()
    mask, box = Regions(0.5, 2)(points, scene, rng=rng())
    order = torch.randperm(432, generator=rng())
    again, shuffled = Regions(0.5, 2)(points[order], scene[order], rng=rng())
    assert torch.equal(mask.keep[order], again.keep) and torch.equal(box[order], shuffled)
    alone, _ = Regions(0.5, 2)(points[:216], rng=rng())
    assert torch.equal(alone.keep, mask.keep[:216]) and torch.equal(points, before)


def test_regions_refuse_what_has_no_boxes():
    flat = cube()
    flat[:, 2] = 1.0
    with pytest.raises(BadInput, match="scene 0: axis 2 has 1 different values, too few for a grid of 4"):
        Regions(0.25, 4)(flat, rng=rng())
    broken = cube()
    broken[7, 1] = float("nan")
    with pytest.raises(BadInput, match="point 7 of 1000"):
        Regions()(broken, rng=rng())
    with pytest.raises(BadInput, match=r"n at least 1, got .* \(0, 3\)"):
        Regions()(torch.zeros(0, 3), rng=rng())
    with pytest.raises(BadInput, match="coordinates"):
        Regions()(cube()[:, :2], rng=rng())
    with pytest.raises(BadInput, match="keeps none"):
        Regions(0.01, 2)(cube(), rng=rng())
