"""The sheet's exact checks of DMA."""

import pytest
import torch
from torch import nn

from maskwright.attention import AttentionSite, Causal, KeyPlan, Padding, State, attend, use
from maskwright.attention.dma import Dma, Gate, convert
from maskwright.attention.dma.running import running_top
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.associative import Recall, RecallNet
from maskwright.lab.decoder import llama

EXAMPLE = torch.tensor([[[0.1, 0.9, 0.5, 0.7]]])


class Host(nn.Module):
    """A module with a gate of chosen scores: `a` and values that give them."""

    def __init__(self, kv_heads=2, width=8, a=1.0):
        super().__init__()
        self.dma_gate = Gate(kv_heads, width, std=0.5, rng=generator(3)).double()
        with torch.no_grad():
            self.dma_gate.a.fill_(a)


def qkv(heads=4, kv_heads=2, queries=24, keys=24, batch=2, *, grad=False, seed=0):
    rng = generator(seed, "qkv")
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    made = [torch.randn(batch, n, m, 8, generator=rng, dtype=torch.float64) for n, m in shapes]
    return [t.requires_grad_() for t in made] if grad else made


def planned(rule, q, k, v, host, *, first=None, state=None):
    structure = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, k.shape[2]))
    site = AttentionSite(
        0, 1, q, k, v, 8**-0.5, structure, k.shape[2] - q.shape[2], q.shape[2] == k.shape[2], module=host, first=first
    )
    return rule.plan(site, State() if state is None else state)


def by_hand(rank, window):
    """(..., keys, keys) bool: each row's best keys up to it, of equal ones the most recent; by counting who beats whom."""
    at = torch.arange(rank.shape[-1])
    one, two = rank[..., :, None], rank[..., None, :]
    beats = (two > one) | ((two == one) & (at > at[:, None]))  # (..., key, by which other key)
    count = (beats[..., None, :, :] & (at <= at[:, None])[:, None]).sum(-1)  # (..., row, key)
    return (count < window) & (at <= at[:, None])


def test_the_sheets_example():
    rows = running_top(EXAMPLE, 2, 4).check().keep()[0, 0]
    assert [row.nonzero().flatten().tolist() for row in rows] == [[0], [0, 1], [1, 2], [1, 3]]
    assert Dma(window=2).listed(EXAMPLE)[0, 0].nonzero().flatten().tolist() == [1, 3]


def test_short_texts_are_untouched_while_a_is_0_with_gradients():
    host, q, k, v = Host(a=0.0), *qkv(grad=True)
    outs = []
    for plan in (planned(Dma(window=24), q, k, v, host), Causal()):
        out = attend(q, k, v, plan)
        outs.append((out, *torch.autograd.grad((out * torch.arange(8)).sum(), [q, k, v])))
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("exp", [False, True])
@pytest.mark.parametrize("per_query", [True, False])
def test_a_full_window_is_dense_attention_with_the_bias(exp, per_query):
    host, q, k, v = Host(a=0.7), *qkv(grad=True)
    leaves = [q, k, v, host.dma_gate.a, host.dma_gate.weight]
    s = host.dma_gate(v)
    s = (s.exp() if exp else s).repeat_interleave(2, 1)[:, :, None]
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ wide_k.mT * 8**-0.5 + s).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
    want = scores.softmax(-1) @ wide_v
    got = attend(q, k, v, planned(Dma(window=24, exp=exp, per_query=per_query), q, k, v, host))
    grads = [torch.autograd.grad((out * torch.arange(8)).sum(), leaves) for out in (got, want)]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "gather", "auto"])
