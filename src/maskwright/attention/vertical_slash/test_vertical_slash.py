from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.attention import AttentionSite, Causal, KeyPlan, Padding, State, Window, attend
from maskwright.attention.scores import (
    block_means,
    column_peak,
    column_sum,
    last_attention,
    real_span,
    slash_sum,
    window_scores,
)  # fmt: skip
from maskwright.attention.slashes import slash_pieces
from maskwright.attention.vertical_slash import VerticalSlash
from maskwright.core.errors import BadInput

SMALL = VerticalSlash(vertical_size=8, slash_size=66, approximation_size=16)


def site(
    n: int = 200, heads: int = 4, kv: int = 2, first: Tensor | None = None, batch: int = 2, seed: int = 0
) -> AttentionSite:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, 8, generator=g) for h in (heads, kv, kv))
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, n))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, 0, first=first)


def scan(columns: Tensor, distances: Tensor) -> Tensor:
    """MInference's scan in words of its own, one head: (row blocks, keys)."""
    n, far = len(columns), sorted(distances.nonzero().flatten().tolist(), reverse=True)
    keep = torch.zeros(-(-n // 64), n, dtype=torch.bool)
    for g in range(len(keep)):
        limit = 64 * g + 64
        ends = [max(limit - o, 64) for o in far if o < limit]
        ranges = [[ends[0] - 64, ends[0]]]
        for end in ends[1:]:
            if end > ranges[-1][1] + 64:
                ranges.append([end - 64, end])
            elif end > ranges[-1][1]:
                ranges[-1][1] += 64
        for start, stop in ranges:
            keep[g, start:stop] = True
        keep[g] |= columns
        keep[g, limit:] = False
    return keep


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 400), st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.integers(0, 99)
)
def test_lists_are_those_of_the_scan(n: int, columns: float, distances: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    column, distance = (torch.rand(1, 2, n, generator=g) < share for share in (columns, distances))
    distance[..., 0] = True
    kept = slash_pieces(column, distance).check().keep()[0]
    for h in range(2):
        assert torch.equal(kept[h], scan(column[0, h], distance[0, h]))


@pytest.mark.parametrize(
    "kept,runs",  # of the rows 256..319: a kept distance o asks for the tile ending at 320 - o
    [
        ([0, 100, 170], [(86, 150), (156, 220), (256, 320)]),  # more than a tile apart: begun anew, at no multiple of 64
        ([0, 140, 141], [(115, 243), (256, 320)]),  # one key further lengthens by a whole tile: 63 keys too many
        (
            [0, 140, 200, 204],
            [(52, 180), (256, 320)],
        ),  # ends 116, 120, 180: the second lengthens to 180, the third adds nothing
    ],
)
def test_tiles_of_one_row_block(kept: list[int], runs: list[tuple[int, int]]) -> None:
    distance = torch.zeros(1, 1, 320, dtype=torch.bool)
    distance[..., kept] = True
    lists = slash_pieces(torch.zeros_like(distance), distance)
    last = slice(int(lists.offsets[-2]), None)
    assert list(zip(lists.starts[last].tolist(), lists.stops[last].tolist(), strict=True)) == runs


def test_single_weight_has_one_distance_and_sums_agree() -> None:
    here = site(50)
    weights = last_attention(here.q, here.k, 16, here.scale)
    column, slash, peak = window_scores(here, 16, column_sum, slash_sum, column_peak)
    torch.testing.assert_close(column, weights.sum(2))
    torch.testing.assert_close(peak, weights.amax(2))
    want = torch.zeros_like(slash)
    for i in range(16):
        for j in range(35 + i):
            want[:, :, 34 + i - j] += weights[:, :, i, j]
    torch.testing.assert_close(slash, want)
    torch.testing.assert_close(column.sum(-1), torch.full((2, 4), 16.0))
    torch.testing.assert_close(slash.sum(-1), torch.full((2, 4), 16.0))
    one, out = torch.zeros(3, 10), torch.zeros(7)  # 3 rows of 7 keys: 2 zeros before them and 1 behind
    one[1, 2 + 4] = 1.0  # row 4 + 1, key 4
    slash_sum(out, one, 2, 4)
    assert out.tolist() == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("last", [40, 33])
def test_scores_of_padded_samples_are_those_of_the_sample_alone(last: int) -> None:
    whole = site(40)
    first, stop = torch.tensor([0, 11]), torch.tensor([40, last])
    q, k = whole.q, whole.k
    padded = AttentionSite(0, 1, q, k, k, whole.scale, Causal() & Padding(first, stop), 0, first=first)
    alone = AttentionSite(0, 1, q[1:, :, 11:last], k[1:, :, 11:last], k[1:, :, 11:last], whole.scale, Causal(), 0)
    for score, want in zip(
        window_scores(padded, 32, column_sum, slash_sum), window_scores(alone, 32, column_sum, slash_sum), strict=True
    ):
        got = score[1, :, 11:last] if score is not None and not bool(score[1, :, :11].any()) else score[1, :, : last - 11]
        torch.testing.assert_close(got, want[0])
    plain = last_attention(q, k, 32, whole.scale, first=first, last=stop)
    torch.testing.assert_close(plain.sum(2), window_scores(padded, 32, column_sum)[0])
    assert [x.tolist() for x in real_span(padded)] == [[0, 11], [40, last]]
    means = block_means(k, 16, first, stop)
    torch.testing.assert_close(means[1, :, 0], k[1, :, 11:16].mean(1))
    torch.testing.assert_close(means[1, :, 2], k[1, :, 32:last].mean(1))


def test_scores_stay_inside_a_sliding_window() -> None:
    here = site(40)
    slid = AttentionSite(0, 1, here.q, here.k, here.v, here.scale, Causal() & Window(8), 0)
    column, slash = window_scores(slid, 16, column_sum, slash_sum)
    assert not bool(slash[..., 8:].any()) and not bool(column[..., :17].any())
    torch.testing.assert_close(column.sum(-1), torch.full((2, 4), 16.0))


@pytest.mark.parametrize("first", [None, torch.tensor([0, 70])])
def test_plan_is_the_brute_force_mask(first: Tensor | None) -> None:
    here = site(first=first)
    plan = SMALL.plan(here, State())
    assert plan.pieces is not None
    kept = plan.pieces.check().keep()
    begin = [0, 0] if first is None else first.tolist()
    weights = last_attention(here.q, here.k, 16, here.scale, first=first)
    for b in range(2):
        for h in range(4):
            low, n = begin[b], 200 - begin[b]
            column = weights[b, h].sum(0).clone()
            column[:low], column[low : low + 4] = -torch.inf, torch.inf
            slash = torch.tensor([weights[b, h].diagonal(184 - o).sum() for o in range(n)])
            slash[:64] = torch.inf
            columns, slashes = (torch.zeros(200, dtype=torch.bool) for _ in range(2))
            columns[column.sort(descending=True, stable=True).indices[:8]] = True
            slashes[slash.sort(descending=True, stable=True).indices[:66]] = True
            assert torch.equal(kept[b, h], scan(columns, slashes))
    seen = plan.within(here.structure).dense()
    own = seen.expand(2, 4, 200, 200).diagonal(dim1=2, dim2=3)
    assert all(bool(own[b, :, begin[b] :].all()) and not bool(seen[b, :, :, : begin[b]].any()) for b in range(2))


@pytest.mark.parametrize("sizes", [(4, 200), (200, 64), (1000, 1000)])
def test_all_columns_or_all_distances_are_dense(sizes: tuple[int, int]) -> None:
    here = site()
    plan = VerticalSlash(sizes[0], sizes[1], 16).plan(here, State())
    torch.testing.assert_close(attend(here.q, here.k, here.v, plan), attend(here.q, here.k, here.v, here.dense()))


@pytest.mark.parametrize("n", [1, 3, 63, 65])
def test_short_prompts_cut_the_sizes(n: int) -> None:
    here = site(n)
    dense = attend(here.q, here.k, here.v, here.dense())
    torch.testing.assert_close(attend(here.q, here.k, here.v, VerticalSlash().plan(here, State())), dense)


def test_one_query_head_a_key_head_takes_the_same_path() -> None:
    here = site(heads=4, kv=2)
    k, v = (x.repeat_interleave(2, 1) for x in (here.k, here.v))
    apart = AttentionSite(0, 1, here.q, k, v, here.scale, here.structure, 0)
    assert torch.equal(SMALL.plan(here, State()).dense(), SMALL.plan(apart, State()).dense())


def test_decoding_and_further_chunks_are_dense() -> None:
    here = site()
    for rows in (1, 80):
        later = AttentionSite(0, 1, here.q[:, :, -rows:], here.k, here.v, here.scale, Causal(), 200 - rows, begins=False)
        plan = SMALL.plan(later, State())
        assert isinstance(plan, KeyPlan) and plan.pieces is None and plan.queries == rows


def test_what_is_refused() -> None:
    for settings_ in ({"vertical_size": 3}, {"slash_size": 63}, {"approximation_size": 0}):
        with pytest.raises(BadInput, match="vertical_slash"):
            VerticalSlash(**settings_)
    here = site()
    here.q[0, 1, -1, 0] = torch.nan
    with pytest.raises(BadInput, match=r"vertical_slash, layer 0: q \(2, 4, 200, 8\).*NaN"):
        SMALL.plan(here, State())
