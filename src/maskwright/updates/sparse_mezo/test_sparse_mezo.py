"""The sheet's exact checks, and what a run must never do: move a dropped weight, leave a trace."""

import copy

import pytest
import torch
from torch import nn

from maskwright.core.budget import whole
from maskwright.core.select import generator
from maskwright.updates.noise import normal
from maskwright.updates.sparse_mezo import SparseMezo, sites

BATCH = torch.randn(16, 12, generator=generator(0, "batch"))


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Dropout(0.5), nn.ReLU(), nn.Linear(20, 12))


def loss_of(model):
    return lambda: (model(BATCH) - BATCH).square().mean()


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32).clone()


class Theta(nn.Module):
    """One row of weights, for losses written by hand."""

    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([values], dtype=dtype))


def fixed_noise(monkeypatch, values):
    def known(seed, name, start, stop, *, out):
        return out.copy_(torch.tensor(values[start:stop], dtype=out.dtype))

    monkeypatch.setattr(sites, "normal", known)


def test_all_ones_is_mezo_to_the_bit():
    ends = []
    for method in (
        SparseMezo(mask="dense"),
        SparseMezo(density=1.0),
        SparseMezo(density=1.0, mask="random", refresh="step"),
    ):
        model = net()
        with method.attach(model, seed=3) as run:
            for _ in range(4):
                run.step(loss_of(model), lr=1e-2)
        ends.append(weights(model))
    for other in ends[1:]:
        assert all(torch.equal(bits(other[name]), bits(value)) for name, value in ends[0].items())


def test_mezo_by_hand_with_the_same_noise():
    model, twin, eps, lr = net(), net().eval(), 1e-3, 1e-2
    with SparseMezo(mask="dense", eps=eps, lr=lr).attach(model, seed=5) as run:
        step = run.step(loss_of(model))
    seed = run.log.rows[0].seeds[0]
    with torch.no_grad():
        z = {name: normal(seed, name, 0, p.numel()).view(p.shape) for name, p in twin.named_parameters()}
        for scale, losses in ((eps, []), (-2 * eps, [])):
            for name, parameter in twin.named_parameters():
                parameter.add_(scale * z[name])
            losses.append(float(loss_of(twin)()))
            z["loss", scale] = losses[0]
        slope = (z["loss", eps] - z["loss", -2 * eps]) / (2 * eps)
        for name, parameter in twin.named_parameters():
            parameter.add_(eps * z[name])
            parameter.add_(-lr * slope * z[name])
    assert step.gradient == slope and step.loss == (z["loss", eps] + z["loss", -2 * eps]) / 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_round_trip_comes_back(snapshot, n):
    model = net()
    before = weights(model)
    with SparseMezo(density=0.5, snapshot=snapshot, n=n).attach(model) as run:
        run.step(loss_of(model), lr=0.0)
    for name, value in model.named_parameters():
        # Three roundings a direction, each at most half a last bit of a value near |w| + eps |z|.
        bound = 3 * n * (before[name].abs() + 7e-3) * torch.finfo(torch.float32).eps / 2
        assert bool(((value - before[name]).abs() <= bound).all())
        assert not snapshot or torch.equal(value, before[name])


@pytest.mark.parametrize("refresh", ["start", "step"])
@pytest.mark.parametrize("kind", ["small", "large", "random"])
def test_dropped_weights_keep_every_bit(kind, refresh):
    model = net()
    with torch.no_grad():
        model[0].weight[::2, ::3] = torch.tensor([0.0, -0.0])[torch.arange(40).view(10, 4) % 2]  # both zeros must stay
        model[4].weight[3] = -0.0
    seen = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in model.named_parameters()}
    before = {name: bits(value) for name, value in model.named_parameters()}
    with SparseMezo(density=0.3, mask=kind, refresh=refresh, weight_decay=0.1).attach(model, seed=1) as run:

        def closure():
            for name, mask in run.masks().items():
                seen[name] |= mask.keep
                dropped = ~seen[name]
                now = bits(dict(model.named_parameters())[name])
                assert torch.equal(now[dropped], before[name][dropped])  # perturbed, too
            return loss_of(model)()

        for _ in range(5):
            run.step(closure, lr=1e-2)
    for name, value in model.named_parameters():
        changed = bits(value) != before[name]
        assert not bool((changed & ~seen[name]).any()) and bool(changed.any())


def quadratic(model, a):
    return lambda: 0.5 * float((torch.tensor(a, dtype=torch.float64) * model.theta[0] ** 2).sum())


