from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.attention import AttentionSite, Causal, KeyPlan, Padding, State, Window, attend, use
from maskwright.attention.quest import Quest
from maskwright.attention.quest.method import page_bounds
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama

SMALL = Quest(token_budget=16, page_size=4)


def step(
    keys: int, first: Tensor | None = None, batch: int = 2, heads: int = 4, kv: int = 2, seed: int = 0, rows: int = 1
) -> AttentionSite:
    """A decode call over the first `keys` of a fixed row of keys."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, kv, 200, 8, generator=g)[:, :, :keys] for _ in range(2))
    q = torch.randn(batch, heads, 200, 8, generator=g)[:, :, keys - rows : keys]
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, keys))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, keys - rows, begins=False, first=first)


def kept(plan: KeyPlan) -> Tensor:
    assert plan.pieces is not None
    return plan.pieces.check().keep()[:, :, 0]  # (batch, lists, keys)


def brute(here: AttentionSite, b: int, heads: list[int], budget: int, size: int) -> list[int]:
    """Keys read by the query heads `heads` that share pages, in plain loops over real keys."""
    low = 0 if here.first is None else int(here.first[b])
    current = (here.keys - 1) // size
    bound = {}
    for page in range(low // size, current):
        k = here.k[b, heads[0] // here.group, max(page * size, low) : (page + 1) * size]
        top, bottom = k.amax(0), k.amin(0)
        bound[page] = sum(float(torch.maximum(here.q[b, h, 0] * top, here.q[b, h, 0] * bottom).sum()) for h in heads)
    pages = [*sorted(bound, key=lambda page: (-bound[page], page))[: budget // size], current]
    return sorted(j for page in pages for j in range(page * size, min(page * size + size, here.keys)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("first", [None, torch.tensor([0, 30]), torch.tensor([5, 90])])
@pytest.mark.parametrize("keys", [97, 100, 103])
def test_pages_are_those_of_the_loops(keys: int, first: Tensor | None, share: bool) -> None:
    here = step(keys, first)
    plan = Quest(16, 4, share).plan(here, State())
    got = kept(plan)
    assert got.shape[1] == (2 if share else 4)
    for b in range(2):
        for h in range(got.shape[1]):
            want = brute(here, b, [2 * h, 2 * h + 1] if share else [h], 16, 4)
            assert got[b, h].nonzero().flatten().tolist() == want


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_bounds_hold_and_are_exact_for_pages_of_one(pages: int, size: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k, q = torch.randn(1, 1, pages * size, 8, generator=g), torch.randn(8, generator=g)
    both = torch.cat([q, -q]).relu()
    bound, dot = page_bounds(k, size)[0, 0] @ both, k[0, 0] @ q
    for page, most in enumerate(dot.split(size)):
        assert bound[page] >= most.max() - 1e-5
    if size == 1:
        torch.testing.assert_close(bound, dot)


def test_pages_of_one_key_are_the_exact_best_keys() -> None:
    here = step(150, batch=1, heads=2, kv=2)
    got = kept(Quest(20, 1).plan(here, State()))[0]
    for h in range(2):
        best = (here.k[0, h, :149] @ here.q[0, h, 0]).sort(descending=True, stable=True).indices[:20].tolist()
        assert got[h].nonzero().flatten().tolist() == sorted([*best, 149])


def test_equal_bounds_take_the_lower_pages() -> None:
    here = step(101, batch=1)
    flat = AttentionSite(0, 1, torch.zeros_like(here.q), here.k, here.v, here.scale, Causal(), 100, begins=False)
    assert kept(SMALL.plan(flat, State()))[0, 0].nonzero().flatten().tolist() == [*range(16), 100]


@pytest.mark.parametrize("batch,first", [(1, None), (2, torch.tensor([3, 21]))])
def test_a_state_carried_along_gives_what_a_fresh_one_gives(batch: int, first: Tensor | None) -> None:
    state, copied = State(), State()
    for keys in range(60, 130):
        here = step(keys, first, batch)
        plan = SMALL.plan(here, state)
        assert torch.equal(kept(plan), kept(SMALL.plan(here, State()))), keys
        if keys == 90:
            copied = copy.deepcopy(state)
    assert state["known"] == 129 and copied["known"] == 90
    other = step(91, first, batch, seed=5)
    other.k[:, :, :90] = step(91, first, batch).k[:, :, :90]  # the copy goes on with another key
    assert torch.equal(kept(SMALL.plan(other, copied)), kept(SMALL.plan(other, State())))
    assert torch.equal(kept(SMALL.plan(step(130, first, batch), state)), kept(SMALL.plan(step(130, first, batch), State())))


def test_keys_that_were_cut_off_moved_or_exchanged_are_read_again() -> None:
    state = State()
    SMALL.plan(step(100, batch=1), state)
    SMALL.plan(step(97, batch=1, seed=1, rows=6), state)  # cut to 91 keys, then 6 others: dense
    after = step(98, batch=1, seed=1)
    assert torch.equal(kept(SMALL.plan(after, state)), kept(SMALL.plan(after, State())))
    for seed in (2, 3):  # a cache of constant length, whose oldest key falls out
        moved = step(98, batch=1, seed=seed)
        assert torch.equal(kept(SMALL.plan(moved, state)), kept(SMALL.plan(moved, State())))
    prompt = step(50)
    beams = State()
    SMALL.plan(AttentionSite(0, 1, prompt.q.expand(-1, -1, 50, -1), prompt.k, prompt.v, 1.0, Causal(), 0), beams)
    SMALL.plan(step(80), beams)
    swapped = step(81)
    swapped.k[:, :, 50:80] = swapped.k[:, :, 50:80].flip(0).clone()
    assert torch.equal(kept(SMALL.plan(swapped, beams)), kept(SMALL.plan(swapped, State())))


def test_tables_made_in_inference_mode_serve_outside() -> None:
    state = State()
    with torch.inference_mode():
        SMALL.plan(step(100, batch=1), state)
    here = step(101, batch=1)
    assert torch.equal(kept(SMALL.plan(here, state)), kept(SMALL.plan(here, State())))


@pytest.mark.parametrize("keys", [1, 4, 16, 20])
def test_a_cache_within_the_budget_is_dense(keys: int) -> None:
    assert SMALL.plan(step(keys), State()).pieces is None
    here = step(21)
    plan = Quest(20, 4).plan(here, State())
    torch.testing.assert_close(attend(here.q, here.k, here.v, plan), attend(here.q, here.k, here.v, here.dense()))


def test_prompts_evicted_caches_and_several_queries_are_dense() -> None:
    here = step(100)
    prompt = AttentionSite(0, 1, here.q.expand(-1, -1, 100, -1), here.k, here.v, 1.0, Causal(), 0)
    left = AttentionSite(0, 1, here.q, here.k, here.v, 1.0, Causal(), 99, begins=False, evicted=True)
    for call in (prompt, left, step(100, rows=3)):
        assert SMALL.plan(call, State()).pieces is None


def test_one_query_head_a_key_head_takes_the_same_path() -> None:
    here = step(100)
    k, v = (x.repeat_interleave(2, 1) for x in (here.k, here.v))
    apart = AttentionSite(0, 1, here.q, k, v, here.scale, Causal(), 99, begins=False)
    alone = kept(Quest(16, 4, share_pages=False).plan(here, State()))
    assert torch.equal(kept(SMALL.plan(apart, State())), alone)


def test_a_model_with_a_sliding_window_never_sees_beyond_it() -> None:
    here = step(100)
    slid = AttentionSite(0, 1, here.q, here.k, here.v, here.scale, Causal() & Window(30), 99, begins=False)
    seen = SMALL.plan(slid, State()).dense()
    assert not bool(seen[..., :70].any()) and bool(seen[..., 99].all())


def test_what_is_refused() -> None:
    for bad in ((16, 5), (0, 4), (16, 0), (-4, 4)):
        with pytest.raises(BadInput, match="quest"):
            Quest(*bad)
    here = step(100)
    here.k[1, 0, 50, 2] = torch.nan
    with pytest.raises(BadInput, match=r"quest, layer 0.*NaN"):
        SMALL.plan(here, State())


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_in_a_model(beams: int) -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    words = torch.randint(2, 64, (2, 60), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(words)
    real[1, :25] = 0
    ask = {"attention_mask": real, "max_new_tokens": 12, "num_beams": beams}
    dense = model.generate(words, **ask)
    with use(model, Quest(80, 4)):
        assert torch.equal(model.generate(words, **ask), dense)
    with use(model, SMALL, record=True) as run:
        model.generate(words, **ask)
        last = run.records[-1]
        assert last.keys == 71 and bool((last.kept <= 20).all()) and last.kv_read < last.kv_stored / 2
        whole = model.generate(words[:1], max_new_tokens=12, attention_mask=real[:1], num_beams=beams)
        both = model.generate(words, **ask)
    assert torch.equal(both[:1], whole)  # a padded neighbour changes nothing
