"""Gates: what forward and backward see, what leaks (nothing), what is left behind (nothing)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskwright.core.errors import BadInput
from maskwright.core.gate import Gate, Learned, Ste, gated, hard, ste
from maskwright.core.mask import Mask
from maskwright.core.pattern import NM, Block, Unstructured
from maskwright.core.select import generator, select

KEEP = torch.tensor([[True, False, True], [False, True, True]])
GATES = [hard, ste(), ste(0.1)]


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def gradient(gate: Gate, upstream: Tensor | None = None) -> Tensor:
    weight = torch.arange(1.0, 7).reshape(2, 3).requires_grad_()
    gate.apply(weight, KEEP).backward(torch.full((2, 3), 2.0) if upstream is None else upstream)
    assert weight.grad is not None
    return weight.grad


# --- what a gate computes


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_the_weight_where_kept_and_zero_elsewhere(gate: Gate, dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.5, -2, 3], [-4, 5, -0.0]], dtype=dtype)
    out = gate.apply(weight, KEEP)
    assert out.dtype == dtype and out.tolist() == [[-1.5, 0, 3], [0, 5, 0]]
    assert not bool(torch.signbit(out)[~KEEP].any())  # +0.0: a product would give -0.0
    assert torch.equal(gate.apply(weight, torch.ones_like(KEEP)), weight)


def test_hard_gradient_is_zero_where_dropped() -> None:
    assert gradient(hard).tolist() == [[2, 0, 2], [0, 2, 2]]


@pytest.mark.parametrize("gate", [ste(), ste(0.5)], ids=str)
def test_ste_gradient_is_dense(gate: Gate) -> None:
    assert gradient(gate).tolist() == [[2.0] * 3] * 2  # the decay is the optimiser step's, not backward's


def test_decay_pulls_dropped_weights_only() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.3], [0.2, 4.0, -0.0]], requires_grad=True)
    assert ste().pull(weight, KEEP) is None
    pull = ste(0.1).pull(weight, KEEP)
    assert pull is not None and not pull.requires_grad
    assert torch.allclose(pull, torch.tensor([[0, -0.01, 0], [0.02, 0, 0]]))


def test_gradient_of_the_sheets_example() -> None:
    # papers/sr-ste.md: w = [.5, -.1, .3, .2], 2:4, g = 1, lambda = .1 -> [1, .99, 1, 1.02]
    weight = torch.tensor([[0.5, -0.1, 0.3, 0.2]], requires_grad=True)
    keep = select(weight.detach().abs(), NM(2, 4)).keep
    gate = ste(0.1)
    gate.apply(weight, keep).sum().backward()
    pull = gate.pull(weight, keep)
    assert weight.grad is not None and pull is not None
    assert torch.allclose(weight.grad + pull, torch.tensor([[1, 0.99, 1, 1.02]]))


def test_gradcheck_of_the_hard_gate() -> None:
    weight = torch.randn(2, 3, dtype=torch.float64, generator=generator(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: hard.apply(w, KEEP), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: hard.apply(w, KEEP) ** 2, (weight,))
    # Straight-through is a lie by design; where everything is kept it must be the truth.
    assert torch.autograd.gradcheck(lambda w: ste(0.3).apply(w, torch.ones_like(KEEP)), (weight,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_dropped_weight_that_is_not_finite_does_not_leak(gate: Gate, bad: float) -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[~KEEP] = bad
    with gated([(layer, "weight")], Mask(KEEP), gate):
        out = layer(torch.ones(4, 3))
        assert bool(torch.isfinite(out).all())
        out.sum().backward()
        grad = layer.parametrizations.weight.original.grad
    assert bool(torch.isfinite(grad).all())
    if gate is hard:
        assert grad[~KEEP].tolist() == [0, 0]
    assert gradient(hard, torch.full((2, 3), bad))[~KEEP].tolist() == [0, 0]


# --- hanging a gate on a parameter


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that could tell that a gate was here."""
    return {
        "keys": list(module.state_dict()),
        "parameters": [(name, id(parameter)) for name, parameter in module.named_parameters(remove_duplicate=False)],
        "values": [value.clone() for value in module.state_dict().values()],
        "modules": [(name, type(part).__name__, type(part).__mro__[1]) for name, part in module.named_modules()],
        "attributes": [sorted(part.__dict__) for part in module.modules()],
        "hooks": [[len(v) for k, v in sorted(part.__dict__.items()) if "hooks" in k] for part in module.modules()],
        "modes": [part.training for part in module.modules()],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before.pop("values"), after.pop("values"), strict=True))
    assert before == after


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("failing", [False, True])
def test_gated_leaves_no_trace(gate: Gate, failing: bool) -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Conv1d(1, 1, 2)).eval()
    model[0].bias.requires_grad_(False)
    before, weight, values = state(model), model[0].weight, model[0].weight.detach().clone()
    try:
        with gated([(model[0], "weight")], Mask(KEEP), gate) as slot:
            assert parametrize.is_parametrized(model[0], "weight")
            assert torch.equal(model[0].weight, values * KEEP) and slot.mask.equal(Mask(KEEP))
            if failing:
                raise RuntimeError("in the user's loop")
    except RuntimeError:
        assert failing
    assert (model[0].weight is weight and type(model[0]) is nn.Linear) or type(model[0]).__name__ == "Linear"
    assert not parametrize.is_parametrized(model[0])
    assert_same(before, state(model))
    assert isinstance(model[0], nn.Linear) and repr(model[0]) == repr(linear())


