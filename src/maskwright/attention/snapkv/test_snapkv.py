from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, Padding, Pieces, State, attend, use
from maskwright.attention.scores import last_attention
from maskwright.attention.snapkv import SnapKV
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama

SMALL = SnapKV(capacity=40, window=16, kernel=5, local=8, prefix=4)


def site(n: int = 120, heads: int = 4, kv: int = 2, first: Tensor | None = None) -> AttentionSite:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (heads, kv, kv))
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, n))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, 0, first=first)


def brute(weights: Tensor, capacity: int, low: int) -> list[int]:
    """Kept keys of one key head from the weights of its group (group, window, keys), in plain loops."""
    n = weights.shape[-1]
    plain = [float(weights[:, :, j].mean(0).sum()) if j >= low else 0.0 for j in range(n)]
    score = [sum(plain[max(j - 2, 0) : j + 3]) / 5 for j in range(n)]
    forced = {*range(low, low + 4), *range(n - 8, n)}
    order = sorted(range(low, n), key=lambda j: (j not in forced, -score[j], j))
    return sorted(order[:capacity])


@pytest.mark.parametrize("first", [None, torch.tensor([0, 50]), torch.tensor([3, 100])])
def test_kept_keys_are_those_of_the_loops(first: Tensor | None) -> None:
    here = site(first=first)
    keep = SMALL.evict(here, State())
    assert keep is not None and keep.shape == (2, 2, 120)
    weights = last_attention(here.q, here.k, 16, here.scale, first=first)
    for b in range(2):
        low = 0 if first is None else int(first[b])
        for h in range(2):
            assert keep[b, h].nonzero().flatten().tolist() == brute(weights[b, 2 * h : 2 * h + 2], 40, low)


def test_equal_weights_keep_the_lowest_keys() -> None:
    here = site(heads=2)
    flat = AttentionSite(0, 1, torch.zeros_like(here.q), here.k, here.v, here.scale, Causal(), 0)
    keep = SnapKV(capacity=40, window=1, kernel=1, local=8, prefix=4).evict(flat, State())
    assert keep is not None
    assert keep[0, 0].nonzero().flatten().tolist() == [*range(32), *range(112, 120)]


def test_a_prompt_within_the_capacity_keeps_all_and_plans_are_dense() -> None:
    assert SMALL.evict(site(40), State()) is None
    assert SnapKV().evict(site(1), State()) is None
    assert SMALL.plan(site(), State()).pieces is None


def test_the_order_of_kept_keys_does_not_matter() -> None:
    here = site(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    q = here.q[:, :, -1:]
    one = attend(q, here.k, here.v, Causal())
    torch.testing.assert_close(attend(q, here.k[:, :, order], here.v[:, :, order], Causal()), one)


def test_one_query_head_a_key_head_takes_the_same_path() -> None:
    here = site(heads=2)
    q = here.q.repeat_interleave(2, 1)  # a group of equal query heads has their common weights
    twice = AttentionSite(0, 1, q, here.k, here.v, here.scale, Causal(), 0)
    one, two = SMALL.evict(here, State()), SMALL.evict(twice, State())
    assert one is not None and two is not None and torch.equal(one, two)


def test_what_is_refused() -> None:
    for bad in ({"capacity": 12, "local": 8}, {"kernel": 4}, {"window": 0}, {"prefix": -1}, {"local": 0}):
        with pytest.raises(BadInput, match="snapkv"):
            SnapKV(**bad)
    here = site()
    here.k[1, 1, 3, 0] = torch.nan
    with pytest.raises(BadInput, match="snapkv, layer 0"):
        SMALL.evict(here, State())


WORDS = torch.randint(2, 64, (2, 200), generator=torch.Generator().manual_seed(0))
REAL = torch.ones_like(WORDS)
REAL[1, :60] = 0


@torch.no_grad()
def test_generate_keeps_a_quarter_of_the_cache_and_its_positions() -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    seen = []
    with use(model, SMALL) as run:
        hook = model.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, told: seen.append(told["position_ids"][0].tolist()), with_kwargs=True
        )
        out = model.generate(WORDS, attention_mask=torch.ones_like(WORDS), max_new_tokens=6, return_dict_in_generate=True)
        hook.remove()
        small = run.kv_bytes
    assert seen[1:] == [[200 + i] for i in range(5)]  # where a token stands, not how many keys are left
    layers = out.past_key_values.layers
    assert all(layer.keys.shape[2] == 45 and layer.get_seq_length() == 205 for layer in layers)
    with use(model, SnapKV(capacity=400, local=8)) as run:
        model.generate(WORDS, attention_mask=torch.ones_like(WORDS), max_new_tokens=6)
        assert run.kv_bytes > 4 * small


@torch.no_grad()
@pytest.mark.parametrize("real", [torch.ones_like(WORDS), REAL])
def test_generate_is_dense_where_the_budget_covers_the_prompt(real: Tensor) -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    dense = model.generate(WORDS, attention_mask=real, max_new_tokens=5)
    with use(model, SnapKV(capacity=200, window=16, local=8)):
        assert torch.equal(model.generate(WORDS, attention_mask=real, max_new_tokens=5), dense)


@dataclass(frozen=True)
class Hidden(AttentionMethod):
    """The same choice of keys, as a mask over a cache that keeps them all."""

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if site.begins:
            state["keep"] = SMALL.evict(site, state)
            return site.dense()
        keep = torch.nn.functional.pad(state["keep"], (0, site.keys - state["keep"].shape[2]), value=True)
        pieces = Pieces.from_keep(keep[:, :, None].expand(-1, -1, site.queries, -1), 1, site.queries)
        return KeyPlan(site.queries, site.keys, site.structure, pieces)


@torch.no_grad()
def test_an_evicted_cache_is_the_whole_one_behind_a_mask_and_a_copy_goes_its_own_way() -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    longer = torch.cat([REAL, torch.ones(2, 1, dtype=torch.long)], 1)
    where = longer.sum(1, keepdim=True) - 1
    at = (REAL.cumsum(1) - 1).clamp(min=0)
    logits = {}
    for method in (SMALL, Hidden()):
        with use(model, method):
            cache = model(WORDS, attention_mask=REAL, position_ids=at, use_cache=True).past_key_values
            copies = [cache, copy.deepcopy(cache)]
            for step, one in zip((torch.tensor([[5], [9]]), torch.tensor([[7], [3]])), copies, strict=True):
                out = model(step, attention_mask=longer, position_ids=where, past_key_values=one)
                logits.setdefault(type(method), []).append(out.logits)
            held = [layer.keys.shape[2] for one in copies for layer in one.layers]
            assert held == [41 if method is SMALL else 201] * 4
    for short, whole in zip(logits[SnapKV], logits[Hidden], strict=True):
        torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(*logits[SnapKV])
