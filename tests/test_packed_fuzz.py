"""Hostile packed files: damaged, edited, forged (see hostile.py). Each is refused in one line or loads to what was saved.

A forger's file that loads must be consistent in itself: header, manifest, bits, offsets and values tell one story.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import MUTATORS, digest_of_all, flip_every_bit, join, split, survive, turns
from safetensors.torch import save_file

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.layout import Packed, pack, unpack
from maskwright.models.packed import PackedCheckpoint
from maskwright.models.packing import write
from maskwright.models.unpacking import unpack as unpack_folder

TURNS = turns(4000)
Read = tuple[dict[str, Packed], dict[str, torch.Tensor]]


def originals(folder: Path) -> dict[str, bytes]:
    """Packed files: floats and dense tensors of all kinds, int8, a legacy one."""
    rng = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) < 0.3)
        for name, shape in {"a.weight": (6, 11), "b.weight": (5, 2, 8), "zero.weight": (3, 16)}.items()
    }
    weights["zero.weight"].zero_()
    tensors = weights | {"b.weight": weights["b.weight"].bfloat16(), "norm": torch.ones(3), "i": torch.arange(4)}
    (folder / "m").mkdir()
    save_file(
        tensors | {"none": torch.zeros(0, 4), "u": torch.ones(5, dtype=torch.uint8)}, folder / "m" / "model.safetensors"
    )
    (folder / "m" / "config.json").write_text('{"a": 1}')
    out = {}
    for name, values in (("float", None), ("int8", "int8")):
        write(folder / "m", folder / name, values)
        out[name] = (folder / name / "packed.safetensors").read_bytes()
    packed = pack(weights["a.weight"])
    parts = {"shape": torch.tensor(packed.shape), "compressed": packed.values, "bitmask": packed.bitmask}
    save_file({f"a.{k}": v for k, v in parts.items()} | {"norm": torch.ones(3)}, folder / "legacy.safetensors",
              {"maskwright_no": "{}"})  # fmt: skip
    return out | {"legacy": (folder / "legacy.safetensors").read_bytes()}


def read(path: Path) -> Read:
    held = PackedCheckpoint(path)
    held.verify()
    return {name: held.packed(name) for name in held.weights}, {name: get() for name, get in held.dense()}


def assert_same(back: Read, first: Read) -> None:
    assert set(back[0]) == set(first[0]) and set(back[1]) == set(first[1])
    for name, packed in first[0].items():
        for key, value in packed.__dict__.items():
            other = getattr(back[0][name], key)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    assert all(torch.equal(back[1][name], value) for name, value in first[1].items())


def assert_consistent(back: Read, data: bytes) -> None:
    """What the file says by an independent reading is what was loaded, and it obeys its own manifest."""
    header, payload = split(data)
    if "maskwright" not in (header.get("__metadata__") or {}):
        return  # without metadata it is a legacy file, and was checked as one
    manifest = json.loads(header["__metadata__"]["maskwright"])
    source = json.loads(manifest["source"]["header"])
    source.pop("__metadata__", None)
    assert [told["name"] for told in manifest["weights"]] == list(back[0])
    assert set(source) == set(back[0]) | set(back[1])
    for told in manifest["weights"]:
        name, packed = told["name"], back[0][told["name"]]
        rows, cols = told["shape"][0], prod(told["shape"][1:])
        bits = np.frombuffer(payload[slice(*header[f"{name}.bitmask"]["data_offsets"])], dtype=np.uint8)
        keep = np.unpackbits(bits.reshape(rows, -(-cols // 8)), axis=1, bitorder="little")
        assert keep.sum() == told["kept"] == packed.kept and not keep[:, cols:].any()
        assert list(packed.shape) == told["shape"] == source[name]["shape"]
        dense = unpack(packed).reshape(rows, cols).float().numpy()
        assert np.isfinite(dense).all() and not dense[keep[:, :cols] == 0].any()


@pytest.mark.timeout(0 if TURNS > 20_000 else 300)
def test_hostile_packed_files_are_refused_in_one_line_or_load_to_what_was_saved(tmp_path: Path) -> None:
    files, path, first = originals(tmp_path), tmp_path / "p.safetensors", {}
    for name, data in files.items():
        path.write_bytes(data)
        first[name] = read(path)
    legacy = files.pop("legacy")

    def holds(name: str, how: str, back: Read, data: bytes) -> None:
        assert_same(back, first[name]) if how != "forge" else assert_consistent(back, data)

    outcomes = survive(path, files, digest_of_all, TURNS, read, holds)
    assert all(outcomes.get((how, "refused"), 0) > TURNS / 6 for how in MUTATORS), outcomes
    assert outcomes["forge", "loaded"] > TURNS / 1000 and outcomes["edit", "loaded"] > 0, outcomes
    header, payload = split(legacy)
    files = {"legacy": join(header | {"__metadata__": {"maskwright_no": "x", "maskwright": "{}"}}, payload)}
    survive(path, files, digest_of_all, TURNS // 8, read, lambda *_: None)


def test_every_flipped_bit_of_a_small_file_is_noticed(tmp_path: Path) -> None:
    save_file({"w.weight": torch.eye(2, 40)}, tmp_path / "m.safetensors")
    write(tmp_path / "m.safetensors", tmp_path / "b")
    path = tmp_path / "b" / "packed.safetensors"
    first = read(path)
    flip_every_bit(path, lambda: assert_same(read(path), first))


@pytest.mark.parametrize(
    ("forged", "says"),
    [
        ({"source": {"file": "../x.safetensors"}}, "malformed"),
        ({"source": {"file": ".safetensors"}}, "malformed"),
        ({"source": {"file": "x.py"}}, "malformed"),
        ({"source": {"header": "[]"}}, "not a .safetensors header"),
        ({"source": {"header": "{}"}}, "do not go together"),
        ({"restore": {"../config.json": "{}"}}, "malformed"),
        ({"restore": {"run.py": "{}"}}, "malformed"),
        ({"restore": {"config.json": "\ud800"}}, "cannot be read"),
        ({"part": [2, 1]}, "malformed"),
        ({"part": [1, 2]}, "not every part of one model"),
        ({"version": 2}, "packed version 2; this maskwright reads version 1"),
        ({"weights": []}, "the tensors are not those of the manifest"),
        ({"format": "maskwright.masks"}, "not a packed checkpoint"),
    ],
    ids=str,
)
def test_forgeries_by_hand(tmp_path: Path, forged: dict[str, Any], says: str) -> None:
    save_file({"w.weight": torch.eye(2, 40)}, tmp_path / "m.safetensors")
    write(tmp_path / "m.safetensors", tmp_path / "b")
    path = tmp_path / "b" / "packed.safetensors"
    header, payload = split(path.read_bytes())
    manifest = json.loads(header["__metadata__"]["maskwright"])
    for key, value in forged.items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) else value
    text = json.dumps(manifest)
    meta = {"maskwright": text, "digest": hashlib.sha256(text.encode() + payload).hexdigest()}
    path.write_bytes(join(header | {"__metadata__": meta}, payload))
    with pytest.raises(BadInput, match=says) as caught:
        unpack_folder(path, tmp_path / "out")
    assert str(caught.value).isprintable() and not (tmp_path / "out").exists()
