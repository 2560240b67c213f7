from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.attention import AttentionSite, Causal, Padding, State, use
from maskwright.attention.ada_snapkv import AdaSnapKV
from maskwright.attention.scores import last_attention
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama

SMALL = AdaSnapKV(capacity=40, min_head_capacity_ratio=0.4, window=16, kernel=5, local=8, prefix=4)


def site(n: int = 120, first: Tensor | None = None, seed: int = 0, kv: int = 2) -> AttentionSite:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (4, kv, kv))
    k = k * torch.arange(1, kv + 1).view(1, -1, 1, 1)  # heads of unlike sharpness
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, n))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, 0, first=first)


def brute(weights: Tensor, method: AdaSnapKV, low: int) -> list[list[int]]:
    """Kept keys of each key head from the weights of one sample (kv_heads, group, window, keys), in plain loops."""
    heads, n = weights.shape[0], weights.shape[-1]
    half = method.kernel // 2
    orders = []
    for h in range(heads):
        peak = [float(weights[h, :, :, j].max()) if j >= low else 0.0 for j in range(n)]
        worth = {j: sum(peak[max(j - half, 0) : j + half + 1]) / method.kernel for j in range(low, n)}
        worth |= dict.fromkeys([*range(low, low + method.prefix), *range(n - method.local, n)], torch.inf)
        orders.append(sorted(worth.items(), key=lambda pair: (-pair[1], pair[0])))
    floor = max(int(method.capacity * method.min_head_capacity_ratio), method.local + method.prefix)
    kept = [{j for j, _ in order[:floor]} for order in orders]
    rest = sorted((-worth, h, j) for h, order in enumerate(orders) for j, worth in order[floor:])
    for _, h, j in rest[: (method.capacity - floor) * heads]:
        kept[h].add(j)
    return [sorted(one) for one in kept]


@pytest.mark.parametrize("first", [None, torch.tensor([0, 50])])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_kept_keys_are_those_of_the_loops(first: Tensor | None, kv: int) -> None:
    here = site(first=first, kv=kv)
    keep = SMALL.evict(here, State())
    assert keep is not None
    weights = last_attention(here.q, here.k, 16, here.scale, first=first).unflatten(1, (kv, 4 // kv))
    for b in range(2):
        want = brute(weights[b], SMALL, 0 if first is None else int(first[b]))
        assert [keep[b, h].nonzero().flatten().tolist() for h in range(kv)] == want


@settings(max_examples=20, deadline=None)
@given(st.integers(13, 60), st.sampled_from([0.0, 0.2, 0.5, 0.95, 1.0]), st.integers(0, 40))
def test_lengths_sum_to_the_budget_and_no_head_falls_below_the_floor(capacity: int, ratio: float, seed: int) -> None:
    method = AdaSnapKV(capacity, ratio, window=16, kernel=5, local=8, prefix=4)
    keep = method.evict(site(70, seed=seed), State())
    assert keep is not None
    counts = keep.sum(-1)
    assert counts.sum(-1).eq(2 * capacity).all() and counts.ge(method.floor).all()
    if ratio == 1.0:
        assert counts.eq(capacity).all()
    assert keep[..., :4].all() and keep[..., -8:].all()


def test_heads_get_unequal_shares() -> None:
    counts = SMALL.evict(site(), State()).sum(-1)  # type: ignore[union-attr]
    assert (counts[:, 0] != counts[:, 1]).all()


def test_a_short_sample_of_a_batch_keeps_all_its_keys() -> None:
    keep = SMALL.evict(site(first=torch.tensor([0, 90])), State())
    assert keep is not None
    assert keep[1].sum(-1).tolist() == [30, 30] and not keep[1, :, :90].any() and int(keep[0].sum()) == 80
    assert SMALL.evict(site(40), State()) is None


def test_equal_weights_go_to_the_lower_head_then_the_lower_key() -> None:
    here = site()
    flat = AttentionSite(0, 1, torch.zeros_like(here.q), here.k, here.v, here.scale, Causal(), 0)
    keep = AdaSnapKV(20, 0.0, window=1, kernel=1, local=8, prefix=4).evict(flat, State())
    assert keep is not None
    assert keep[0, 0].nonzero().flatten().tolist() == [*range(20), *range(112, 120)]
    assert keep[0, 1].nonzero().flatten().tolist() == [*range(4), *range(112, 120)]


def test_what_is_refused_and_how_the_floor_is_rounded() -> None:
    for bad in (
        {"capacity": 68}, {"kernel": 4}, {"window": 0}, {"min_head_capacity_ratio": 1.1}, {"min_head_capacity_ratio": -0.1},
        {"local": 0}, {"prefix": -1},
    ):  # fmt: skip
        with pytest.raises(BadInput, match="ada_snapkv"):
            AdaSnapKV(**bad)
    assert AdaSnapKV(100, 0.29, local=8).floor == 29 and AdaSnapKV(1024, 0.2).floor == 204
    here = site()
    here.q[0, 0, -1, 0] = torch.nan
    with pytest.raises(BadInput, match="ada_snapkv, layer 0"):
        SMALL.evict(here, State())


@torch.no_grad()
def test_generate_with_ragged_heads() -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    words = torch.randint(2, 64, (2, 120), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(words)
    real[1, :30] = 0
    ask = {"attention_mask": real, "max_new_tokens": 5}
    dense = model.generate(words, **ask)
    with use(model, AdaSnapKV(120, 0.2, 16, 5, 8)):
        assert torch.equal(model.generate(words, **ask), dense)
    with use(model, SMALL) as run:
        both = model.generate(words, return_dict_in_generate=True, **ask)
        assert torch.equal(both.sequences[:1], model.generate(words[:1], max_new_tokens=5, attention_mask=real[:1]))
        alone = model.generate(words[1:, 30:], max_new_tokens=5, attention_mask=real[1:, 30:])
        cache = model(words, attention_mask=real, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        ask_one = {"attention_mask": torch.nn.functional.pad(real, (0, 1), value=1)}
        one, two = (model(words[:, :1], past_key_values=x, **ask_one).logits for x in (cache, twin))
    assert torch.equal(both.sequences[1, 120:], alone[0, 90:])  # padding changes nothing
    assert torch.equal(one, two)
    assert all(layer.keys.shape[2] < 80 and layer.get_seq_length() == 124 for layer in both.past_key_values.layers)
    assert run.kv_bytes > 0
