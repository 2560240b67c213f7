"""A delta's file and its way onto a model: what is refused with a right digest too, and weights mapped from a file."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import Delta, Deltas, add, delta
from maskwright.updates.delta_file import _digest

WHERE = torch.tensor([3, 70, 65_540])
SPARSE = Delta((2, 40_000), WHERE, torch.tensor([1.0, -2.0, 0.5]))
DENSE = Delta((4, 5), torch.arange(0, 20, 3), torch.ones(7))


def saved(path):
    """A sound file, and its tensors and manifest."""
    Deltas({"w": SPARSE, "v": DENSE}, {"head": torch.ones(2, 3, dtype=torch.float64)}).save(path)
    with safe_open(path, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        return tensors, json.loads(handle.metadata()["maskwright"].partition(" ")[2])


def write(path, tensors, told):
    manifest = json.dumps(told)
    save_file(tensors, path, metadata={"maskwright": f"{_digest(manifest, tensors)} {manifest}"})


def u16(*numbers):
    return torch.tensor(numbers, dtype=torch.int32).to(torch.uint16)


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w:offsets": u16(70, 3, 4)}, "ascending indices below 80000"),
        ({"w:offsets": u16(3, 3, 4)}, "ascending indices below 80000"),
        ({"w:offsets": u16(3, 70, 20_000)}, "ascending indices below 80000"),
        ({"w:counts": i32(2, -1)}, r"w: \(2,\) torch.int32 cannot count the entries of 2 blocks"),
        ({"w:counts": i32(2, 1, 0)}, r"w: \(3,\) torch.int32 cannot count the entries of 2 blocks"),
        ({"w:counts": i32(2, 1).long()}, r"w: \(2,\) torch.int64 cannot count the entries of 2 blocks"),
        ({"w:counts": i32(2, 2)}, r"w: \(3,\) torch.uint16 offsets for 4 entries"),
        ({"w:offsets": i32(3, 70, 4)}, r"w: \(3,\) torch.int32 offsets for 3 entries"),
        ({"w:values": torch.tensor([1.0, float("nan"), 1.0])}, "needs finite float values"),
        ({"w:values": torch.tensor([1, 2, 3])}, "needs finite float values"),
        ({"w:values": torch.ones(2)}, "as many values"),
        ({"w:values": torch.ones(3, 1)}, "as many values"),
        ({"v:bits": torch.tensor([255, 1, 16], dtype=torch.uint8)}, "spare bits are set"),
        ({"v:bits": torch.tensor([255, 1], dtype=torch.uint8)}, "cannot hold 20 mask bits"),
        ({"v:bits": torch.tensor([255, 1, 0], dtype=torch.uint8)}, "as many values"),
        ({"v:values": torch.full((7,), float("inf")).half()}, "needs finite float values"),
        ({"x:values": torch.ones(2)}, "x:values is not in the manifest"),
        ({"v:counts": i32(7), "v:offsets": u16(*range(7))}, "v:counts is not in the manifest"),
        ({"head": torch.ones(2)}, "head is not in the manifest"),
        ({"head:full": torch.ones(2)}, r"head: shape \(2,\), the manifest says \(2, 3\)"),
    ],
)
def test_unsound_files_with_a_right_digest_are_refused(tmp_path, change, message):
    tensors, told = saved(tmp_path / "d")
    write(tmp_path / "e", tensors | change, told)
    with pytest.raises(BadInput, match=message):
        Deltas.load(tmp_path / "e")


def test_the_same_file_read_back(tmp_path):
    tensors, told = saved(tmp_path / "d")
    write(tmp_path / "e", tensors, told)
    for path in ("d", "e"):
        back = Deltas.load(tmp_path / path)
        assert torch.equal(back["w"].indices, WHERE) and torch.equal(back["w"].values, SPARSE.values)
        assert torch.equal(back["v"].indices, DENSE.indices) and back["v"].shape == (4, 5)
        assert torch.equal(back.full["head"], torch.ones(2, 3, dtype=torch.float64))
    told["sites"][0]["count"] += 1
    write(tmp_path / "e", tensors, told)
    with pytest.raises(BadInput, match="entries, the manifest says"):
        Deltas.load(tmp_path / "e")


@pytest.mark.parametrize("around", [[1], {"u": "ab"[:1]}, {"u": 3}, {"u": ["a", "b", "c"]}, "u", 7])
def test_ids_of_tensors_left_alone_that_are_none_are_refused(tmp_path, around):
    tensors, told = saved(tmp_path / "d")
    write(tmp_path / "e", tensors, told | {"around": {"u": ["full", "quick"]}})
    assert Deltas.load(tmp_path / "e").base["u"].quick == "quick"
    write(tmp_path / "e", tensors, told | {"around": around})
    with pytest.raises(BadInput, match="not a readable delta file") as refused:
        Deltas.load(tmp_path / "e")
    assert "\n" not in str(refused.value)


def mapped(path):
    """A model whose weights, 12 MiB of bf16, are mapped from a file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 1000)).to(torch.bfloat16)
    save_file(made.state_dict(), path)
    with safe_open(path, "pt") as handle, torch.device("meta"):
        model = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 1000))
        model.load_state_dict({name: handle.get_tensor(name) for name in handle.keys()}, assign=True)
    return model


