"""Hostile mask files: damaged, edited, forged (see hostile.py). Each is refused in one line or loads to what was saved.

A forger's file that loads must be consistent in itself (shape, kept count, pattern, spare bits). A failure prints its
seed and turn, and `python tests/test_store_fuzz.py SEED TURN` writes that one file to look at.
"""

from __future__ import annotations

import hashlib
import json
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import MUTATORS, digest_in_order, flip_every_bit, join, mutation, split, survive, turns

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet
from maskwright.core.pattern import NM, Block, Group, Unstructured, parse
from maskwright.core.select import generator, select
from maskwright.core.store import load, save

TURNS = turns(10_000)
DIGEST = digest_in_order(lambda manifest: [site["name"] for site in manifest["sites"]])


def some() -> dict[str, MaskSet | SoftMaskSet]:
    """Small files of every kind: all patterns, empty tensors, soft masks, no site at all."""
    score = torch.rand(8, 12, generator=generator(0))
    masks = {
        "a.weight": select(score, NM(2, 4)),
        "b.weight": select(score, Unstructured((0,)), 5),
        "c": select(score, Block((2, 3)), 6),
        "d": select(score, Group((0,)), 3),
        "pad": select(score[:7, :5], Block((2, 2), pad=True), 4),
        "e": Mask(torch.zeros(0, 4, dtype=torch.bool)),
        "f": Mask(torch.ones(3, dtype=torch.bool)),
    }
    made = {"method": "wanda", "seed": 1, "settings": {"density": 0.5, "where": ["a", "b"]}}
    soft = {"s": SoftMask(torch.tensor([[0.0, 0.5], [2.0, 1e-30]])), "t": SoftMask(torch.ones(3), Unstructured((0,)))}
    return {"hard": MaskSet(masks, made, "abc"), "soft": SoftMaskSet(soft, made, "abc"), "none": MaskSet({})}


# --- what must hold


def assert_same(back: MaskSet | SoftMaskSet, masks: MaskSet | SoftMaskSet) -> None:
    assert type(back) is type(masks) and list(back) == list(masks)
    assert back.made_by == masks.made_by and back.base == masks.base
    for name, mask in masks.items():
        other = back[name]
        assert other.pattern == mask.pattern
        if isinstance(mask, Mask):
            assert isinstance(other, Mask) and torch.equal(other.keep, mask.keep)
        else:
            assert isinstance(other, SoftMask) and torch.equal(other.values, mask.values)


def assert_consistent(back: MaskSet | SoftMaskSet, data: bytes) -> None:
    """What the file says by an independent reading is what was loaded, and it obeys its own manifest."""
    header, payload = split(data)
    manifest = json.loads(header["__metadata__"]["maskwright"])
    assert (manifest["kind"] == "soft") == isinstance(back, SoftMaskSet)
    assert list(back) == [site["name"] for site in manifest["sites"]]
    assert set(back) == set(header) - {"__metadata__"}
    for site in manifest["sites"]:
        mask, entry = back[site["name"]], header[site["name"]]
        raw = np.frombuffer(payload[slice(*entry["data_offsets"])], dtype=np.uint8)
        assert list(mask.shape) == site["shape"] and mask.pattern == parse(site["pattern"])
        if isinstance(mask, Mask):
            bits = np.unpackbits(raw, bitorder="little")
            assert len(raw) == -(-prod(site["shape"]) // 8) and entry["dtype"] == "U8"
            assert bits.sum() == site["kept"] == mask.count  # so no spare bit is set
            assert mask.keep.flatten().tolist() == bits[: prod(site["shape"])].astype(bool).tolist()
            mask.check()
        else:
            values = raw.view("<f4").reshape(site["shape"])
            assert np.array_equal(mask.values.numpy(), values) and (values > 0).sum() == site["kept"]
            assert np.isfinite(values).all() and (values >= 0).all() and entry["dtype"] == "F32"


@pytest.mark.timeout(0 if TURNS > 20_000 else 300)
def test_hostile_files_are_refused_in_one_line_or_load_to_what_was_saved(tmp_path: Path) -> None:
    masks, files = some(), {}
    path = tmp_path / "m.safetensors"
    for name, each in masks.items():
        save(each, path)
        files[name] = path.read_bytes()
        assert_same(load(path), each)
        assert_consistent(load(path), files[name])

    def holds(name: str, how: str, back: MaskSet | SoftMaskSet, data: bytes) -> None:
        assert_same(back, masks[name]) if how != "forge" else assert_consistent(back, data)

    outcomes = survive(path, files, DIGEST, TURNS, load, holds)
    if TURNS >= 10_000:  # the mutators do what they are for: most are refused, harmless edits and good forgeries pass
        assert all(outcomes.get((how, "refused"), 0) > TURNS / 6 for how in MUTATORS), outcomes
        assert outcomes["forge", "loaded"] > TURNS / 100 and outcomes["edit", "loaded"] > 0, outcomes


def test_every_flipped_bit_of_a_small_file_is_noticed(tmp_path: Path) -> None:
    masks = MaskSet({"w": select(torch.rand(2, 4, generator=generator(0)), NM(2, 4))}, {"seed": 1})
    path = tmp_path / "m.safetensors"
    masks.save(path)
    flip_every_bit(path, lambda: assert_same(load(path), masks))


@pytest.mark.parametrize(
    ("forged", "says"),
    [
        ({"kept": 3}, "4 entries are kept, the manifest says 3"),
        ({"pattern": "1:4"}, "1:4 does not hold"),
        ({"pattern": "3:5"}, "not divisible"),
        ({"pattern": "what"}, "unknown pattern"),
        ({"shape": [3, 4]}, "cannot hold 12 mask bits"),
        ({"shape": [7]}, "spare bits are set"),
        ({"shape": [-2, -4]}, "malformed"),
        ({"shape": [2.0, 4]}, "malformed"),
        ({"name": "w\nx\x1b[2J"}, "name different sites"),
        ({"pattern": None}, "malformed"),
    ],
    ids=str,
)
def test_forgeries_by_hand(tmp_path: Path, forged: dict[str, Any], says: str) -> None:
    path = tmp_path / "m.safetensors"
    keep = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    MaskSet({"w": Mask(keep, NM(2, 4))}).save(path)
    header, payload = split(path.read_bytes())
    manifest = json.loads(header["__metadata__"]["maskwright"])
    manifest["sites"][0] |= forged
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode() + payload).hexdigest()
    path.write_bytes(join(header | {"__metadata__": {"maskwright": text, "digest": digest}}, payload))
    with pytest.raises(BadInput, match=says) as caught:
        load(path)
    assert str(caught.value).isprintable()


if __name__ == "__main__":
    scratch = Path(sys.argv[3] if len(sys.argv) > 3 else "mutated.safetensors")
    originals = {}
    for key, value in some().items():
        save(value, scratch)
        originals[key] = scratch.read_bytes()
    scratch.write_bytes(mutation(int(sys.argv[1]), int(sys.argv[2]), originals, DIGEST)[2])
