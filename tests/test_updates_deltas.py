"""Sparse differences: made, added and taken off to the bit, stored small, refused where they do not belong."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates import Delta, Deltas, add, delta
from maskwright.updates.base import BaseId, quick_id


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def moved(model, share=0.2, seed=1):
    """A copy of which some entries of each Linear moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i in (0, 2):
            weight = other[i].weight
            keep = torch.rand(weight.shape, generator=rng(seed + i)) < share
            weight += (keep * torch.randn(weight.shape, generator=rng(seed + 10 + i)) * 0.1).to(weight.dtype)
    return other


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_delta_then_add_gives_the_tuned_model_and_undo_the_base(dtype):
    base, tuned = net(dtype), moved(net(dtype))
    d = delta(tuned, base)
    assert set(d) == {"0.weight", "2.weight"}
    assert d["0.weight"].count == int((tuned[0].weight != base[0].weight).sum())
    assert torch.equal(d.masks["0.weight"].keep, tuned[0].weight != base[0].weight)
    before = state(base)
    with add(base, d):
        for name, value in tuned.state_dict().items():
            assert torch.allclose(base.state_dict()[name], value, rtol=1e-6)
    assert same(before, state(base))
    held = add(base, d)
    assert torch.allclose(base[0].weight, tuned[0].weight)
    held.undo()
    held.undo()  # a second time does nothing
    assert same(before, state(base))


def test_bf16_deltas_give_back_the_tuned_bits():
    base = net(torch.bfloat16)
    tuned = moved(base)
    add(base, delta(tuned, base))
    assert same(state(tuned), state(base))


def test_a_hundred_switches_do_not_drift():
    base = net()
    one, two = (delta(moved(base, seed=s), base) for s in (1, 20))
    before = state(base)
    for i in range(100):
        with add(base, one, (two if i % 2 else one.map(lambda n, d: d.times(2)), 0.3)):
            pass
    assert same(before, state(base))


def test_sums_do_not_care_for_order_and_match_dense_tensors():
    base = net()
    one, two = (delta(moved(base, 0.4, seed=s), base) for s in (1, 20))
    for name in one:
        both = (one + two)[name]
        assert torch.allclose(both.dense(), one[name].dense() + two[name].dense())
        assert torch.equal((one + two)[name].indices, (two + one)[name].indices)
        assert torch.allclose((one - two)[name].dense(), one[name].dense() - two[name].dense())
        assert torch.equal((-one)[name].values, -one[name].values) and torch.equal(
            (0.5 * one)[name].values, one[name].values * 0.5
        )
    a, b, c = net(), net(), net()
    add(a, one, two)
    add(b, two, one)
    add(c, one + two)
    for name in one:
        assert torch.allclose(state(a)[name], state(b)[name]) and torch.allclose(state(a)[name], state(c)[name])
    d = net()
    add(d, one)
    add(d, two)
    assert torch.allclose(state(a)["0.weight"], state(d)["0.weight"])
    overlap = len(set(one["0.weight"].indices.tolist()) & set(two["0.weight"].indices.tolist()))
    overlap += len(set(one["2.weight"].indices.tolist()) & set(two["2.weight"].indices.tolist()))
    assert one.overlap(two) == overlap / (one.count + two.count - overlap) and one.overlap(one) == 1


