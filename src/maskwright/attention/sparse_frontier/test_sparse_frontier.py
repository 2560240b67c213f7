"""The frontier's counts, guarantee and sweep, on hand-made numbers and a tiny model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention import Causal, Sink, Window
from maskwright.attention.sparse_frontier import (
    Policy,
    Size,
    SparseFrontier,
    equal_density,
    indexing,
    p_value,
    pareto,
    prefill_flops,
    token_flops,
)  # fmt: skip
from maskwright.attention.sparse_frontier.guarantee import guarantee, needed
from maskwright.core.errors import BadInput
from maskwright.core.method import get
from maskwright.lab.decoder import llama
from maskwright.lab.models import seeded


def test_settings_are_checked():
    for bad in (
        {"densities": ()},
        {"densities": (0.5, 1.5)},
        {"densities": (0.5, 0.5)},
        {"tolerance": 0.0},
        {"confidence": 1.0},
    ):
        with pytest.raises(BadInput):
            SparseFrontier(**bad)
    with pytest.raises(BadInput):
        SparseFrontier().run(None, {}, {}, torch.zeros(1, 8, dtype=torch.int64))


def test_flops_of_a_prompt_and_a_token_are_the_sheets():
    size = Size(params=1000, layers=2, heads=4, width=8)
    assert prefill_flops(size, 10) == 2 * 1000 * 10 + 2 * 4 * 8 * 4 * 55
    assert prefill_flops(size, 10, 0.2, 7.0) == 2 * 1000 * 10 + 2 * (4 * 8 * 4 * 11 + 7)
    assert token_flops(size, 100, 0.1) == 2 * 1000 + 2 * 4 * 8 * 4 * 10
    assert indexing("window", 512, 8, 4, window=32) == 2 * 32 * 512 * 8 * 4
    assert indexing("pooled", 512, 8, 4, block=16) == 512 * 8 + 2 * 32**2 * 8 * 4
    assert indexing("pages", 512, 8, 4, block=16) == 4 * 32 * 8 * 4
    assert indexing("none", 512, 8, 4) == 0
    with pytest.raises(BadInput):
        indexing("trees", 512, 8, 4)


def test_a_larger_model_is_as_cheap_only_where_attention_dominates():
    small, large = Size(10**5, 2, 2, 32), Size(10**6, 4, 4, 32)
    assert equal_density(large, small, 512) is None
    density = equal_density(large, small, 10**6)
    assert density is not None and 0 < density < 0.25
    assert prefill_flops(large, 10**6, density) == pytest.approx(prefill_flops(small, 10**6))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_no_point_beats(points):
    front = pareto(points)
    chosen = [points[i] for i in front]
    assert chosen == sorted(set(chosen)) and [s for _, s in chosen] == sorted({s for _, s in chosen})
    for cost, score in points:
        assert any(c <= cost and s >= score for c, s in chosen)
        better = any((c <= cost and s > score) or (c < cost and s >= score) for c, s in points)
        assert better != ((cost, score) in chosen)


def test_p_values_are_the_exact_tail_or_hoeffdings_bound():
    hits = torch.tensor([1.0] + [0.0] * 19)
    exact = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in (0, 1))
    assert p_value(hits, 0.1) == pytest.approx(exact)
    assert p_value(torch.full((50,), 0.01), 0.1) == pytest.approx(math.exp(-2 * 50 * 0.09**2))
    assert p_value(torch.full((50,), 0.5), 0.1) == 1.0
    assert needed(0.05, 0.95) == 59
    assert p_value(torch.zeros(59), 0.05) <= 0.05 < p_value(torch.zeros(58), 0.05)
    for bad in (torch.tensor([]), torch.tensor([1.5]), torch.tensor([math.nan])):
        with pytest.raises(BadInput):
            p_value(bad, 0.1)


def test_the_fixed_sequence_stops_at_the_first_density_that_fails():
    dense = {"a": torch.ones(100), "b": torch.ones(100)}
    bad = torch.ones(100)
    bad[:20] = 0
    sparse = {0.5: dense, 0.25: dense, 0.1: {"a": dense["a"], "b": bad}, 0.05: dense}
    found = guarantee(dense, sparse, 0.05, 0.95)
    assert found.density == 0.25 and found.compression == 4
    assert list(found.p) == [0.5, 0.25, 0.1]  # 0.05 is never looked at, however well it does
    assert found.losses[0.1] == pytest.approx(0.2)  # the worst task, not the mean
    assert guarantee(dense, {0.5: {"a": bad, "b": bad}}, 0.05, 0.95).density == 1.0
    few = {"a": torch.ones(10)}
    assert guarantee(few, {0.5: few}, 0.05, 0.95).density == 1.0  # ten questions can guarantee nothing


def test_the_guarantee_is_wrong_no_more_often_than_it_says():
    rng = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(300):
        lost = (torch.rand(80, generator=rng) < 0.1).float()  # the true loss stands at the tolerance: never to be accepted
        wrong += guarantee({"a": torch.ones(80)}, {0.5: {"a": 1 - lost}}, 0.1, 0.9).density < 1
    assert wrong / 300 <= 0.1 + 3 * math.sqrt(0.09 / 300)


@pytest.fixture(scope="module")
def tiny():
    return llama(30, layers=2, width=16, heads=2, kv_heads=1, hidden=16, seed=0)


def _tasks():
    with seeded(1):
        ids = torch.randint(30, (4, 40))

    def ask(model, way):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return (logits.argmax(-1) % 2).double()

    return {"parity": ask, "all": lambda model, way: torch.ones(4)}, ids[:1]


def test_a_sweep_counts_pairs_and_bytes_exactly(tiny):
    tasks, probe = _tasks()
    window = get("sliding_window")
    policies = {"window": Policy(lambda d: window(window=max(1, round(40 * d)), sink=2))}
    table = SparseFrontier(densities=(1.0, 0.25)).run(tiny, tasks, policies, probe)
    point, dense, full = table.points["window", 0.25], table.dense["prefill"], table.points["window", 1.0]
    seen = int((Causal() & (Window(10) | Sink(2))).keep(39, 39).sum())
    assert (point.kept, point.allowed) == (4 * seen, 4 * 39 * 40 // 2)
    assert dense.kept == dense.allowed
    assert full.kept == full.allowed and full.flops == dense.flops > point.flops
    assert all(torch.equal(full.scores[t], dense.scores[t]) for t in tasks)
    assert point.read * 40 == dense.read * 12 and point.stored == dense.stored == 2 * 2 * 40 * 8 * 4
    mean, worst = table.drops("window", 0.25)
    assert worst >= mean and table.points["window", 0.25].worst <= table.points["window", 0.25].mean
    assert table.front()[0].flops == min(p.flops for p in [*table.points.values(), dense])
    assert SparseFrontier().guarantee(table, "window").density == 1.0  # four questions
    assert tiny.config._attn_implementation == "sdpa"


def test_density_one_equals_dense_for_every_unit(tiny):
    _, ids = _tasks()
    whole = {
        "vertical_slash": {"vertical_size": 64, "slash_size": 64}, "block_sparse": {"chunk_size": 4, "top_chunks": 10},
        "flexprefill": {"alpha": 1.0}, "snapkv": {"capacity": 40, "local": 4, "kernel": 3},
        "ada_snapkv": {"capacity": 40, "local": 4, "kernel": 3}, "quest": {"token_budget": 48},
    }  # fmt: skip
    from maskwright.attention import use

    with torch.no_grad():
        want = tiny(input_ids=ids).logits
        for slug, told in whole.items():
            with use(tiny, get(slug)(**told)):
                cache = tiny(input_ids=ids[:, :-1], use_cache=True).past_key_values
                last = tiny(input_ids=ids[:, -1:], past_key_values=cache).logits
            assert torch.allclose(last[:, -1], want[:, -1], atol=1e-5), slug