def test_the_optimiser_keeps_its_parameter_and_its_order() -> None:
    layer = linear()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    before = layer.weight.detach().clone()
    with gated([(layer, "weight")], Mask(KEEP)):
        layer(torch.ones(1, 3)).sum().backward()
        optimiser.step()
    assert [id(p) for p in layer.parameters()] == held  # indices of a saved optimiser state still mean the same
    assert torch.equal(layer.weight[~KEEP], before[~KEEP])  # the gate hides dropped weights, it does not wipe them
    assert torch.allclose(layer.weight[KEEP], before[KEEP] - 0.5)


def test_tied_parameters_share_one_gate() -> None:
    a, b = linear(0), linear(1)
    b.weight = a.weight
    model = nn.ModuleList([a, b])
    before, weight = state(model), a.weight
    with gated([(a, "weight"), (b, "weight")], Mask(KEEP)) as slot:
        assert torch.equal(a.weight, b.weight) and bool((a.weight[~KEEP] == 0).all())
        (a.weight.sum() + b.weight.sum()).backward()
        assert weight.grad is not None and weight.grad.tolist() == (2.0 * KEEP).tolist()
        slot.mask = Mask(~KEEP)
        assert torch.equal(a.weight != 0, ~KEEP) and torch.equal(b.weight, a.weight)
    weight.grad = None
    assert a.weight is b.weight is weight
    assert_same(before, state(model))


def test_several_gates_on_one_module_come_off_alone() -> None:
    layer, bias = linear(), torch.tensor([True, False])
    before = state(layer)
    with gated([(layer, "weight")], Mask(KEEP)):
        with gated([(layer, "bias")], Mask(bias)):
            assert bool((layer.bias[~bias] == 0).all()) and bool((layer.weight[~KEEP] == 0).all())
        assert parametrize.is_parametrized(layer, "weight") and not parametrize.is_parametrized(layer, "bias")
        with gated([(layer, "weight")], Mask(~KEEP)):
            assert bool((layer.weight == 0).all())  # a mask over a mask
        assert torch.equal(layer.weight != 0, KEEP)
    assert_same(before, state(layer))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_of_others_stay() -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Doubled())
    before, value = state(layer), layer.weight.detach().clone()
    with gated([(layer, "weight")], Mask(KEEP)):
        assert torch.equal(layer.weight, value * KEEP)
    assert torch.equal(layer.weight, value)
    assert_same(before, state(layer))


def test_the_state_dict_under_a_gate_holds_the_weight_and_no_mask() -> None:
    layer = linear()
    with gated([(layer, "weight")], Mask(KEEP)):
        assert sorted(layer.state_dict()) == ["bias", "parametrizations.weight.original"]


def test_a_copy_made_under_a_gate_is_its_own() -> None:
    layer = linear()
    with gated([(layer, "weight")], Mask(KEEP)):
        twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight * KEEP)
    assert bool((layer.weight[~KEEP] != 0).all())


def test_masks_of_another_shape_are_refused_and_nothing_hangs() -> None:
    layer = linear()
    before = state(layer)
    for keep in (KEEP[:1], KEEP.T, KEEP[0]):  # two of them would broadcast
        with pytest.raises(BadInput, match=r"weight: mask of shape .* on a weight of shape \(2, 3\)"):
            with gated([(layer, "weight")], Mask(keep)):
                pass
    with gated([(layer, "weight")], Mask(KEEP)) as slot:
        with pytest.raises(BadInput, match="mask of shape"):
            slot.mask = Mask(KEEP.T)
        assert slot.mask.equal(Mask(KEEP))
    assert_same(before, state(layer))


