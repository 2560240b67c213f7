"""Structures, pieces and plans against their booleans: brute force and properties."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright import Mask
from maskwright.attention import Anywhere, Causal, Document, KeyPlan, Padding, Pieces, Prefix, Rows, Sink, Window
from maskwright.attention.attend import as_plan
from maskwright.attention.structure import _tidy
from maskwright.core.errors import BadInput
from maskwright.kernels.block_attention.lower import hull, lower

IDS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
SEEN = {  # what a row standing at i may see, spelled out
    "causal": (Causal(), lambda i, j: j <= i),
    "anywhere": (Anywhere(), lambda i, j: True),
    "window": (Causal() & Window(3), lambda i, j: i - 3 < j <= i),
    "two-sided": (Window(2, 3), lambda i, j: i - 2 < j <= i + 3),
    "open": (Window(2, None), lambda i, j: i - 2 < j),
    "sink": (Causal() & (Window(2) | Sink(3)), lambda i, j: j <= i and (i - j < 2 or j < 3)),
    "sink and band": (Window(2, 1) | Sink(2), lambda i, j: i - 2 < j <= i + 1 or j < 2),
    "prefix": (Causal() | Prefix(5), lambda i, j: j <= i or j < 5),
    "document": (Causal() & Document(IDS), lambda i, j: j <= i and IDS[i] == IDS[j]),
    "nothing": (Causal() & Padding(torch.tensor([12]), torch.tensor([12])), lambda i, j: False),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("queries", [12, 5, 1])
def test_structures_are_what_they_say(name, queries):
    structure, rule = SEEN[name]
    want = torch.tensor([[bool(rule(12 - queries + i, j)) for j in range(12)] for i in range(queries)])
    assert torch.equal(structure.keep(queries, 12)[0, 0], want)
    bounds = structure.bounds(queries, 12)
    assert bounds.dtype == torch.int32 and (bounds[..., 0] <= bounds[..., 1]).all()
    assert (bounds[..., 0, 1] <= bounds[..., 1, 0]).all()
    kinds = structure.classify(4, 5, queries, 12)[0]
    for g, row in enumerate(kinds.tolist()):
        for b, kind in enumerate(row):
            tile = want[4 * g : 4 * g + 4, 5 * b : 5 * b + 5]
            assert kind == (2 if tile.all() else 1 if tile.any() else 0)


def test_padding_per_sample_and_per_head_and_what_is_refused():
    first = torch.tensor([[0, 3], [2, 5]])
    keep = (Causal() & Padding(first, torch.full_like(first, 6))).keep(6, 6)
    for b in range(2):
        for h in range(2):
            want = torch.tensor([[first[b, h] <= j <= i for j in range(6)] for i in range(6)])
            assert torch.equal(keep[b, h], want)
    with pytest.raises(BadInput, match="3 separate intervals"):
        (Rows(torch.tensor([[[[[0, 1], [3, 4], [6, 7]]]]])) & Anywhere()).bounds(1, 8, 0)
    with pytest.raises(BadInput, match="side by side"):
        Document(torch.tensor([0, 1, 0])).bounds(3, 3)
    with pytest.raises(BadInput, match="4 keys of 3"):
        Document(torch.zeros(4)).bounds(3, 3)
    for bad in (lambda: Window(0), lambda: Window(1, -1), lambda: Sink(-1)):
        with pytest.raises(BadInput):
            bad()


intervals = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@given(intervals)
@settings(max_examples=200, deadline=None)
def test_tidying_changes_no_key(parts):
    found = torch.tensor(parts)[None, None, None]
    tidy = _tidy(found)[0, 0, 0].tolist()
    assert {k for a, b in parts for k in range(a, b)} == {k for a, b in tidy for k in range(a, b)}
    assert all(a <= b for a, b in tidy) and all(one[1] <= two[0] for one, two in pairwise(tidy))


@st.composite
def grids(draw, heads=(1, 2, 3)):
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from(heads)), draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    seed, share = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@given(grids(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_pieces_hold_their_booleans(keep, rows):
    queries = keep.shape[2] * rows - rows // 2
    pieces = Pieces.from_keep(keep, rows, queries).check()
    assert torch.equal(pieces.keep(), keep) and torch.equal(pieces.lengths(), keep.sum(-1))
    nested = [[[_runs(group) for group in head] for head in batch] for batch in keep]
    again = Pieces.from_runs(nested, rows, queries, keep.shape[-1])
    assert all(torch.equal(getattr(pieces, n), getattr(again, n)) for n in ("offsets", "starts", "stops"))
    spread = pieces.expand(2, 6)
    assert torch.equal(spread.keep(), keep.expand(2, -1, -1, -1).repeat_interleave(6 // keep.shape[1], 1))
    assert torch.equal(pieces.split(1).keep(), keep.repeat_interleave(rows, 2)[:, :, :queries])


def _runs(group):
    on = [i for i, kept in enumerate(group.tolist()) if kept]
    starts = [i for i in on if i - 1 not in on]
    return [(a, next(i for i in range(a, len(group) + 1) if i not in on)) for a in starts]


@given(grids(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_union_and_intersection_of_pieces(keep, seed):
    other = torch.rand(1, 1, *keep.shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.4
    queries = keep.shape[2] * 3
    one, two = Pieces.from_keep(keep, 3, queries), Pieces.from_keep(other, 3, queries)
    assert torch.equal(one.union(two).check().keep(), keep | other)
    assert torch.equal(two.intersect(one).check().keep(), keep & other)


@given(grids(), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_block_grids_and_block_lists_give_the_same_pieces(keep, block):
    keys = keep.shape[-1] * block - block // 2
    one = Pieces.from_blocks(keep, 2, block, keep.shape[2] * 2, keys).check()
    want = keep.repeat_interleave(block, -1)[..., :keys]
    assert torch.equal(one.keep(), want)
    order = torch.sort(keep.to(torch.int8), dim=-1, descending=True, stable=True).indices
    two = Pieces.from_indices(order, keep.sum(-1), block, 2, keep.shape[2] * 2, keys).check()
    assert torch.equal(two.keep(), want)


def test_pieces_that_are_wrong_are_refused():
    with pytest.raises(BadInput, match=r"head 1, row group 0: run \[3, 3\)"):
        Pieces.from_runs([[[[(0, 2)]], [[(3, 3)]]]], 4, 4, 8)
    for runs in ([(2, 5), (4, 6)], [(2, 9)], [(5, 6), (1, 2)]):
        with pytest.raises(BadInput, match="row group 0"):
            Pieces.from_runs([[[runs]]], 4, 4, 8)
    with pytest.raises(BadInput, match="do not cover 9 queries"):
        Pieces.from_runs([[[[(0, 1)]]]], 4, 9, 8)
    with pytest.raises(BadInput, match="grid of 2 x 2"):
        Pieces.from_blocks(torch.ones(1, 1, 2, 3, dtype=torch.bool), 4, 4, 8, 8)
    one = Pieces.from_runs([[[[(0, 1)]]]], 4, 4, 8)
    with pytest.raises(BadInput, match="cannot be combined"):
        one.union(Pieces.from_runs([[[[(0, 1)]]]], 4, 4, 9))
    with pytest.raises(BadInput, match="do not spread"):
        Pieces.from_runs([[[[(0, 1)]]] * 2], 4, 4, 8).expand(1, 3)
    with pytest.raises(BadInput, match="cannot be split"):
        one.split(3)


@pytest.mark.parametrize("name", SEEN)
def test_the_hull_reads_every_key_a_group_may_see(name):
    structure, _ = SEEN[name]
    keep = structure.keep(12, 12)[0, 0]
    lists = hull(structure.bounds(12, 12), 4, 12, 12).check()
    for g in range(3):
        some = keep[4 * g : 4 * g + 4].any(0)
        assert not (some & ~lists.keep()[0, 0, g]).any()
    grid = torch.rand(1, 2, 3, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    cut = lower(12, 12, structure.bounds(12, 12), Pieces.from_keep(grid, 4, 12), torch.device("cpu"))
    assert torch.equal(cut.keep(), grid & lists.keep())


@given(grids(), st.sampled_from(["causal", "sink", "window", "two-sided", "nothing"]))
@settings(max_examples=80, deadline=None)
def test_counts_pictures_and_block_masks_agree_with_the_booleans(keep, name):
    queries, keys = 4 * keep.shape[2], keep.shape[-1]
    structure = SEEN[name][0]
    plan = KeyPlan(queries, keys, structure, Pieces.from_keep(keep, 4, queries))
    dense = plan.dense()
    kept, computed = plan.pairs()
    assert torch.equal(kept.expand(dense.shape[:2]), dense.sum((-1, -2)))
    assert (computed >= kept).all()
    q = torch.zeros(2, 6, queries, 8)
    back = KeyPlan.of_block_mask(plan.block_mask(q, block=4))
    assert torch.equal(
        back.dense().expand(2, 6, -1, -1), dense.expand(2, -1, -1, -1).repeat_interleave(6 // dense.shape[1], 1)
    )
    picture = plan.picture(2)
    size = -(-max(queries, keys) // 2)
    for i in range(picture.shape[2]):
        for j in range(picture.shape[3]):
            tile = dense[..., i * size : (i + 1) * size, j * size : (j + 1) * size].flatten(2).any(-1)
            assert not (tile & ~picture[..., i, j]).any()


def test_what_may_stand_for_a_plan_and_what_may_not():
    grid = torch.ones(1, 1, 2, 3, dtype=torch.bool).tril()
    plan = as_plan(Mask(grid), 8, 12, (4, 4))
    assert torch.equal(plan.dense(), grid.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert as_plan(Causal(), 4, 4).structure == Causal()
    with pytest.raises(BadInput, match="for 8 queries and 12 keys, the call has 8 and 13"):
        as_plan(plan, 8, 13)
    with pytest.raises(BadInput, match="not str"):
        as_plan("dense", 8, 8)
    with pytest.raises(BadInput, match="do not fit a plan"):
        KeyPlan(8, 11, None, plan.pieces)
    with pytest.raises(BadInput, match="at least 2"):
        KeyPlan(8, 8, levels=(1,))


def test_a_plan_within_a_structure_never_sees_more():
    causal = Causal()
    plan = KeyPlan(6, 6, Window(3, 2))
    assert torch.equal(plan.within(causal).dense(), plan.dense() & causal.keep(6, 6))
    assert KeyPlan(6, 6, causal & Window(3)).within(causal).structure == causal & Window(3)
    assert plan.within(None) is plan
