"""The sheet's exact checks of R-AMT."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.models import Vit
from maskwright.updates.r_amt import RAmt, gradient_dropout
from maskwright.updates.r_amt.gate import ScoreGate

X = torch.rand(6, 1, 16, 16, generator=generator(0, "x"))
Y = torch.arange(6) % 3
AMT = RAmt(drop_lambda=0.0)


def vit(seed=0):
    return Vit(16, 4, layers=2, width=16, heads=2, classes=3, seed=seed)


class Clip(nn.Module):
    """A visual tower in CLIP's form: a patch convolution and blocks whose q, k, v are stacked."""

    def __init__(self, bias=True, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(1, 16, 4, 4, bias=False)
            self.attn = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True)
            self.mlp = nn.Linear(16, 16)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.mlp(x).mean(1)


def bert():
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        return transformers.BertModel(config).eval()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def shake(run, seed=0):
    """Scores around the threshold, about half of them off."""
    for name, gate in run.gates.items():
        with torch.no_grad():
            gate.scores.copy_(torch.rand(gate.scores.shape, generator=generator(seed, name)) * 0.01)


# --- step 0, and which weights -------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
def _both_paths(request):
    """Torch's two ways through nn.MultiheadAttention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("_both_paths")
@torch.no_grad()
def test_at_step_0_the_masked_model_is_the_original_bit_for_bit():
    ids = torch.arange(12).view(2, 6)
    for model, run_model in (
        (vit(), lambda m: m(X)),
        (Clip().eval(), lambda m: m(X)),
        (Clip(bias=False), lambda m: m(X)),
        (bert(), lambda m: m(ids).last_hidden_state),
    ):
        # Frozen, as its weights are while masks are tuned: torch.matmul takes a strided batch (attention's transposed
        # one) to another kernel, with another last bit, where the weight requires a gradient.
        plain = run_model(model.requires_grad_(False))
        with RAmt().attach(model) as run:
            assert run.masks().density == 1.0
            assert torch.equal(run_model(model), plain)


def test_attention_means_q_k_v_and_o_in_every_form():
    with AMT.attach(vit()) as run:
        parts = ("query", "key", "value", "out")
        assert list(run.masks()) == [f"blocks.{i}.attention.{part}.weight" for i in (0, 1) for part in parts]
    with AMT.attach(bert()) as run:
        parts = ("self.query", "self.key", "self.value", "output.dense")
        assert list(run.masks()) == [f"encoder.layer.{i}.attention.{part}.weight" for i in (0, 1) for part in parts]
    with AMT.attach(Clip()) as run:
        assert list(run.masks()) == ["attn.in_proj_weight", "attn.out_proj.weight"]
        assert run.masks()["attn.in_proj_weight"].shape == (48, 16)
    with RAmt(where=("attention", "conv1")).attach(Clip()) as run:  # the code's patch embedding
        assert list(run.masks()) == ["conv1.weight", "attn.in_proj_weight", "attn.out_proj.weight"]
    with RAmt(where="mlp.*.weight").attach(vit()) as run:  # MMT
        assert list(run.masks()) == [f"blocks.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)]


# --- binarizer and straight-through --------------------------------------------------------------------------------


def test_binarizer_is_strict_and_a_score_on_the_threshold_is_counted_as_off():
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    with RAmt(where="weight").attach(model) as run, torch.no_grad():
        run.trainable[0].copy_(torch.tensor([[0.004, 0.005, 0.0051]]))
        assert run.masks()["0.weight"].keep.tolist() == [[False, False, True]]
        weight = model[0].weight
        assert weight.tolist() == [[0.0, 0.0, run.found["0.weight"].value[0, 2].item()]]
        assert run.report().dropped == 2 and run.report().kept["0.weight"] == (1, 3)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_score_gradient_is_weight_times_gradient_also_where_off(rows, columns, seed):
    rng = generator(seed)
    weight, x = torch.randn(rows, columns, generator=rng), torch.randn(4, columns, generator=rng)
    gate = ScoreGate.of(weight, 0.01, 0.005)
    with torch.no_grad():
        gate.scores.copy_(torch.rand(rows, columns, generator=rng) * 0.01)
    F.linear(x, gate.apply(weight, torch.ones(0))).square().sum().backward()
    effective = torch.where(gate.keep, weight, 0).requires_grad_()
    F.linear(x, effective).square().sum().backward()
    assert torch.equal(gate.scores.grad, weight * effective.grad)


def test_a_weight_that_is_trained_too_gets_no_gradient_where_it_is_off():
    weight = torch.randn(4, 4, generator=generator(0), requires_grad=True)
    gate = ScoreGate(nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(4, 4).clone()), 0.5)
    gate.apply(weight, torch.ones(0)).sum().backward()
    assert torch.equal(weight.grad, gate.keep.float())


def test_half_precision_weights_have_scores_that_small_steps_move():
    model = vit().to(torch.bfloat16)
    with AMT.attach(model) as run:
        optimizer = torch.optim.Adam(run.trainable, lr=8e-5)
        run.backward(F.cross_entropy(model(X.bfloat16()).float(), Y))
        optimizer.step()
        assert all(s.dtype == torch.float32 and s.grad.dtype == torch.float32 for s in run.trainable)
        assert all((s[s.grad != 0] != 0.01).all() for s in run.trainable)


# --- backward ------------------------------------------------------------------------------------------------------


def losses(run, model):
    logits = model(X)
    with run.original():
        teacher = model(X)
    return F.cross_entropy(logits, Y), run.kl_loss(logits, teacher)


def test_backward_is_the_formula_with_the_penalty_in_the_task_gradient_and_a_fresh_draw_each_step():
    model = vit()
    with RAmt(drop_lambda=1.0, norm_weight=0.01).attach(model, seed=3) as run:
        shake(run)
        loss, kl = losses(run, model)
        a = torch.autograd.grad(loss, run.trainable, retain_graph=True)
        a = [g + 0.01 * m / m.norm() for g, m in zip(a, run.trainable, strict=True)]
        b = torch.autograd.grad(kl, run.trainable, retain_graph=True)
        got = []
        for step in range(2):
            assert run.step == step
            run.backward(*losses(run, model))
            got.append([m.grad.clone() for m in run.trainable])
            for name, m, ga, gb in zip(run.gates, run.trainable, a, b, strict=True):
                torch.testing.assert_close(m.grad, gradient_dropout(ga, gb, 1.0, generator(3, f"{name}#{step}")).detach())
                m.grad = None
        assert any(not torch.equal(x, y) for x, y in zip(*got, strict=True))


def test_at_step_0_old_knowledge_has_nothing_to_say_and_every_gradient_is_kept():
    model = vit()
    with RAmt(drop_lambda=1.0, norm_weight=0.0).attach(model) as run:
        loss, kl = losses(run, model)
        plain = torch.autograd.grad(loss, run.trainable, retain_graph=True)
        old = torch.autograd.grad(kl, run.trainable, retain_graph=True)
        run.backward(loss, kl)
        for m, a, b in zip(run.trainable, plain, old, strict=True):
            assert b.abs().max() < 1e-6 * a.abs().max()  # 0 but for rounding
            told = a.abs() > 1e4 * b.abs()  # elsewhere the task has no gradient either
            assert torch.equal(m.grad[told], a[told]) and told.float().mean() > 0.9


def test_gradients_accumulate_and_other_leaves_get_the_plain_gradient_of_the_loss():
    model, prompt = vit(), nn.Parameter(torch.zeros(1, 1, 16, 16))
    with RAmt(drop_lambda=1.0).attach(model, seed=1) as run:
        shake(run)

        def both():
            logits = model(X + prompt)
            with run.original():
                teacher = model(X)
            return F.cross_entropy(logits, Y), run.kl_loss(logits, teacher)

        (plain,) = torch.autograd.grad(both()[0], prompt)
        run.backward(*both())
        first, run.step = [m.grad.clone() for m in run.trainable], 0
        run.backward(*both())
        for before, m in zip(first, run.trainable, strict=True):
            torch.testing.assert_close(m.grad, 2 * before)
        torch.testing.assert_close(prompt.grad, 2 * plain)


def test_one_forward_serves_both_gradients_so_dropout_is_the_same_for_both():
    model = bert().train()
    ids = torch.arange(12).view(2, 6)
    with RAmt(drop_lambda=1.0, norm_weight=0.0).attach(model) as run:
        out = model(ids).last_hidden_state.mean(1)
        loss = out.square().sum()
        run.backward(loss, loss)  # the same loss twice: everything agrees, so nothing may drop
        first = [m.grad.clone() for m in run.trainable]
        grads = [m.grad for m in run.trainable]
        for m in run.trainable:
            m.grad = None
        assert all(g.abs().sum() > 0 for g in grads)
        torch.manual_seed(0)
        out = model(ids).last_hidden_state.mean(1)
        loss = out.square().sum()
        plain = torch.autograd.grad(loss, run.trainable, retain_graph=True)
        run.backward(loss, loss)
        assert all(torch.equal(m.grad, g) for m, g in zip(run.trainable, plain, strict=True))
        assert not all(torch.equal(m.grad, g) for m, g in zip(run.trainable, first, strict=True))  # dropout was on


def test_the_teacher_is_the_original_in_eval_mode_without_gradient():
    model = bert()
    ids = torch.arange(12).view(2, 6)
    plain = model(ids).last_hidden_state.detach()
    model.train()
    with RAmt().attach(model) as run:
        shake(run)
        with run.original():
            got = model(ids).last_hidden_state
        assert torch.equal(got, plain) and not got.requires_grad
        assert all(module.training for module in model.modules())
        model.eval()
        assert not torch.equal(model(ids).last_hidden_state, plain)


def test_backward_refuses_a_missing_teacher_and_gradients_that_are_not_finite():
    model = vit()
    with RAmt().attach(model) as run:
        loss, kl = losses(run, model)
        with pytest.raises(BadInput, match="kl_loss"):
            run.backward(loss)
        with pytest.raises(BadInput, match="kl_loss"):
            run.backward(loss, kl.detach())
        with pytest.raises(BadInput, match=r"blocks\.0\.attention\.query\.weight: .*NaN"):
            run.backward(loss * float("nan"), kl)
        assert all(m.grad is None for m in run.trainable) and run.step == 0
    with AMT.attach(model) as run:
        run.backward(F.cross_entropy(model(X), Y))
        assert all(m.grad is not None for m in run.trainable)


def test_without_data_gradient_and_norm_weight_nothing_moves_and_the_norm_alone_does_under_adam():
    for weight, moves in ((0.0, False), (1e-4, True)):
        model = vit()
        with RAmt(norm_weight=weight, drop_lambda=0.0).attach(model) as run:
            optimizer = torch.optim.Adam(run.trainable, lr=1e-3)
            for _ in range(8):
                optimizer.zero_grad()
                run.backward(model(X).sum() * 0)
                optimizer.step()
            assert (run.report().dropped > 0) == moves
            assert all((m != 0.01).all() if moves else (m == 0.01).all() for m in run.trainable)


# --- tied weights and refusals -------------------------------------------------------------------------------------


def test_a_tied_weight_has_one_score_and_the_gradient_of_both_places():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    with RAmt(where="1.weight", norm_weight=0.0, drop_lambda=0.0).attach(model) as run:
        assert list(run.masks()) == ["0.weight"] and len(run.trainable) == 1
        x = torch.randn(4, 3, generator=generator(0))
        run.backward(model(x).square().sum())
        weight = run.found["0.weight"].value.clone().requires_grad_()
        F.linear(F.linear(x, weight), weight).square().sum().backward()
        torch.testing.assert_close(run.trainable[0].grad, (weight * weight.grad).detach())
        with torch.no_grad():
            run.trainable[0][0] = 0.0
        assert (model[0].weight[0] == 0).all() and (model[1].weight[0] == 0).all()
    assert model[1].weight is model[0].weight


def test_parameters_over_the_same_memory_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    for where in ("0.weight", "1.weight"):
        with pytest.raises(BadInput, match=r"1\.weight: shares its memory with 0\.weight"), RAmt(where=where).attach(model):
            raise AssertionError


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.01},
        {"threshold": 0.02},
        {"threshold": 0.01 - 1e-12},
        {"init": float("nan")},
        {"init": float("inf")},
        {"drop_lambda": -0.1},
        {"drop_lambda": 1.1},
        {"temperature": 0.0},
        {"norm_weight": -1.0},
        {"where": ()},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match="r_amt"):
        RAmt(**wrong)


def test_models_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="Sequential has no weight that 'attention' matches"):
        RAmt().attach(nn.Sequential(nn.Linear(2, 2))).__enter__()
    with pytest.raises(BadInput, match="'nowhere'"):
        RAmt(where=("attention", "nowhere")).attach(vit()).__enter__()
    model = vit()
    with RAmt().attach(model), pytest.raises(BadInput, match="parametrization already"):
        RAmt().attach(model).__enter__()
    with torch.no_grad():
        model.blocks[1].attention.out.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"blocks\.1\.attention\.out\.weight"):
        RAmt().attach(model).__enter__()
    assert not any(hasattr(m, "parametrizations") for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
