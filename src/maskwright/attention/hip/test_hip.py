"""The sheet's exact checks of HiP."""

import copy
from math import ceil, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention import AttentionSite, Causal, Padding, State, Window, attend, use
from maskwright.attention.hip import Hip
from maskwright.attention.hip.search import Search, segments
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama

BARE = {"window": 0, "sink": 0, "dense_layers": 0}


def site_of(q, k, first=None, structure=None, **told):
    structure = structure or Causal()
    if first is not None:
        structure = structure & Padding(first, torch.full_like(first, k.shape[2]))
    offset = k.shape[2] - q.shape[2]
    return AttentionSite(0, 4, q, k, k, q.shape[-1] ** -0.5, structure, offset, offset == 0, first=first, **told)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def searched(scores, n, block=1, representative="first"):
    """The blocks found for one row whose q.k are `scores`."""
    k = torch.as_tensor(scores, dtype=torch.float64).view(1, 1, -1, 1)
    at, limit = torch.tensor([[[k.shape[2] - 1]]]), torch.tensor([[k.shape[2]]])
    found = Search(n, block, representative)(torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), k, at, limit)
    return found.starts[0, 0, 0, : int(found.counts)].tolist(), int(found.scored)


def brute(q, k, n, b, limit, at):
    """The search for one query block, written with lists: q (rows, width) at positions `at`, k (keys, width)."""
    blocks = ceil(limit / b)
    if limit <= n * b:
        return list(range(blocks))
    parts = [(blocks * i // n, blocks * (i + 1) // n - blocks * i // n) for i in range(n)]

    def score(part):
        keys = range(part[0] * b, min(part[0] * b + b, len(k)))
        return max([float(q[i] @ k[j]) for i in range(len(q)) for j in keys if j <= at[i]], default=-torch.inf)

    while max(size for _, size in parts) > 1:
        halves = [half for s, z in parts for half in ((s, z // 2), (s + z // 2, z - z // 2)) if half[1]]
        assert sum(z for _, z in halves) == sum(z for _, z in parts)
        best = sorted(range(len(halves)), key=lambda i: (-score(halves[i]), i))[:n]
        parts = [halves[i] for i in sorted(best)]
    return [s for s, _ in parts]


def test_monotone_scores_find_the_exact_top():
    assert searched(range(16), 4) == ([12, 13, 14, 15], 4 * 3)
    assert searched([-j for j in range(16)], 4)[0] == [0, 1, 2, 3]


def test_scores_constant_inside_the_first_segments_give_the_exact_top():
    # Distinct segments of 8 blocks: the best one's blocks are all found, as exact top-8 would.
    for seed in range(5):
        level = randn(8, seed=seed).repeat_interleave(8)
        assert searched(level, 8)[0] == sorted(torch.topk(level, 8).indices.tolist())


def test_constant_scores_tie_to_the_lower_index():
    assert searched([1.0] * 32, 4)[0] == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 99))
def test_the_oracle_is_exact_top_k_and_evaluations_are_bounded(keys, n, seed):
    scores = randn(keys, seed=seed)
    want = sorted(torch.topk(scores, min(n, keys)).indices.tolist())
    assert searched(scores, n, representative="max")[0] == want
    for representative in ("first", "center"):
        starts, scored = searched(scores, n, representative=representative)
        assert starts == sorted(set(starts)) and len(starts) == min(n, keys) and starts[-1] < keys
        assert scored <= 2 * n * (max(ceil(log2(ceil(keys / n))), 0) + 1)


@given(st.integers(0, 300), st.integers(1, 40))
def test_segments_cover_all_blocks(blocks, n):
    start, size = segments(torch.tensor([blocks]), n)
    assert int(size.sum()) == blocks
    assert [j for s, z in zip(start[0].tolist(), size[0].tolist(), strict=True) for j in range(s, s + z)] == list(
        range(blocks)
    )


@pytest.mark.parametrize("method", [
    Hip(mask_k=8, block_q=4, block_k=2, window=3, sink=1, dense_layers=0, judges=4),
    Hip(mask_k=12, block_q=8, block_k=3, window=0, sink=0, dense_layers=0, judges=8),
    Hip(mask_k=6, block_q=8, block_k=1, window=20, sink=3, dense_layers=0, judges=2),
    Hip(mask_k=8, block_q=4, block_k=2, window=3, sink=2, dense_layers=0, judges=3, dense_queries=17),
])  # fmt: skip
@pytest.mark.parametrize("first", [None, (0, 5)])
def test_plan_against_brute_force(method, first):
    q, k = randn(2, 4, 61, 8), randn(2, 2, 61, 8, seed=1)
    first = None if first is None else torch.tensor(first)
    plan = method.plan(site_of(q, k, first), State())
    plan.pieces.check()
    got = plan.dense().expand(2, 4, -1, -1)
    stride = method.block_q // min(method.judges, method.block_q)
    for b, h in ((0, 0), (1, 3)):
        shift = 0 if first is None else int(first[b])
        for low in range(0, 61, method.block_q):
            high = min(low + method.block_q, 61)
            limit = max(high - shift - method.window, 0)
            rows = [max(high - 1 - stride * i, low) for i in range(min(method.judges, method.block_q))]
            if low - shift < method.dense_queries:
                want = set(range(61))
            else:
                found = brute(q[b, h, rows], k[b, h // 2, shift:], method.mask_k // method.block_k, method.block_k, limit,
                              [i - shift for i in rows])  # fmt: skip
                want = {shift + s * method.block_k + j for s in found for j in range(method.block_k)}
                want |= set(range(shift, shift + method.sink))
                want |= set(range(max(low + 1 - method.window, shift), high) if method.window else [])
                want |= set(range(shift, high)) if limit <= method.mask_k else set()
            for i in range(max(low, shift), high):
                assert set(got[b, h, i].nonzero().flatten().tolist()) == {j for j in want if shift <= j <= i}, (b, h, i)


def test_enough_keys_are_dense_attention():
    q, k = randn(1, 4, 50, 8), randn(1, 2, 50, 8, seed=1)
    site = site_of(q, k)
    for method in (Hip(mask_k=52, block_k=2, **BARE), Hip(mask_k=8, dense_layers=1), Hip(mask_k=8, block_k=2, window=50)):
        assert torch.allclose(attend(q, k, k, method.plan(site, State())), attend(q, k, k, site.dense()), atol=1e-5)


def test_dense_queries_by_the_codes_rule():
    site = site_of(randn(1, 1, 64, 4), randn(1, 1, 64, 4))
    told = {"mask_k": 4, "block_q": 1, "block_k": 1, "dense_queries": None}
    counts = Hip(**told, **BARE).plan(site, State()).dense()[0, 0].sum(-1)
    first = 3 * (4 * 3 + 4)
    assert counts[:first].tolist() == list(range(1, first + 1)) and set(counts[first:].tolist()) == {4}


def test_a_decoding_list_is_kept_for_refresh_steps_and_refresh_1_is_recomputed_each_step():
    q, k = randn(1, 2, 60, 8), randn(1, 2, 60, 8, seed=1)
    for refresh in (1, 4):
        method = Hip(mask_k=8, block_q=4, block_k=2, window=4, sink=1, dense_layers=0, refresh=refresh)
        state, made = State(), []
        for keys in range(40, 52):
            site = site_of(q[:, :, keys - 1 : keys], k[:, :, :keys])
            got, fresh = method.plan(site, state).dense(), method.plan(site, State()).dense()
            assert got[0, 0, 0, keys - 4 :].all() and got[0, 0, 0, 0]
            made.append(torch.equal(got, fresh))
            old = 0 if refresh == 1 else (keys - 40) % refresh
            base = method.plan(site_of(q[:, :, keys - 1 - old : keys - old], k[:, :, : keys - old]), State()).dense()
            base = torch.cat([base, torch.ones(1, 2, 1, old, dtype=torch.bool)], -1)
            assert torch.equal(got, base)
        assert all(made) if refresh == 1 else made[0] and made[4] and made[8]


def test_a_models_own_window_and_an_evicted_cache_stay_as_they_are():
    q = randn(1, 2, 40, 8)
    method = Hip(mask_k=4, block_k=2, **BARE)
    site = site_of(q, q, structure=Causal() & Window(9))
    assert torch.equal(method.plan(site, State()).dense(), site.dense().dense())
    site = site_of(q[:, :, :1], q, evicted=True)
    assert method.plan(site, State()).pieces is None


def test_bad_settings_and_scores_are_refused():
    for told in ({"mask_k": 10, "block_k": 4}, {"mask_k": 0}, {"window": -1}, {"refresh": 0}, {"representative": "last"},
                 {"dense_queries": -1}):  # fmt: skip
        with pytest.raises(BadInput, match="hip"):
            Hip(**told)
    q = randn(1, 1, 40, 4)
    q[0, 0, 30:] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        Hip(mask_k=4, block_q=4, block_k=2, **BARE).plan(site_of(q, randn(1, 1, 40, 4)), State())


def test_a_tiny_llama_generates_and_a_copied_cache_copies_the_list():
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    x = torch.randint(0, 64, (2, 40))
    with torch.inference_mode():
        want = model.generate(x, max_new_tokens=4, do_sample=False)
        with use(model, Hip(mask_k=64, block_k=2, **BARE)):
            assert torch.equal(want, model.generate(x, max_new_tokens=4, do_sample=False))
        with use(model, Hip(mask_k=8, block_q=4, block_k=2, window=4, sink=1, dense_layers=1, refresh=4)):
            cache = model(x, use_cache=True).past_key_values
            one = [model(x[:, i : i + 1], past_key_values=cache).logits for i in range(3)][-1]
            other = copy.deepcopy(cache)
            assert torch.equal(model(x[:, :1], past_key_values=cache).logits, model(x[:, :1], past_key_values=other).logits)
            assert one.isfinite().all()
