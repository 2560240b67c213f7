"""Whether a delta fits what it is added to: with others on the model, whole tensors alone, numbers that overflow."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates import Delta, Deltas, add, delta
from maskwright.updates.base import BaseId, around, is_base, quick_id

NAMES = ("0.weight", "1.weight", "2.weight")


def net(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(40, 40) for _ in range(3))).to(dtype)  # more than the 1,024 of a quick id


def moved(base, *names, by=0.5, every=7):
    """The delta of a copy of which each `every`-th entry of the named tensors moved."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        for name in names:
            other.get_parameter(name).view(-1)[::every] += by
    return delta(other, base)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# With others on the model


@pytest.mark.parametrize("check", ["quick", "full"])
def test_a_delta_of_another_net_is_refused_whatever_is_on_the_model(check):
    base = net()
    before = state(base)
    for wrong in (moved(net(1), "1.weight"), moved(net(1), "0.weight")):  # a tensor that lies bare, one that was changed
        with add(base, moved(base, "0.weight"), check=check):
            there = state(base)
            with pytest.raises(BadInput, match=r"\d.weight: the delta was made for another base"):
                add(base, wrong, check=check)
            assert same(base, there)
            add(base, wrong, check="none").undo()
    assert same(base, before)


@pytest.mark.parametrize("check", ["quick", "full"])
def test_deltas_of_one_base_go_on_in_several_calls(check):
    base = net()
    one, two, three = (moved(base, "0.weight", "1.weight", every=k) for k in (2, 3, 5))  # all three meet in entries
    model = net()
    before = state(model)
    held = [add(model, each, check=check) for each in (one, two, three)]
    for name in ("0.weight", "1.weight"):
        wanted = before[name] + one[name].dense() + two[name].dense() + three[name].dense()
        assert torch.allclose(model.get_parameter(name), wanted, atol=1e-6)
    for each in reversed(held):
        each.undo()
    assert same(model, before)


@pytest.mark.parametrize("check", ["quick", "full"])
def test_a_delta_made_on_top_of_another_goes_on_top_of_it(check):
    """A task trained on a language's delta has the base that this made, and not the bare one."""
    base = net()
    language, other = moved(base, "0.weight"), moved(base, "0.weight", every=4)
    with add(base, language):
        task = moved(base, "0.weight", "1.weight", every=3)
    with pytest.raises(BadInput, match="another base"):
        add(base, task, check=check)
    with add(base, language, check=check), add(base, task, check=check):
        pass
    with add(base, language, check=check), add(base, other, check=check), add(base, task, check=check):
        pass  # base + language was there, one call ago
    with add(base, other, check=check), pytest.raises(BadInput, match="0.weight: the delta was made for another base"):
        add(base, task, check=check)


def test_below_a_replaced_tensor_and_under_a_second_name_the_base_is_found():
    base = net()
    first = moved(base, "2.weight")
    with add(base, Deltas({}, {"2.weight": torch.ones(40, 40)})), add(base, first), add(base, moved(base, "2.weight")):
        pass
    tied = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    tied[1].weight = tied[0].weight
    start = tied[0].weight.detach().clone()
    id_ = {"1.weight": BaseId.of(start)}
    with add(tied, moved(tied, "0.weight")):
        add(tied, Deltas({"1.weight": Delta((40, 40), torch.tensor([3]), torch.ones(1))}, base=id_)).undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (1024,), (700, 30)])
def test_the_quick_id_under_layers_is_that_of_the_tensor_that_was_there(shape, dtype):
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=rng).to(dtype)
    value, layers = first.clone(), []
    for share in (0.3, 0.0, 0.9, 1.0):
        where = (torch.rand(value.numel(), generator=rng) < share).nonzero().flatten()
        layers.append((where, value.view(-1)[where].clone()) if share < 1 else (None, value.clone()))
        value.view(-1)[where] += torch.randn(len(where), generator=rng).to(dtype)
    for check in ("quick", "full"):
        assert is_base(value, BaseId.of(first), check, layers=layers) and is_base(value, BaseId.of(value), check)
        assert not is_base(value, BaseId.of(first), check, layers=layers[1:])
    assert quick_id(first) != quick_id(value)


# Whole tensors alone


def head_of(base, **change):
    tuned = {**base.state_dict(), "2.weight": torch.full((40, 40), 0.5), "2.bias": torch.zeros(40)}
    return delta(tuned | change, base, full=("2.*",))


def test_a_head_alone_knows_the_net_it_was_trained_on(tmp_path):
    base = net()
    head = head_of(base)
    assert not len(head) and set(head.full) == {"2.weight", "2.bias"} and list(head.base) == ["0.weight", "1.weight"]
    head.save(tmp_path / "head.safetensors")
    back = Deltas.load(tmp_path / "head.safetensors")
    assert back.base == head.base
    with pytest.raises(BadInput, match="0.weight: the delta was made for another base"):
        add(net(1), back)
    with add(net(1), back, check="none") as on:
        assert (on.model[2].weight == 0.5).all()
    other = net()
    nn.init.zeros_(other[2].weight)  # a fresh head, as every run has its own: it is replaced
    with add(other, back):
        assert (other[2].weight == 0.5).all()
    with add(other, moved(base, "0.weight")), add(other, back):
        pass  # and with a language on
    smaller = net()
    del smaller[1]  # and its last is then the second
    smaller.add_module("2", smaller.pop(1))
    with pytest.raises(BadInput, match="1.weight: the delta was made for another base"):
        add(smaller, back)
    assert list(head_of(base, **{"0.bias": torch.ones(40)}).base) == ["0.bias"]  # what changed tells enough


