import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.models import Vit
from maskwright.updates.snella import Snella
from maskwright.updates.snella.allocate import Importance, share_out
from maskwright.updates.snella.kernel import KernelUpdate, distance, gate_abs, gate_binary, gate_relu

SIGNS = torch.tensor([0.1, -0.1])


def layer(shape=(12, 20), count=48, **options):
    wanted = {"rank": 4, "heads": 2, "kernel": "distance", "gate": "binary", "scale": 0.1, "seed": 0, "name": "a"}
    return KernelUpdate(shape, count=count, **{**wanted, **options})


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), nn.Linear(8, 3)).eval()


def batch(rows=16):
    return torch.randn(rows, 8, generator=generator(0))


def test_kernel_values():
    P, Q = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert float(distance(P, Q, SIGNS[:1])) == pytest.approx(0.5)
    assert not bool(distance(P.repeat(2, 1, 1), Q.repeat(2, 1, 1), SIGNS).any())  # the signs cancel
    P, Q = torch.randn(2, 5, 3, generator=generator(1)), torch.randn(2, 4, 3, generator=generator(2))
    K = distance(P, Q, SIGNS)
    for i in range(5):
        for j in range(4):
            want = 0.1 * (P[0, i] - Q[0, j]).norm() - 0.1 * (P[1, i] - Q[1, j]).norm()
            assert float(K[i, j]) == pytest.approx(float(want), abs=1e-6)


def test_mix_is_the_distance_a_softmax_over_outputs_and_a_constant():
    plain, mixed = layer(), layer(kernel="mix")
    D = plain.values()
    torch.testing.assert_close(mixed.values(), D + torch.softmax(D, -1))
    with torch.no_grad():
        mixed.alpha.fill_(2), mixed.beta.fill_(0.5), mixed.log_gamma.fill_(-3)
    torch.testing.assert_close(mixed.values(), D + 2 * torch.softmax(D / torch.tensor(-3.0).exp(), -1) + 0.5)
    rows = layer(kernel="mix").values() - D
    torch.testing.assert_close(rows.mean(1), torch.full((20,), 1 / 12))  # rows gain 1 / outputs on average


def test_gamma_never_reaches_zero_nor_changes_sign():
    mixed = layer(kernel="mix")
    with torch.no_grad():
        mixed.log_gamma.fill_(-8.0)
    assert bool(torch.isfinite(mixed.values()).all())


def test_the_rank_is_not_bounded_by_that_of_the_matrices():
    shape = (48, 64)
    rank = {k: int(torch.linalg.matrix_rank(layer(shape, kernel=k).values().detach())) for k in ("lora", "distance", "mix")}
    assert rank["lora"] == 4 and rank["distance"] > 16 and rank["mix"] > 16


def test_lora_kernel_is_one_product_of_the_whole_rank():
    part = layer(kernel="lora")
    P, Q = part.P.transpose(0, 1).flatten(1), part.Q.transpose(0, 1).flatten(1)
    torch.testing.assert_close(part.values(), P @ Q.T)


def test_parameters_are_as_many_as_loras():
    with Snella(rank=4, kernel="distance", density=0.5).attach(net()) as run:
        assert sum(p.numel() for p in run.trainable) == 4 * (8 + 12) * 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_exactly_the_count_stays_and_it_is_the_largest(outputs, inputs, data):
    count = data.draw(st.integers(0, outputs * inputs))
    part = layer((outputs, inputs), count)
    K = part.values().detach()
    kept = part.keep(K)
    assert int(kept.sum()) == count
    if 0 < count < K.numel():
        tau = K.abs()[~kept].max()
        assert bool((K.abs()[kept] >= tau).all())
        assert count == K.numel() - int((K.abs() <= tau).sum())  # n - #(|K| <= tau), K being continuous
    assert int((part.delta() != 0).sum()) == count
    assert part.delta().shape == (outputs, inputs)  # rectangular: a transposed update would not fit


def test_nan_is_refused_by_name():
    part = layer(name="blocks.0.up.weight")
    part.P.data[0, 0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"blocks.0.up.weight: .* NaN"):
        part.delta()


def test_density_one_and_a_binary_gate_are_the_dense_kernel():
    part = layer(count=240)
    assert torch.equal(part.delta(), part.values().T)


def test_gates():
    K = torch.tensor([[3.0, -2.0, 1.0, -0.5]], requires_grad=True)
    keep = torch.tensor([[True, True, False, False]])
    assert gate_abs(K, keep).tolist() == [[9.0, -4.0, 0.0, 0.0]]
    assert gate_binary(K, keep).tolist() == [[3.0, -2.0, 0.0, 0.0]]
    assert gate_relu(K, keep).tolist() == [[6.0, -2.0, 0.0, 0.0]]  # tau = 1
    assert gate_relu(K, torch.ones_like(keep)).tolist() == [[9.0, -4.0, 1.0, -0.25]]  # nothing dropped: tau = 0