def test_masks_choose_among_a_deltas_entries():
    base = net()
    d = delta(moved(base, 0.9), base)
    left = torch.arange(48).view(6, 8) % 8 < 4
    masks = MaskSet({"0.weight": Mask(left)})
    with add(base, (d, masks, 2.0)):
        gap = base[0].weight.detach() - net()[0].weight.detach()
        assert torch.allclose(gap, torch.where(left, 2 * d["0.weight"].dense(), 0.0), atol=1e-6)
    assert d.only(masks)["2.weight"].count == d["2.weight"].count
    assert delta(moved(base, 0.9), base, masks=masks).count == int((d["0.weight"].dense() * left != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(tmp_path, dtype):
    base = net(dtype)
    d = delta(moved(base, 0.5), base, made_by={"method": "hand"})
    d = Deltas(d.deltas, {"2.bias": torch.arange(3.0)}, d.base, d.made_by)
    d.save(tmp_path / "d.safetensors")
    back = Deltas.load(tmp_path / "d.safetensors")
    assert list(back) == list(d) and back.base == d.base and back.made_by == {"method": "hand"}
    assert back.key == d.key and torch.equal(back.full["2.bias"], torch.arange(3.0))
    for name in d:
        assert torch.equal(back[name].indices, d[name].indices) and torch.equal(back[name].values, d[name].values)
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 7, 65_536, 65_537, 140_000]),
    st.sampled_from([0.0, 0.001, 0.0624, 0.07, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_any_size_and_density_comes_back(tmp_path_factory, number, density, seed):
    keep = torch.rand(number, generator=rng(seed)) < density
    where = keep.nonzero().flatten()
    d = Delta((number,), where, torch.randn(len(where), generator=rng(seed)))
    path = tmp_path_factory.mktemp("d") / "d.safetensors"
    Deltas({"a:offsets": d}).save(path, torch.bfloat16)
    back = Deltas.load(path)["a:offsets"]
    assert torch.equal(back.indices, where) and torch.equal(back.values, d.values.bfloat16())


def test_at_density_one_in_fifty_a_twentieth_of_the_bytes(tmp_path):
    number = 1 << 20
    where = torch.randperm(number, generator=rng())[: number // 50].sort().values
    Deltas({"w": Delta((1024, 1024), where, torch.ones(len(where)))}).save(tmp_path / "d", torch.bfloat16)
    assert (tmp_path / "d").stat().st_size * 20 <= number * 2
    dense = torch.arange(number)[: number // 8]
    Deltas({"w": Delta((1024, 1024), dense, torch.ones(len(dense)))}).save(tmp_path / "e", torch.bfloat16)
    assert (tmp_path / "e").stat().st_size < number / 8 + number / 8 * 2 + 2000


def test_another_base_is_refused_by_its_hash():
    base, other = net(), net(seed=5)
    d = delta(moved(base), base)
    with pytest.raises(BadInput, match="0.weight: the delta was made for another base"):
        add(other, d)
    add(other, d, check="none").undo()
    with torch.no_grad():
        base[2].weight[0, 0] += 1
    with pytest.raises(BadInput, match="2.weight: the delta was made for another base"):
        add(base, d)
    big = nn.Linear(300, 300)
    d = delta({"weight": big.weight + 1}, {"weight": big.weight})
    with torch.no_grad():
        big.weight[0, 70] += 1  # between the runs that the quick id reads
    add(big, d).undo()
    with pytest.raises(BadInput, match="another base"):
        add(big, d, check="full")


def test_a_half_precision_base_and_its_float32_load_are_the_same_base():
    base = net(torch.bfloat16)
    d = delta(moved(base), base)
    add(copy.deepcopy(base).float(), d, check="full")
    assert quick_id(base[0].weight) == quick_id(base[0].weight.float())
    assert BaseId.of(base[0].weight) == BaseId.of(base[0].weight.float())


def test_what_cannot_be_added_is_refused():
    base = net()
    d = delta(moved(base), base)
    on = add(base, d)
    with pytest.raises(BadInput, match="already on the model"):
        add(base, d)
    with pytest.raises(BadInput, match="already on the model"):
        add(base, Deltas(dict(d.deltas)))  # the same, read a second time
    more = add(base, d * 0.5)
    with pytest.raises(BadInput, match="take that off first"):
        on.undo()
    more.undo()
    on.undo()
    with pytest.raises(BadInput, match="the model has no x.weight"):
        add(base, Deltas({"x.weight": d["0.weight"]}))
    with pytest.raises(BadInput, match=r"2.weight: the delta has shape \(6, 8\), the model \(3, 6\)"):
        add(base, Deltas({"2.weight": d["0.weight"]}))
    head = Deltas({}, {"2.bias": torch.ones(3)})
    with pytest.raises(BadInput, match="replaced twice"):
        add(base, head, head)
    with pytest.raises(BadInput, match="replaced twice"):
        head + head
    with pytest.raises(BadInput, match="cannot be scaled"):
        add(base, (head, 0.5))
    with pytest.raises(BadInput, match="cannot be subtracted"):
        d - head
    with add(base, d, head):
        assert base[2].bias.tolist() == [1, 1, 1]
    assert same(state(base), state(net()))
    with pytest.raises(BadInput, match="different bases"):
        d + delta(moved(net(seed=3)), net(seed=3))


def test_what_is_no_delta_is_refused():
    base = net()
    with pytest.raises(BadInput, match="ascending indices below 4"):
        Delta((2, 2), torch.tensor([1, 1]), torch.ones(2))
    with pytest.raises(BadInput, match="ascending indices below 4"):
        Delta((2, 2), torch.tensor([4]), torch.ones(1))
    with pytest.raises(BadInput, match="finite"):
        Delta((2, 2), torch.tensor([1]), torch.tensor([float("nan")]))
    broken = moved(base)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match="0.weight: 1 differences are NaN or infinite"):
        delta(broken, base)
    with pytest.raises(BadInput, match="only one of the two models has it"):
        delta(nn.Sequential(nn.Linear(8, 6)), base)
    with pytest.raises(BadInput, match=r"0.weight: shape \(6, 9\)"):
        delta(nn.Sequential(nn.Linear(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)), base)


def test_a_head_of_its_own_is_stored_whole():
    tuned = moved(net())
    d = delta({**tuned.state_dict(), "head.weight": torch.ones(2, 3)}, net(), full=("head.*",))
    assert list(d.full) == ["head.weight"] and "head.weight" not in d


def test_damaged_files_are_refused_in_one_line(tmp_path):
    base = net()
    path = tmp_path / "d.safetensors"
    delta(moved(base), base).save(path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        with pytest.raises(BadInput) as told:
            Deltas.load(path)
        assert str(path) in str(told.value) and "\n" not in str(told.value)
    path.write_bytes(data[:-3])
    with pytest.raises(BadInput):
        Deltas.load(path)
    path.write_bytes(data)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(BadInput, match="not a delta file"):
        Deltas.load(path)
    with pytest.raises(BadInput, match="no such file"):
        Deltas.load(tmp_path / "none")
