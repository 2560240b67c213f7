"""The sheet's exact checks of S2-Attention."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention import AttentionSite, Causal, KeyPlan, Padding, Pieces, State, attend, use
from maskwright.attention.s2_attention import S2Attention, kv_efficient
from maskwright.attention.s2_attention.grid import warn_of_gaps
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.associative import Recall, RecallNet
from maskwright.lab.decoder import llama
from maskwright.lab.train import train


def qkv(heads=4, kv_heads=4, queries=32, keys=32, *, batch=1, grad=False):
    rng = generator(0, "qkv")
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    made = [torch.randn(batch, n, m, 8, generator=rng, dtype=torch.float64) for n, m in shapes]
    return [t.requires_grad_() for t in made] if grad else made


def site(q, k, v, *, structure=None, causal=True, layer=0, first=None, begins=True):
    structure = Causal() if structure is None and causal else structure
    offset = k.shape[2] - q.shape[2]
    return AttentionSite(layer, 2, q, k, v, q.shape[-1] ** -0.5, structure, offset, begins, first=first)


def planned(rule, q, k, v, **more):
    return rule.plan(site(q, k, v, **more), State())


def brute(rule, heads, queries, keys):
    """(heads, queries, keys), element by element, from the sheet's formula."""
    step = max(1, rule.stride // heads) if rule.step is None else rule.step
    keep = torch.zeros(heads, queries, keys, dtype=torch.bool)
    for h in range(heads):
        for row in range(queries):
            for p in range(row + keys - queries + 1):
                i, j = (row + keys - queries) // rule.block, p // rule.block
                stripe = (j + (0 if rule.homo else h * step) + rule.offset) % rule.stride == 0
                keep[h, row, p] = i - j < rule.local or stripe or h >= heads - rule.dense_heads
    return keep


def test_the_sheets_example():
    grid = S2Attention(block=1, local=2, stride=4).grid(4, torch.arange(8), 8)
    rows = [grid[h, 7].nonzero().flatten().tolist() for h in range(4)]
    assert rows == [[0, 4, 6, 7], [3, 6, 7], [2, 6, 7], [1, 5, 6, 7]]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.booleans(), st.integers(0, 1),
    st.integers(1, 30), st.integers(0, 20), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_the_plan_is_the_formula(block, local, stride, offset, homo, dense, queries, before, heads):
    rule = S2Attention(block=block, local=local, stride=stride, offset=offset, homo=homo, dense_heads=dense, step=1)
    q, k, v = qkv(heads, heads, queries, queries + before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = planned(rule, q, k, v)
    expected = brute(rule, heads, queries, queries + before)
    assert torch.equal(plan.dense()[0].expand_as(expected), expected)
    assert torch.equal(plan.pairs()[0].expand(1, heads), expected.sum((1, 2))[None])
    if plan.pieces is not None:
        keep = plan.pieces.check().keep()
        assert torch.equal(Pieces.from_keep(keep, plan.pieces.rows, queries).keep(), keep)


def test_stride_1_is_dense_with_gradients():
    q, k, v = qkv(grad=True)
    rule = S2Attention(block=4, local=1, stride=1)
    outs = []
    for plan in (planned(rule, q, k, v), Causal()):
        out = attend(q, k, v, plan, impl="gather")
        outs.append((out, *torch.autograd.grad((out * torch.arange(8)).sum(), [q, k, v])))
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("heads,stride", [(4, 4), (8, 4), (6, 5), (4, 8), (4, 10), (3, 7)])
def test_the_default_step_covers_what_can_be_covered(heads, stride):
    grid = S2Attention(block=1, local=1, stride=stride).grid(heads, torch.arange(40), 40)
    union = grid.any(0)[-1, :39]
    assert bool(union.all()) == (heads >= stride)
    residues = {int(j) % stride for j in union.nonzero()}
    assert len(residues) == min(heads, stride)


def test_an_incomplete_union_is_warned_of_once():
    rule = S2Attention(block=2, local=1, stride=5, offset=3)
    warn_of_gaps.cache_clear()  # another test may have been warned of the same gap
    with pytest.warns(UserWarning, match="4 key heads read 4 of 5 residues"):
        planned(rule, *qkv())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(rule, *qkv())
        planned(rule, *qkv(queries=16, keys=16))
        planned(S2Attention(block=16, local=2, stride=5), *qkv())  # all of it is local


def test_kv_efficient():
    rule = S2Attention(block=1, local=2, stride=4)
    assert kv_efficient(rule.grid(4, torch.arange(12), 12))
    chance = torch.rand(4, 12, 12, generator=generator(1)) < 0.5
    assert not kv_efficient(chance.tril() | torch.eye(12, dtype=torch.bool))
    assert not kv_efficient(rule.grid(4, torch.arange(12), 12, causal=False).tril())  # relative stripes move


def test_relative_stripes_without_causality():
    keep = S2Attention(block=1, local=2, stride=3).grid(4, torch.arange(12), 12, causal=False)
    for i in range(12):
        for j in range(12):
            assert bool(keep[3, i, j]) == (max(0, abs(i - j) - 1) % 3 == 0)
    q, k, v = qkv()
    plan = planned(S2Attention(block=4, local=1, stride=3), q, k, v, causal=False)
    assert bool(plan.dense()[0, :, 0, 31].all()) == (max(0, 7 - 0) % 3 == 0)


def test_dense_heads_layers_and_offset():
    q, k, v = qkv()
    plan = planned(S2Attention(block=2, local=1, stride=4, dense_heads=2), q, k, v)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    keep = plan.dense()[0]
    assert torch.equal(keep[2], causal) and torch.equal(keep[3], causal) and not torch.equal(keep[1], causal)
    rule = S2Attention(block=2, local=1, stride=4, dense_layers=(1,))
    assert planned(rule, q, k, v, layer=1).pieces is None and planned(rule, q, k, v, layer=0).pieces is not None
    assert planned(S2Attention(block=2, local=1, stride=4, dense_heads=4), q, k, v).pieces is None
    moved = S2Attention(block=1, local=1, stride=4, offset=1).grid(4, torch.arange(8), 8)
    assert moved[0, 7].nonzero().flatten().tolist() == [3, 7]


def test_what_is_never_kept_gets_exactly_no_gradient():
    q, k, v = qkv(grad=True, queries=8, keys=32)  # the last 8 rows read remote blocks by shard alone
    plan = planned(S2Attention(block=4, local=1, stride=4), q, k, v)
    out = attend(q, k, v, plan, impl="gather")
    grads = torch.autograd.grad(out.square().sum(), [k, v])
    never = ~plan.dense().any(2)[0]
    assert never.any()
    for grad in grads:
        assert not grad[0][never].any() and grad[0][~never].any(-1).all()


def test_grouped_heads_share_their_key_heads_rule():
    q, k, v = qkv(heads=8, kv_heads=2)
    plan = planned(S2Attention(block=4, local=1, stride=2), q, k, v)
    keep = brute(S2Attention(block=4, local=1, stride=2), 2, 32, 32)
    assert torch.equal(plan.dense()[0], keep)
    whole = KeyPlan(32, 32, None, Pieces.from_keep(keep.repeat_interleave(4, 0)[None], 1, 32))
    for impl in ("reference", "gather"):
        torch.testing.assert_close(attend(q, k, v, plan, impl=impl), attend(q, k, v, whole, impl="reference"))


def test_one_query_on_a_cache_is_the_last_row():
    q, k, v = qkv(keys=37, queries=37)
    rule = S2Attention(block=4, local=2, stride=4)
    out = attend(q, k, v, planned(rule, q, k, v))
    for many in (1, 5):
        last = q[:, :, -many:]
        plan = planned(rule, last, k, v, begins=False)
        torch.testing.assert_close(attend(last, k, v, plan), out[:, :, -many:])


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_without_what_is_never_read_decodes_the_same(padded):
    model = llama(20, layers=2, width=64, heads=4, kv_heads=2, hidden=32)
    ids = torch.randint(20, (2, 40), generator=generator(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0 if padded else 1
    found = []
    for drop in (False, True):
        rule = S2Attention(block=4, local=1, stride=2, dense_layers=(1,), drop=drop)
        with use(model, rule) as run, torch.no_grad():
            out = model(ids[:, :22], attention_mask=mask[:, :22])
            logits, bytes_ = [out.logits[:, -1]], run.kv_bytes
            for first, last in ((22, 23), (23, 26), *((i, i + 1) for i in range(26, 40))):
                place = (mask.cumsum(1) - 1)[:, first:last]
                out = model(
                    ids[:, first:last],
                    attention_mask=mask[:, :last],
                    position_ids=place,
                    past_key_values=out.past_key_values,
                )
                logits.append(out.logits[:, -1])
        found.append((torch.stack(logits), bytes_))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[1][1] < 0.85 * found[0][1]


def test_padding_on_the_left_shifts_the_blocks():
    q, k, v = qkv(queries=21, keys=21, batch=2)
    rule, first = S2Attention(block=4, local=1, stride=4), torch.tensor([0, 3])
    structure = Causal() & Padding(first, torch.full((2,), 21))
    plan = planned(rule, q, k, v, structure=structure, first=first)
    out = attend(q, k, v, plan)
    for sample, start in enumerate(first.tolist()):
        part = [t[sample : sample + 1, :, start:] for t in (q, k, v)]
        alone = attend(*part, planned(rule, *part))
        torch.testing.assert_close(out[sample : sample + 1, :, start:], alone)


def test_two_halves_of_the_keys_merge_by_their_lse():
    q, k, v = qkv()
    plan = planned(S2Attention(block=4, local=1, stride=4), q, k, v)
    whole, keep, cut = attend(q, k, v, plan), plan.dense(), torch.arange(32) < 20
    parts = []
    for half in (cut, ~cut):  # the first rows read nothing of the second half: lse -inf, no weight
        split = KeyPlan(32, 32, None, Pieces.from_keep(keep & half, 1, 32))
        parts.append(attend(q, k, v, split, return_lse=True))
    weight = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
    assert (weight[1, 0, :, :16] == 0).all()
    merged = sum(w[..., None] * out for w, (out, _) in zip(weight, parts, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-6)


def test_training_through_the_engine_gives_the_references_losses():
    task, rule = Recall(length=32, pairs=4, questions=4, keys=8, values=4, filler=4), S2Attention(block=4, local=1, stride=2)
    curves = []
    for impl in ("reference", "auto"):
        losses: list[float] = []
        net = RecallNet(task, width=64, heads=2, seed=0)
        told = {
            "on_step": lambda step, loss, to=losses: to.append(loss),
            "context": lambda m, o, by=impl: use(m, rule, impl=by),
        }
        train(net, task.draw(), steps=6, batch=4, lr=1e-2, optimizer="adamw", seed=0, **told)
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_bad_settings():
    for bad in ({"block": 0}, {"local": 0}, {"stride": 0}, {"step": -1}, {"dense_heads": -1}, {"dense_layers": (-1,)}):
        with pytest.raises(BadInput, match="s2_attention"):
            S2Attention(**bad)


def test_a_recall_row_holds_every_asked_pair_once():
    task = Recall(length=40, pairs=8, questions=5, keys=12, values=3, filler=4)
    x, y, at = task.sample(20, torch.Generator().manual_seed(0))
    word, value = x.unbind(-1)
    assert x.shape == (20, 40, 2) and ((value > 0).sum(1) == 8).all() and not value[:, 35:].any()
    assert (y[:, :35] == -100).all() and torch.equal(word.gather(1, at), word[:, 35:])
    assert torch.equal(value.gather(1, at) - 1, y[:, 35:])
    assert all(len(set(row[seen > 0].tolist())) == 8 for row, seen in zip(word, value, strict=True))
    with pytest.raises(ValueError, match="cannot hold"):
        Recall(length=8)