@pytest.mark.parametrize("rule", [Dma(window=5), Dma(window=5, per_query=False), Dma(relu=True, window=5)], ids=str)
def test_forward_and_gradients_on_kept_keys_alone(rule, impl):
    host, q, k, v = Host(a=-0.7 if rule.per_query and not rule.relu else 0.7), *qkv(grad=True)
    with torch.no_grad():
        if rule.relu:
            host.dma_gate.a[1] = -1.0  # keeps nothing: every row reads its own key
    s = host.dma_gate(v)
    rank = s.detach()
    if rule.relu:
        keep = (rank > 0)[:, :, None].expand(-1, -1, 24, -1)
    elif rule.per_query:
        keep = by_hand(rank, 5)
    else:
        keep = by_hand(rank, 5)[:, :, -1:].expand(-1, -1, 24, -1)
    keep = keep & torch.ones(24, 24, dtype=torch.bool).tril()
    keep = keep | (torch.eye(24, dtype=torch.bool) & ~keep.any(-1, keepdim=True))
    plan = planned(rule, q, k, v, host)
    dense = plan.dense()
    assert torch.equal(dense.repeat_interleave(4 // dense.shape[1], 1), keep.repeat_interleave(2, 1))
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = q @ wide_k.mT * 8**-0.5 + s.repeat_interleave(2, 1)[:, :, None]
    want = scores.masked_fill(~keep.repeat_interleave(2, 1), -torch.inf).softmax(-1) @ wide_v
    got = attend(q, k, v, plan, impl=impl)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    leaves = [q, k, v, host.dma_gate.a, host.dma_gate.weight]
    grads = [torch.autograd.grad((out * torch.arange(8)).sum(), leaves, retain_graph=True) for out in (got, want)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_keys_never_kept_give_no_gradient_to_their_score():
    host, q, k, v = Host(), *qkv(queries=6)
    plan = planned(Dma(window=5), q, k, v, host)
    bias = plan.bias.detach().requires_grad_()
    out = attend(q, k, v, KeyPlan(6, 24, plan.structure, plan.pieces, bias))
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    kept = plan.dense().any(2).repeat_interleave(2, 1)
    assert not grad[:, :, 0][~kept].any() and grad[:, :, 0][kept].all()


def test_the_sign_of_a_turns_the_ranking():
    v = qkv()[2]
    host, other = Host(a=1.0), Host(a=-1.0)
    most, least = (Dma(window=5).listed(h.dma_gate(v)) for h in (host, other))
    assert not (most & least).any() and int(most.sum()) == int(least.sum()) == 2 * 2 * 5


def test_without_training_the_window_is_recent():
    for host in (Host(a=0.0), None):
        dense = planned(Dma(window=3), *qkv(), host).dense()
        rows = torch.arange(24)
        window = (rows[:, None] - rows < 3) & (rows <= rows[:, None])
        assert torch.equal(dense, window.expand_as(dense))


@pytest.mark.parametrize("rule", [Dma(window=5), Dma(window=6, smooth=3)], ids=str)
def test_causal_and_decoding_is_the_row(rule):
    host, q, k, v = Host(), *qkv()
    with torch.no_grad():
        out = attend(q, k, v, planned(rule, q, k, v, host))
        later = v.clone()
        later[:, :, 15:] = torch.randn(later[:, :, 15:].shape, generator=generator(5), dtype=torch.float64) * 9
        moved = attend(q, k, later, planned(rule, q, k, later, host))
        torch.testing.assert_close(moved[:, :, :15], out[:, :, :15])
        state = State()
        planned(rule, q[:, :, :10], k[:, :, :10], v[:, :, :10], host, state=state)
        for row in range(10, 24):
            one, keys, values = q[:, :, row : row + 1], k[:, :, : row + 1], v[:, :, : row + 1]
            step = attend(one, keys, values, planned(rule, one, keys, values, host, state=state))
            torch.testing.assert_close(step[:, :, 0], out[:, :, row])
        torch.testing.assert_close(state["scores"], host.dma_gate(v))


def test_one_list_looks_ahead():
    host, q, k, v = Host(), *qkv()
    rule, later = Dma(window=5, per_query=False), v.clone()
    later[:, :, 15:] *= 9
    first, second = (planned(rule, q, k, x, host).dense()[:, :, :15, :15] for x in (v, later))
    assert not torch.equal(first, second)  # the paper's form (b): a later key takes an earlier one's place


def test_scores_are_made_anew_where_samples_were_reordered():
    host, q, k, v = Host(), *qkv()
    state = State()
    with torch.no_grad():
        planned(Dma(window=5), q[:, :, :20], k[:, :, :20], v[:, :, :20], host, state=state)
        one, back = q[:, :, 20:21], (t[:, :, :21].flip(0) for t in (k, v))
        plan = planned(Dma(window=5), one, *back, host, state=state)
        assert torch.equal(plan.bias[:, ::2, 0], host.dma_gate(v[:, :, :21].flip(0)))


def test_padding_is_read_last():
    host, q, k, v = Host(), *qkv()
    first = torch.tensor([0, 4])
    for rule in (Dma(window=5), Dma(window=5, per_query=False)):
        out = attend(q, k, v, planned(rule, q, k, v, host, first=first))
        part = [t[1:, :, 4:] for t in (q, k, v)]
        torch.testing.assert_close(out[1:, :, 4:], attend(*part, planned(rule, *part, host)))


def test_convert_saves_with_the_model_and_refuses():
    net = RecallNet(Recall(), heads=4, kv_heads=2)
    gates = convert(net)
    assert list(gates) == ["blocks.0.attention"] and gates["blocks.0.attention"].weight.shape == (2, 32)
    assert {n for n in net.state_dict() if "dma" in n} == {f"blocks.0.attention.dma_gate.{p}" for p in ("a", "weight")}
    with pytest.raises(BadInput, match=r"blocks\.0\.attention has a dma gate already"):
        convert(net)
    with pytest.raises(BadInput, match="Linear has no attention"):
        convert(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="does not fit values"):
        Gate(2, 8)(torch.zeros(1, 4, 3, 8))
    host, q, k, v = Host(), *qkv()
    with pytest.raises(BadInput, match="layer 0.*NaN"):
        planned(Dma(window=5), q, k, v * torch.nan, host)
    for bad in ({"window": 0}, {"smooth": -1}):
        with pytest.raises(BadInput, match="dma needs"):
            Dma(**bad)


def test_on_a_llama_unchanged_within_the_window_then_trainable_and_decoding():
    model = llama(20, layers=1, width=64, heads=2, kv_heads=1, hidden=32)
    ids = torch.randint(20, (2, 12), generator=generator(2))
    with torch.no_grad():
        before = model(ids).logits
    gate = convert(model)["model.layers.0.self_attn"]
    with use(model, Dma(window=12)), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        gate.a.fill_(2.0)
    with use(model, Dma(window=4)):
        model(ids, labels=ids).loss.backward()
        assert gate.a.grad.abs().min() > 0 and gate.weight.grad.abs().sum() > 0
        with torch.no_grad():
            whole = model(ids).logits
            cache = model(ids[:, :7]).past_key_values
            for at in range(7, 12):
                step = model(ids[:, at : at + 1], past_key_values=cache).logits
                torch.testing.assert_close(step[:, 0], whole[:, at], atol=1e-5, rtol=1e-5)


def test_training_through_the_engine_gives_the_references_losses():
    from maskwright.lab.train import train

    task = Recall(length=32, pairs=4, questions=4, keys=8, values=4, filler=4)
    curves = []
    for impl in ("reference", "auto"):
        losses: list[float] = []
        net = RecallNet(task, width=64, heads=2, seed=0)
        convert(net)
        told = {"on_step": lambda step, loss, to=losses: to.append(loss)}
        told["context"] = lambda m, o, by=impl: use(m, Dma(window=8), impl=by)
        train(net, task.draw(), steps=5, batch=4, lr=1e-2, optimizer="adamw", seed=0, **told)
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