@pytest.mark.parametrize("eps", [1e-3, 0.5, 3.0])
def test_the_quadratic_in_numbers(monkeypatch, eps):
    lr = 0.01
    fixed_noise(monkeypatch, [1.0, -1.0])
    model = Theta([1.0, 2.0])
    with SparseMezo(mask="dense", eps=eps, lr=lr).attach(model) as run:
        assert run.step(quadratic(model, [1.0, 3.0])).gradient == pytest.approx(-5, rel=1e-6)
    assert model.theta.tolist()[0] == pytest.approx([1 + lr * 5, 2 - lr * 5], rel=1e-6)  # noise is float32
    model = Theta([1.0, 2.0])  # the small one is trained: mask (1, 0)
    with SparseMezo(density=0.5, eps=eps, lr=lr).attach(model) as run:
        assert run.masks()["theta"].keep.tolist() == [[True, False]]
        assert run.step(quadratic(model, [1.0, 3.0])).gradient == pytest.approx(1, rel=1e-6)
    assert model.theta.tolist()[0] == pytest.approx([1 - lr * 1, 2.0], rel=1e-6) and model.theta[0, 1] == 2


def test_weight_decay_by_hand_on_kept_matrix_entries_only(monkeypatch):
    fixed_noise(monkeypatch, [1.0, -1.0])
    model = Theta([1.0, 2.0])
    model.bias = nn.Parameter(torch.tensor([4.0, 5.0], dtype=torch.float64))
    with SparseMezo(density=0.5, lr=0.5, weight_decay=0.25, snapshot=True).attach(model) as run:
        run.step(lambda: 0.0)  # no slope: decay alone
    assert model.theta.tolist() == [[1 - 0.5 * 0.25 * 1, 2.0]] and model.bias.tolist() == [4.0, 5.0]


def test_the_estimate_is_the_masked_gradient_on_average():
    a = torch.tensor([1.0, 3.0, -2.0, 0.5, 1.5, 4.0], dtype=torch.float64)
    start = torch.tensor([0.1, 2.0, -0.3, 4.0, -5.0, 0.2], dtype=torch.float64)
    model, keep = Theta(start.tolist()), torch.tensor([True, False, True, False, False, True])
    want = a * start * keep
    with SparseMezo(density=0.5, lr=0.0, snapshot=True).attach(model, seed=2) as run:
        assert torch.equal(run.masks()["theta"].keep[0], keep)
        steps = [run.step(quadratic(model, a.tolist())) for _ in range(100)]
    # On a quadratic the slope is z' A theta whatever eps is, so what 100 steps found gives 5,000 without their forwards.
    z = torch.stack([normal(row.seeds[0], "theta", 0, 6) for row in run.log.rows]).double() * keep
    assert torch.allclose(z @ want, torch.tensor([step.gradient for step in steps], dtype=torch.float64), atol=1e-6)
    z = torch.stack([normal(seed, "theta", 0, 6) for seed in range(5000)]).double() * keep
    estimates = (z @ want)[:, None] * z
    mean, error = estimates.mean(0), estimates.std(0) / 5000**0.5
    assert bool(((mean - want).abs() <= 4 * error).all()) and bool((mean[~keep] == 0).all())
    # E||g z||^2 = (d + 2) ||m grad||^2 with d trained entries: why a sparse mask allows a larger step.
    assert float(estimates.square().sum(1).mean()) == pytest.approx((3 + 2) * float(want.square().sum()), rel=0.1)


@pytest.mark.parametrize("kind", ["small", "large", "random"])
def test_share_of_ones_and_the_rule_for_vectors(kind):
    model = net()
    constant = nn.Parameter(torch.ones(7, 5))  # a constant matrix: all tied, the lower index stays
    model.register_parameter("constant", constant)
    with SparseMezo(density=0.25, mask=kind).attach(model) as run:
        masks = run.masks().check()
    assert {name: mask.count for name, mask in masks.items() if mask.keep.ndim == 2} == {
        "0.weight": 60, "4.weight": 60, "constant": whole(0.25, 35),
    }  # fmt: skip
    assert all(mask.density == 1 for mask in masks.values() if mask.keep.ndim == 1)
    assert kind == "random" or masks["constant"].keep.flatten().tolist() == [True] * 9 + [False] * 26
    with SparseMezo(density=0.25, mask=kind, vectors="masked").attach(model) as run:
        assert all(mask.count == whole(0.25, mask.keep.numel()) for mask in run.masks().values())
    with SparseMezo(density=0.25, mask=kind, vectors="skipped").attach(model) as run:
        assert set(run.masks()) == {"0.weight", "4.weight", "constant"}


