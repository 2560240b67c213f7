"""The mask file: round trip, read by hand, the golden file. Mutations stand in test_store_fuzz.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet, base_hash
from maskwright.core.pattern import NM, Block, Group, Unstructured
from maskwright.core.select import generator, select
from maskwright.core.store import load, save


def some():
    score = torch.rand(8, 12, generator=generator(0))
    masks = {
        "a.weight": select(score, NM(2, 4)),
        "b.weight": select(score, Unstructured((0,)), 5),
        "c": select(score, Block((2, 3)), 6),
        "d": select(score, Group((0,)), 3),
        "e": Mask(torch.zeros(0, 4, dtype=torch.bool)),
        "f": Mask(torch.ones(3, dtype=torch.bool)),
    }
    return MaskSet(masks, {"method": "wanda", "seed": 1, "settings": {"density": 0.5}}, "abc")


def test_round_trip_and_byte_identity(tmp_path):
    masks = some()
    masks.save(tmp_path / "m.safetensors")
    back = MaskSet.load(tmp_path / "m.safetensors")
    assert back.equal(masks) and back.made_by == masks.made_by and back.base == "abc"
    back.save(tmp_path / "n.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "n.safetensors"]


def test_readable_with_safetensors_and_numpy_alone(tmp_path):
    masks = some()
    masks.save(tmp_path / "m.safetensors")
    bits = np.unpackbits(load_file(tmp_path / "m.safetensors")["a.weight"], bitorder="little")[:96].reshape(8, 12)
    assert torch.equal(torch.from_numpy(bits.astype(bool)), masks["a.weight"].keep)


def test_soft_masks(tmp_path):
    soft = SoftMaskSet({"s": SoftMask(torch.tensor([0.0, 0.5, 2.0]))})
    save(soft, tmp_path / "s.safetensors")
    assert load(tmp_path / "s.safetensors")["s"].harden().keep.tolist() == [False, True, True]
    with pytest.raises(BadInput):
        MaskSet.load(tmp_path / "s.safetensors")


def test_base_hash_ignores_order_and_lossless_widening():
    a, b = torch.randn(3, generator=generator(1)).bfloat16(), torch.randn(2, generator=generator(2))
    assert base_hash({"a": a, "b": b}) == base_hash({"b": b, "a": a.float()}) != base_hash({"a": a, "b": b + 1})


def test_a_forged_digest_still_has_to_be_consistent(tmp_path):
    from safetensors.numpy import save_file

    from maskwright.core.store import _digest

    path = tmp_path / "m.safetensors"
    some().save(path)
    payloads = load_file(path)
    raw = path.read_bytes()
    meta = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    manifest = json.loads(meta["maskwright"])
    manifest["sites"][0]["kept"] += 1
    text = json.dumps(manifest)
    digest = _digest(text, [payloads[s["name"]] for s in manifest["sites"]])
    save_file(payloads, path, metadata={"maskwright": text, "digest": digest})
    with pytest.raises(BadInput, match="the manifest says"):
        MaskSet.load(path)


def test_the_golden_file_of_version_1_loads_forever():
    # Made once by MaskSet.save of maskwright 0.1.0; a reader for every released version is kept.
    masks = MaskSet.load(Path(__file__).parent / "golden" / "masks_v1.safetensors")
    assert masks["layer.weight"].keep.long().tolist() == [[1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 1, 0, 0]]
    assert masks["layer.weight"].pattern == NM(2, 4) and masks["bias"].keep.tolist() == [True, False, True]
    assert masks.made_by["seed"] == 7 and masks.base == "f00d"