def test_the_gate_does_not_follow_the_callers_tensor() -> None:
    layer, keep = linear(), KEEP.clone()
    with gated([(layer, "weight")], Mask(keep)) as slot:
        keep.fill_(False)
        assert torch.equal(slot.keep, KEEP)


def test_setting_the_mask_takes_its_pattern_too() -> None:
    layer = nn.Linear(4, 2)
    with gated([(layer, "weight")], Mask(torch.ones(2, 4).bool())) as slot:
        slot.mask = select(layer.weight.detach().abs(), NM(1, 4))
        assert slot.mask.pattern == NM(1, 4) and int((layer.weight != 0).sum()) == 2


# --- Learned

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0], [0.0, 0.0, -2.0, 1.0]])


def test_soft_values_are_the_relaxed_logits() -> None:
    learned = Learned(LOGITS, Unstructured(), 4)
    assert torch.equal(learned.values(), torch.sigmoid(LOGITS))
    assert torch.equal(learned(torch.full((2, 4), 2.0)), 2 * torch.sigmoid(LOGITS))
    assert torch.equal(Learned(LOGITS, Unstructured(), 4, relax=lambda x: x.clamp(0, 1)).values(), LOGITS.clamp(0, 1))
    assert list(learned.state_dict()) == ["logits"] and learned.logits.data_ptr() != LOGITS.data_ptr()


@pytest.mark.parametrize(
    ("pattern", "counts", "kept"),
    [
        (Unstructured(), 3, [0, 3, 7]),
        (Unstructured((0,)), torch.tensor([1, 2]), [3, 4, 7]),  # the tie of row 1 stays at the lower index
        (NM(1, 4), None, [3, 7]),
        (Block((2, 2)), 1, [2, 3, 6, 7]),
    ],
    ids=str,
)
def test_harden_is_exact(pattern: Any, counts: Any, kept: list[int]) -> None:
    mask = Learned(LOGITS, pattern, counts).harden()
    assert mask.check().indices().tolist() == kept and mask.pattern == pattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_straight_is_hard_forward_and_soft_backward(dtype: torch.dtype) -> None:
    logits = torch.randn(30, 40, generator=generator(0)).to(dtype)
    plain, straight = Learned(logits, NM(1, 4)), Learned(logits, NM(1, 4), straight=True)
    assert torch.equal(straight.values(), straight.harden().keep.to(dtype))  # exactly 0 and 1
    upstream = torch.randn(30, 40, generator=generator(1)).to(dtype)
    for learned in (plain, straight):
        (learned(torch.full((30, 40), 3.0, dtype=dtype)) * upstream).sum().backward()
    assert torch.equal(plain.logits.grad, straight.logits.grad)
    assert bool((straight.logits.grad != 0)[~straight.harden().keep].any())  # dropped ones learn too


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value=st.floats(0, 1, width=32))
def test_straight_values_are_exact_for_any_soft_value(value: float) -> None:
    learned = Learned(torch.tensor([value, value]), Unstructured(), 1, relax=lambda x: x, straight=True)
    assert learned.values().tolist() == [1.0, 0.0]


def test_gradcheck_of_soft_values() -> None:
    learned = Learned(LOGITS.double(), Unstructured(), 4)
    weight = torch.randn(2, 4, dtype=torch.float64, generator=generator(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, _: learned(w), (weight, learned.logits))


def test_learning_moves_the_mask() -> None:
    target = torch.tensor([[0.0, 0, 0, 5], [0, 5, 0, 0]])
    learned = Learned(torch.zeros(2, 4), NM(1, 4), straight=True)
    optimiser = torch.optim.SGD(learned.parameters(), lr=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        ((learned(torch.full((2, 4), 5.0)) - target) ** 2).sum().backward()
        optimiser.step()
    assert torch.equal(learned.harden().keep, target > 0)


def test_learned_refuses() -> None:
    with pytest.raises(BadInput, match="not divisible"):
        Learned(torch.zeros(2, 6), NM(2, 4))
    with pytest.raises(BadInput, match="give counts"):
        Learned(LOGITS, Unstructured()).harden()
    with pytest.raises(BadInput, match="NaN"):
        Learned(LOGITS * math.nan, Unstructured(), 1).harden()


def test_ste_is_a_value() -> None:
    assert ste(0.2) == Ste(0.2) != ste()