@pytest.mark.parametrize("refresh", ["start", "step"])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_weight_at_the_threshold_has_one_mask_in_a_step(kind, refresh):
    model = Theta([0.1, 0.2, 0.5, 0.5001, 0.9, 1.5], dtype=torch.float32)
    with SparseMezo(density=0.5, mask=kind, refresh=refresh, eps=0.3, lr=0.1).attach(model, seed=4) as run:
        keep, start, seen = run.masks()["theta"].keep[0], model.theta.detach()[0].clone(), []

        def closure():
            seen.append(model.theta.detach()[0].clone())
            return float(model.theta[0, 2] - model.theta[0, 3])

        for _ in range(5):
            keep, start = run.masks()["theta"].keep[0], model.theta.detach()[0].clone()
            run.step(closure)
            moved = [(values != start).tolist() for values in (*seen[-2:], model.theta.detach()[0])]
            # eps |z| takes the two at the border across it; a mask made again from perturbed weights would swap them.
            assert moved == [keep.tolist()] * 3


def test_refresh_step_follows_the_weights_with_the_first_threshold():
    model = Theta([0.1, 0.2, 0.5, 0.9], dtype=torch.float32)
    with SparseMezo(density=0.5, refresh="step").attach(model) as run:
        assert run.masks()["theta"].keep.tolist() == [[True, True, False, False]]
        with torch.no_grad():
            model.theta[0, 0], model.theta[0, 3] = -0.7, 0.05
        assert run.masks()["theta"].keep.tolist() == [[False, True, False, True]]
        with torch.no_grad():
            model.theta[0, 2] = -0.2  # ties with the level, at a higher index than the first mask's last entry
        assert run.step(lambda: 1.0).kept == 2
    with SparseMezo(density=0.5, refresh="step", mask="random").attach(net()) as run:
        first = run.masks()["0.weight"]
        run.step(lambda: 1.0)
        second = run.masks()["0.weight"]
        assert first.count == second.count == 120 and not first.equal(second)


def test_n_directions_are_averaged():
    model, single = net(), net()
    with SparseMezo(mask="dense", n=3, lr=0.1, snapshot=True).attach(model, seed=1) as run:
        step = run.step(loss_of(model))
    (row,) = run.log.rows
    assert len(set(row.seeds)) == 3 and step.gradients == row.gradients
    for name, value in single.named_parameters():
        z = [normal(seed, name, 0, value.numel()).view(value.shape) for seed in row.seeds]
        mean = sum(slope * direction for slope, direction in zip(row.gradients, z, strict=True)) / 3
        assert torch.allclose(dict(model.named_parameters())[name], value - 0.1 * mean, atol=1e-6)


def test_eval_mode_inside_and_the_modes_as_they_were_after():
    model = net().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    inside = []
    with SparseMezo().attach(model) as run:
        run.step(lambda: inside.append([m.training for m in model.modules()]) or 0.0)
        with pytest.raises(ZeroDivisionError):
            run.step(lambda: 1 / 0)
    assert not any(any(row) for row in inside) and [m.training for m in model.modules()] == modes


def test_tied_weights_are_perturbed_once():
    model = nn.ModuleDict(
        {"inlet": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False), "view": nn.Linear(4, 9, bias=False)}
    )
    model["head"].weight = model["inlet"].weight
    model["view"].weight = nn.Parameter(model["inlet"].weight.data)  # another Parameter on the same memory
    start, seen = model["inlet"].weight.detach().clone(), []
    with SparseMezo(mask="dense", where=("head.weight",)).attach(model) as run:
        run.step(lambda: seen.append(model["inlet"].weight.detach() - start) or 0.0)
        assert list(run.masks()) == ["inlet.weight"] and len(run.trainable) == 1
    z = normal(run.log.rows[0].seeds[0], "inlet.weight", 0, 36).view(9, 4)
    assert torch.allclose(seen[0], 1e-3 * z, atol=1e-6)


def test_no_trace_and_same_seed_same_masks():
    model = net()
    keys, before, ids = list(model.state_dict()), weights(model), [id(p) for p in model.parameters()]
    model[0].bias.requires_grad_(False)
    with SparseMezo(mask="random").attach(model, seed=1) as run:
        first = run.masks()
        assert "0.bias" not in first and first.made_by["method"] == "sparse_mezo"
        run.merge()
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    for seed, same in ((1, True), (2, False)):
        with SparseMezo(mask="random").attach(copy.deepcopy(model), seed=seed) as run:
            assert run.masks().equal(first) is same


def test_it_lowers_a_loss():
    model = net()
    before = float(loss_of(model.eval())().detach())
    with SparseMezo(lr=2e-2).attach(model) as run:
        for _ in range(150):
            run.step(loss_of(model))
    assert float(loss_of(model.eval())().detach()) < 0.8 * before