@pytest.mark.parametrize(
    ("gate", "factor"), [(gate_abs, [3, 2, 0, 0]), (gate_binary, [1, 1, 0, 0]), (gate_relu, [2, 1, 0, 0])]
)
def test_gradients_reach_kept_entries_only_and_not_through_the_gate(gate, factor):
    K = torch.tensor([3.0, -2.0, 1.0, -0.5], requires_grad=True)
    keep = torch.tensor([True, True, False, False])
    up = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (gate(K, keep) * up).sum().backward()
    assert K.grad.tolist() == [f * u for f, u in zip(factor, up.tolist(), strict=True)]


def test_the_whole_layers_gradient_is_autograds_of_k_abs_k_mask():
    part, G = layer(gate="abs"), torch.randn(12, 20, generator=generator(5))
    (part.delta() * G).sum().backward()
    got = [part.P.grad.clone(), part.Q.grad.clone()]
    part.zero_grad()
    K = part.values()
    (K * K.abs().detach() * part.keep(K) * G.T).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(got, (part.P.grad, part.Q.grad), strict=True))
    double = copy.deepcopy(part).double()
    signs, P, Q = double.signs.double(), double.P, double.Q
    assert torch.autograd.gradcheck(lambda p, q: distance(p, q, signs), (P, Q))


def test_equal_rows_have_a_finite_gradient():
    P = torch.zeros(2, 3, 2, requires_grad=True)
    Q = torch.zeros(2, 4, 2, requires_grad=True)
    distance(P, Q, SIGNS).sum().backward()
    assert not bool(P.grad.any()) and not bool(Q.grad.any())


def test_at_the_start_the_update_is_small_but_not_zero_unless_zero_is_asked_for():
    model, x = net(), batch()
    base = model(x)
    with Snella(rank=4, density=0.5, first=0.9, epochs=4).attach(model):
        assert not torch.allclose(model(x), base)
    for kernel in ("distance", "lora"):
        with Snella(rank=4, kernel=kernel, gate="binary", zero=True, allocate=False, density=0.5).attach(model) as run:
            assert torch.equal(model(x), base)
            model(x).square().sum().backward()
            assert any(bool(p.grad.any()) for p in run.trainable)  # and it can be left
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kernel", ["mix", "distance", "lora"])
@pytest.mark.parametrize("gate", ["abs", "binary", "relu"])
def test_one_merged_weight_is_the_two_branches(kernel, gate):
    model, x = net(), batch()
    base = copy.deepcopy(model)
    with Snella(rank=4, kernel=kernel, gate=gate, allocate=False, density=0.3).attach(model, seed=1) as run:
        part = run.layers["0.0.weight"]
        two = base[0][0](x) + x @ part.delta().T  # W x + b and S x apart
        torch.testing.assert_close(model[0][0](x), two, rtol=1e-5, atol=1e-5)
        attached = model(x)
        masks = run.masks()
        run.merge()
    torch.testing.assert_close(model(x), attached, rtol=1e-5, atol=1e-5)
    for name, mask in masks.items():
        moved = model.get_parameter(name) != base.get_parameter(name)
        assert not bool((moved & ~mask.keep).any()) and mask.count == round(0.3 * 96)


def test_budget_of_two_layers():
    assert share_out({"a": 10, "b": 100}, {"a": 0.9, "b": 0.1}, 50) == {"a": 10, "b": 40}
    assert share_out({"a": 10, "b": 30}, {"a": 0.0, "b": 0.0}, 20) == {"a": 5, "b": 15}  # nothing known yet: uniform
    assert share_out({"a": 10, "b": 30}, {"a": 0.0, "b": 1.0}, 40) == {"a": 10, "b": 30}
    assert share_out({"a": 4, "b": 4}, {"a": 1.0, "b": 1.0}, 3) == {"a": 2, "b": 1}  # a tie: the lower one
    for total in (-1, 41):
        with pytest.raises(BadInput, match="cannot be kept"):
            share_out({"a": 10, "b": 30}, {"a": 1.0, "b": 1.0}, total)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="b: a layer's score"):
            share_out({"a": 10, "b": 30}, {"a": 1.0, "b": bad}, 4)


sizes_and_scores = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1e6)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(sizes_and_scores, st.data())
def test_shares_sum_exactly_fit_and_are_in_proportion(pairs, data):
    sizes = {str(i): n for i, (n, _) in enumerate(pairs)}
    scores = {str(i): s for i, (_, s) in enumerate(pairs)}
    total = data.draw(st.integers(0, sum(sizes.values())))
    counts = share_out(sizes, scores, total)
    assert sum(counts.values()) == total and all(0 <= counts[name] <= sizes[name] for name in sizes)
    free = [name for name in sizes if 0 < counts[name] < sizes[name] - 1 and scores[name] > 0]
    for name in free[1:]:
        ratio = Fraction(scores[name]) / Fraction(scores[free[0]])
        assert abs(counts[name] - ratio * counts[free[0]]) <= 1 + ratio


