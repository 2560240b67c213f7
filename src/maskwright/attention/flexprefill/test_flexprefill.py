from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskwright.attention import AttentionSite, Causal, Padding, State, attend, use
from maskwright.attention.flexprefill import FlexPrefill
from maskwright.attention.flexprefill.blocks import covering, divergence
from maskwright.attention.scores import last_attention
from maskwright.attention.slashes import slash_pieces
from maskwright.attention.vertical_slash import VerticalSlash
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama

SMALL = FlexPrefill(alpha=0.5, approximation_size=16, min_budget=64)


def site(n: int = 300, first: Tensor | None = None, heads: int = 4, kv: int = 2) -> AttentionSite:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (heads, kv, kv))
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, n))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, 0, first=first)


@pytest.mark.parametrize("alpha,count", [(0.65, 2), (0.5, 2), (0.49, 1), (0.8, 3), (0.0, 1)])
def test_counts_take_the_share_that_passes_alpha(alpha: float, count: int) -> None:
    assert int(covering(torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), alpha)) == count
    assert covering(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]), 0.5).tolist() == [2, 2]


@pytest.mark.parametrize("first", [None, torch.tensor([0, 70])])
def test_plan_is_the_brute_force_choice(first: Tensor | None) -> None:
    here = site(first=first)
    got = SMALL.plan(here, State()).pieces
    assert got is not None
    weights = last_attention(here.q, here.k, 16, here.scale, first=first)
    columns, slashes = torch.zeros(2, 2, 4, 300, dtype=torch.bool)
    for b in range(2):
        low = 0 if first is None else int(first[b])
        for h in range(4):
            column = weights[b, h].mean(0)
            slash = torch.tensor([weights[b, h].diagonal(284 - o).sum() / 16 for o in range(300 - low)])
            assert abs(float(column.sum()) - 1) < 1e-5 and abs(float(slash.sum()) - 1) < 1e-5
            for known, out, forced in (
                (column[low:], columns[b, h, low:], 4), (slash, slashes[b, h, : 300 - low], 64),
            ):  # fmt: skip
                count = max(64, int((known.sort(descending=True).values.cumsum(0) <= 0.5).sum()) + 1)
                share = known.clone()
                share[:forced] = torch.inf
                out[share.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(got.check().keep(), slash_pieces(columns, slashes).keep())


def test_equal_counts_are_vertical_slash() -> None:
    here = site()
    flex = FlexPrefill(alpha=0.0, approximation_size=16, min_budget=70).plan(here, State())
    fixed = VerticalSlash(70, 70, 16).plan(here, State())
    assert torch.equal(flex.dense(), fixed.dense())


@pytest.mark.parametrize("variant", ["frontier", "original"])
def test_a_budget_beyond_the_prompt_and_short_prompts_are_dense(variant: str) -> None:
    for n in (1, 3, 65, 300):
        here = site(n)
        method = FlexPrefill(alpha=1.0, min_budget=300, variant=variant, tau=1.0)  # type: ignore[arg-type]
        plan = method.plan(here, State())
        torch.testing.assert_close(
            attend(here.q, here.k, here.v, plan), attend(here.q, here.k, here.v, here.dense()), atol=1e-5, rtol=1e-4
        )


def test_divergence_is_that_of_jensen_and_shannon() -> None:
    one, two = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    mean = (one + two) / 2
    half = [sum(float(a * (a / m).log()) for a, m in zip(x, mean, strict=True) if a) for x in (one, two)]
    assert float(divergence(one, two)) == pytest.approx(sum(half) / 2, rel=1e-5)
    assert float(divergence(one, one)) == 0
    assert float(divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == pytest.approx(0.693147, rel=1e-5)


def test_original_takes_blocks_where_pooling_foretells_attention() -> None:
    here = site()
    frontier = SMALL.plan(here, State()).dense()
    never = FlexPrefill(0.5, 16, 64, "original", tau=0.0).plan(here, State()).dense()
    assert torch.equal(never, frontier)
    # Head 0: all queries equal, and all keys of a block equal: pooled attention is the true one. The others: noise.
    q, k = here.q.clone(), 5 * here.k
    q[:, 0] = q[:, 0, :1]
    k[:, 0] = torch.cat([k[:, 0, i : i + 1].expand(-1, min(64, 300 - i), -1) for i in range(0, 300, 64)], 1)
    made = AttentionSite(0, 1, q, k, here.v, here.scale, Causal(), 0)
    mixed = FlexPrefill(0.5, 16, 64, "original", tau=0.05).plan(made, State())
    assert mixed.pieces is not None
    kept, plain = mixed.pieces.check().keep(), FlexPrefill(0.5, 16, 64).plan(made, State()).pieces.keep()  # type: ignore[union-attr]
    assert torch.equal(kept[:, 2:], plain[:, 2:]) and not torch.equal(kept[:, 0], plain[:, 0])
    blocks = kept[0, 0, :, :256].unflatten(-1, (4, 64))
    assert torch.equal(blocks.any(-1), blocks.all(-1))  # whole blocks
    # The blocks: softmax of pooled scores over rows' blocks, sorted over all rows together.
    pooled_q, pooled_k = (torch.stack([x[0, 0, i : i + 64].mean(0) for i in range(0, 300, 64)]) for x in (made.q, made.k))
    weight = (pooled_q @ pooled_k.T * made.scale).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) / 5
    count = int((weight.flatten().sort(descending=True).values.cumsum(0) <= 0.5).sum()) + 1
    weight[:, 0] = weight.diagonal()[:] = torch.inf  # type: ignore[assignment]
    want = torch.zeros(25, dtype=torch.bool)
    want[weight.flatten().sort(descending=True, stable=True).indices[: max(count, 9)]] = True
    assert torch.equal(blocks.any(-1), want.view(5, 5)[:, :4])


def test_original_with_padding_sees_no_padding() -> None:
    here = site(first=torch.tensor([0, 130]))
    plan = FlexPrefill(0.5, 16, 64, "original", tau=1.0).plan(here, State())
    assert plan.pieces is not None
    plan.pieces.check()
    seen = plan.dense().expand(2, 4, 300, 300)
    assert not bool(seen[1, :, :, :130].any())
    own = seen.diagonal(dim1=2, dim2=3)
    assert bool(own[0].all()) and bool(own[1, :, 130:].all())


def test_later_calls_are_dense_and_bad_settings_refused() -> None:
    here = site()
    later = AttentionSite(0, 1, here.q[:, :, -90:], here.k, here.v, here.scale, Causal(), 210, begins=False)
    assert SMALL.plan(later, State()).pieces is None
    for bad in (
        {"alpha": 1.5}, {"alpha": -0.1}, {"tau": 2.0}, {"min_budget": 63}, {"approximation_size": 0}, {"variant": "both"},
    ):  # fmt: skip
        with pytest.raises(BadInput, match="flexprefill"):
            FlexPrefill(**bad)
    here.q[0, 0, -1, 0] = torch.nan
    with pytest.raises(BadInput, match="flexprefill, layer 0"):
        SMALL.plan(here, State())


@torch.no_grad()
@pytest.mark.parametrize("variant", ["frontier", "original"])
def test_in_a_model_a_padded_neighbour_changes_nothing(variant: str) -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    words = torch.randint(2, 64, (2, 200), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(words)
    real[1, :60] = 0
    with use(model, FlexPrefill(0.2, 16, 64, variant, tau=0.5)):  # type: ignore[arg-type]
        both = model.generate(words, attention_mask=real, max_new_tokens=5)
        assert torch.equal(both[:1], model.generate(words[:1], attention_mask=real[:1], max_new_tokens=5))