def test_a_file_of_whole_tensors_without_ids_is_still_read_and_added(tmp_path):
    Deltas({}, {"2.bias": torch.ones(40)}).save(tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as handle:
        assert "around" not in handle.metadata()["maskwright"]  # the form that was always written
    with add(net(1), Deltas.load(tmp_path / "old.safetensors")) as on:
        assert (on.model[2].bias == 1).all()


def test_which_tensors_tell_the_base():
    many = {f"{i}.{part}": shape for i in range(100) for part, shape in (("weight", (4, 4)), ("bias", (4,)))}
    found = around(many)
    assert len(found) == 16 and found[0] == "0.weight" and found[-1] == "99.weight"
    assert all(name.endswith("weight") for name in found) and found == sorted(found, key=list(many).index)
    assert around({"a": (3,), "b": ()}) == ["a", "b"] and around({}) == []


# Numbers that are none


def test_coefficients_are_finite():
    base = net()
    d, before = moved(base, "0.weight"), state(base)
    for factor in (math.nan, math.inf, -math.inf):
        with pytest.raises(BadInput, match="a coefficient is a finite number"):
            add(base, (d, factor))
        with pytest.raises(BadInput, match="a coefficient is a finite number"):
            add(base, (d, MaskSet({}), factor))
    assert same(base, before)


def test_whole_tensors_are_finite(tmp_path):
    base = net()
    broken = {**base.state_dict(), "2.bias": torch.tensor([math.nan, math.inf, *range(38)])}
    with pytest.raises(BadInput, match=r"2.bias: 2 entries of a tensor stored whole are NaN or infinite"):
        delta(broken, base, full=("2.bias",))
    whole = torch.ones(40)
    held = Deltas({}, {"2.bias": whole})
    whole[3] = math.nan  # after it was looked at
    held.save(tmp_path / "d.safetensors")
    with pytest.raises(BadInput, match=r"d.safetensors: 2.bias: 1 entries of a tensor stored whole"):
        Deltas.load(tmp_path / "d.safetensors")
    with pytest.raises(BadInput, match="2.bias: 1 entries that replace the base's are NaN or infinite in float32"):
        add(base, held)
    half = net(dtype=torch.float16)
    with pytest.raises(BadInput, match="2.bias: 40 entries that replace the base's are NaN or infinite in float16"):
        add(half, Deltas({}, {"2.bias": torch.full((40,), 70_000.0)}))
    with pytest.raises(BadInput, match="full 'head.\\*' matches no tensor; names look like 0.weight, 0.bias"):
        delta(net(), net(), full=("head.*",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_that_does_not_fit_is_refused_and_taken_off(dtype):
    base = net(dtype=dtype)
    most = torch.finfo(dtype).max
    with torch.no_grad():
        base[1].weight[0, :3] = most
    before = state(base)
    one = Deltas({"0.weight": Delta((40, 40), torch.arange(5), torch.ones(5))})
    at, value = torch.tensor([0, 1, 1000]), torch.tensor([most, -1.0, 0.5], dtype=dtype)
    wide = Deltas({"1.weight": Delta((40, 40), at, value), "2.weight": Delta((40, 40), at, value)})
    with pytest.raises(BadInput, match=f"1.weight: 1 sums are NaN or infinite in {str(dtype)[6:]}"):
        add(base, one, wide)
    assert same(base, before)
    add(base, one)  # nothing of the call was noted
    with add(base, (wide, 0.0)), add(base, (one * 2, 0.5)):
        pass
    with torch.no_grad():
        base[0].weight[0, 0] = math.nan
    with pytest.raises(BadInput, match="0.weight: 1 sums are NaN"):
        add(base, one * 3)


# Twice


def test_a_delta_counts_once_in_a_call():
    base = net()
    d = moved(base, "0.weight", "1.weight")
    before = state(base)
    for terms in ((d, d), (d, (d, 0.5)), (Deltas(dict(d.deltas)), d)):
        with pytest.raises(BadInput, match="a delta is given twice, and would count twice"):
            add(base, *terms)
        assert same(base, before)
    upper = MaskSet({"0.weight": Mask(torch.ones(40, 40, dtype=torch.bool).triu())})
    lower = MaskSet({"0.weight": Mask(~upper["0.weight"].keep), "1.weight": Mask(torch.zeros(40, 40, dtype=torch.bool))})
    with add(base, (d, upper, 1.0), (d, lower, 0.5)):
        gap = base[0].weight - before["0.weight"]
        dense = d["0.weight"].dense()
        assert torch.allclose(gap, torch.where(upper["0.weight"].keep, dense, dense * 0.5), atol=1e-6)


def test_deltas_that_only_look_alike_are_not_the_same():
    at = torch.tensor([1, 2])
    one, other = (Deltas({"w": Delta((4,), at, torch.tensor(v))}) for v in ([1.0, -1.0], [-1.0, 1.0]))
    heads = [Deltas({}, {"w": torch.tensor(v)}).key for v in ([1.0, 2.0], [2.0, 1.0], [1.0, 2.0])]
    assert one.key != other.key and heads[0] != heads[1] and heads[0] == heads[2]