def test_budget_over_epochs():
    with Snella(rank=4, density=0.2, first=0.8, epochs=10, recompute=False).attach(net()) as run:
        n = sum(run.sizes.values())
        first, final = round(0.8 * n), round(0.2 * n)
        assert run.budget(0) == first and run.budget(10) == final and run.budget(11) == final
        assert run.budget(5) == int(final + (first - final) / 8)
        budgets = [run.budget(e) for e in range(11)]
        assert budgets == sorted(budgets, reverse=True)
        for e in range(11):
            assert sum(run.epoch(e).values()) == run.budget(e) == run.masks().count
    with Snella(rank=4, density=0.2, first=0.8, epochs=10, warm=2, last=3).attach(net()) as run:
        assert run.budget(2) == first and run.budget(7) == final and final < run.budget(3) < first


def test_importance_is_the_papers_running_means():
    part = layer(count=10)
    part.P.grad, part.Q.grad = torch.ones_like(part.P), torch.full_like(part.Q, 2.0)
    part.P.grad[0, 0, 0] = float("nan")
    watch = Importance(0.85, 0.7)
    watch.observe({"a": part})
    watch.observe({"a": part})
    want = 0.0
    for value, grad in ((part.P.detach(), part.P.grad), (part.Q.detach(), part.Q.grad)):
        I = (value * grad).abs().nan_to_num(0)  # noqa: E741
        mean, spread = torch.zeros_like(I), torch.zeros_like(I)
        for _ in range(2):
            mean = 0.85 * mean + 0.15 * I
            spread = 0.7 * spread + 0.3 * (I - mean).abs()
        want += float((mean * spread).mean())
    assert watch.scores({"a": 0})["a"] == pytest.approx(want, rel=1e-4)
    assert Importance(0.85, 0.85).scores({"a": 0}) == {"a": 0.0}
    with pytest.raises(BadInput, match="a: no gradient"):
        watch.observe({"a": layer()})


def test_layers_that_matter_keep_more():
    """Only the second layer gets a gradient: all that the budget leaves goes there, and the sum is the budget."""
    model = net()
    with Snella(rank=4, density=0.25, first=0.5, epochs=2).attach(model) as run:
        for _ in range(3):
            model(batch()).sum().backward()
            run.layers["0.0.weight"].P.grad.zero_()
            run.layers["0.0.weight"].Q.grad.zero_()
            run.observe()
        assert run.epoch(1) == {"0.0.weight": 0, "0.2.weight": run.budget(1)}
        assert run.masks()["0.0.weight"].count == 0
        model(batch())  # an empty update is the base


def test_recompute_keeps_no_matrix_for_backward_and_gives_the_same_gradients():
    grads, biggest = [], []
    for recompute in (True, False):
        model = Vit(16, 4, layers=1, width=32, heads=2, seed=0)
        x = torch.rand(2, 1, 16, 16, generator=generator(0))
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel() if tensor.ndim == 2 and min(tensor.shape) >= 32 else 0)
            return tensor

        with Snella(rank=4, density=0.5, allocate=False, recompute=recompute).attach(model) as run:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model(x).square().sum()
            loss.backward()
            grads.append([p.grad for p in run.trainable])
            biggest.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert biggest[0] < biggest[1] / 4


def test_a_head_is_trained_whole_and_a_ragged_layer_works():
    model, x = net(), batch()
    head = model[1].weight.detach().clone()
    with Snella(rank=4, density=0.5, first=0.9, epochs=3, train=("1",)).attach(model) as run:
        assert any(p is model[1].weight for p in run.trainable)
        optimizer = torch.optim.AdamW(run.trainable, lr=0.01)
        losses = []
        for epoch in range(3):
            run.epoch(epoch)
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), torch.arange(16) % 3)
                loss.backward()
                run.observe()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0]
        run.merge()
    assert not torch.equal(model[1].weight, head)


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 5}, {"rank": 0}, {"heads": 0}, {"density": 0.0}, {"density": 1.5}, {"density": 0.5, "first": 0.4},
        {"first": 1.2}, {"kernel": "rbf"}, {"gate": "soft"}, {"scale": 0.0}, {"scale": float("nan")}, {"beta1": 1.0},
        {"beta2": 0.0},
        {"epochs": 3, "warm": 2, "last": 1}, {"warm": -1}, {"zero": True}, {"zero": True, "gate": "binary"},
        {"zero": True, "gate": "binary", "kernel": "distance", "heads": 1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(BadInput, match="snella"):
        Snella(**bad)


def test_refusals():
    with pytest.raises(BadInput, match="no Linear"), Snella().attach(nn.Sequential(nn.Conv2d(1, 2, 3))):
        pass
    model = net()
    with Snella(rank=4).attach(model), pytest.raises(BadInput, match="a branch already"), Snella(rank=4).attach(model):
        pass
    with pytest.raises(BadInput, match="matches no Linear weight"), Snella(where=("tail",)).attach(model):
        pass