def test_added_to_mapped_weights_and_taken_off(tmp_path):
    base, content = mapped(tmp_path / "m"), (tmp_path / "m").read_bytes()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    rng = torch.Generator().manual_seed(1)
    tuned = {n: v + (torch.rand(v.shape, generator=rng) < 0.02).bfloat16() * 0.25 for n, v in before.items()}
    delta(tuned, before).save(tmp_path / "d", torch.bfloat16)
    held = base.state_dict()  # shares memory with the parameters, and goes on doing so
    kept, parameter = base[0].weight.detach().view(torch.int16).numpy(), base[0].weight
    with add(base, Deltas.load(tmp_path / "d")):
        assert all(torch.equal(value, tuned[name]) for name, value in base.state_dict().items())
        assert all(torch.equal(value, tuned[name]) for name, value in held.items())
        assert (kept == tuned["0.weight"].view(torch.int16).numpy()).all() and base[0].weight is parameter
        with torch.no_grad():
            base[0].weight[tuned["0.weight"] == before["0.weight"]] = 1  # what no delta touched stays changed
    assert torch.equal(base[1].weight, before["1.weight"])
    same = tuned["0.weight"] == before["0.weight"]
    assert torch.equal(base[0].weight[~same], before["0.weight"][~same]) and bool((base[0].weight[same] == 1).all())
    assert (tmp_path / "m").read_bytes() == content


def test_a_model_with_something_on_it_can_be_forgotten():
    model = nn.Linear(3, 3)
    add(model, Deltas({"weight": Delta((3, 3), torch.tensor([1]), torch.ones(1))}))
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_tied_weights_named_twice_come_back():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    one = Delta((4, 4), torch.tensor([0, 5]), torch.tensor([0.1, 0.3]))
    with add(model, Deltas({"0.weight": one, "1.weight": one})):
        assert torch.allclose(model[0].weight - before, one.dense() * 2)
    assert torch.equal(model[0].weight, before)


SCRIPT = """
import hashlib, sys, torch
from torch import nn
from maskwright.updates import Deltas, add
torch.manual_seed(0)
model = nn.Linear(300, 500).to(torch.bfloat16)
deltas = Deltas.load(sys.argv[1])
add(model, deltas)
held = b"".join(p.detach().view(torch.int16).numpy().tobytes() for p in model.parameters())
print(hashlib.sha256(held).hexdigest(), deltas.key)
"""


def test_without_native_kernels_the_same_bits(tmp_path):
    torch.manual_seed(0)
    base = nn.Linear(300, 500).to(torch.bfloat16)
    where = torch.arange(0, 150_000, 41)
    tuned = base.weight.detach().clone()
    tuned.view(-1)[where] += torch.randn(len(where)).bfloat16()
    delta({"weight": tuned, "bias": base.bias + 1}, base).save(tmp_path / "d")
    told = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "d")], env=os.environ | {"MASKWRIGHT_NATIVE": on}, check=True,
            capture_output=True, text=True,
        ).stdout
        for on in ("1", "0")
    ]  # fmt: skip
    assert told[0] == told[1] and len(told[0]) > 64
