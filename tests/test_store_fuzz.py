"""Hostile mask files: damaged, edited, forged. Each is refused in one line or loads to exactly what was saved.

Three kinds of mutation: bytes (flips, cuts, insertions), the header edited as JSON with the digest left alone, and
a forger who edits the manifest and the payload and makes the digest right again. The forger may of course write
another valid file; what loads must then be consistent in itself (shape, kept count, pattern, spare bits).
`MASKWRIGHT_MUTATIONS` sets the number; a failure prints its seed and turn, and `python tests/test_store_fuzz.py
SEED TURN` writes that one file to look at.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet
from maskwright.core.pattern import NM, Block, Group, Unstructured, parse
from maskwright.core.select import generator, select
from maskwright.core.store import load, save

SEED = 20261124
TURNS = int(os.environ.get("MASKWRIGHT_MUTATIONS", "10000"))
SLOWEST = 10.0  # seconds for one load: far above any honest one, far below a hang
HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 8, 2**31, 2**53, 2**63, 2**64 - 1, 10**30, -(2**63), 1.0, 1.5, 1e308, True, False, None),
    *("", "x", "hard", "soft", "2:4", "1:4", "unstructured@5", "block:9999999x9999999+pad", "block:1x1x1x1x1x1", "group:"),
    *("1:99999999999999999999", "2\n\x1b[31mforged", "\ud800", "a" * 5000, "U8", "F32", "BOOL", "I8", "BF16", "F8_E4M3"),
    *([], {}, [[]], [0], [8, 12], [-8, -12], [1, 96], [96], [0, 10**30], [2**32, 2**32], [1] * 70, ["8", "12"], {"8": 12}),
)


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


# --- mutations


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: str | dict[str, Any], payload: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + payload


def poke(rng: random.Random, tree: Any) -> Any:
    """Replace, delete, copy or add one node somewhere in a JSON value."""
    if rng.random() < 0.2 or not isinstance(tree, dict | list) or not tree:
        if isinstance(tree, int) and not isinstance(tree, bool) and rng.random() < 0.5:
            return tree + rng.choice((-1, 1, 8))
        return copy.deepcopy(rng.choice(HOSTILE))
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.random()
    if kind < 0.7:
        tree[key] = poke(rng, tree[key])
    elif kind < 0.8:
        del tree[key]
    elif kind < 0.9:
        tree[key], tree[other] = tree[other], copy.deepcopy(tree[key])
    elif isinstance(tree, dict):
        tree[rng.choice(("", "x", "name", "__metadata__", "a.weight", "digest"))] = copy.deepcopy(tree[key])
    else:
        tree.append(copy.deepcopy(tree[key]))
    return tree


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes alone: what disks, cables and editors do."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 8))):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case 1:
            out[at] ^= 1 << rng.randrange(8)
        case 2:
            del out[at:]
        case 3:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
        case 4:
            del out[at : at + rng.randint(1, 16)]
        case 5:
            size = rng.choice((0, 1, 2, 7, len(data) - 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
            out[:8] = (size if rng.random() < 0.5 else int.from_bytes(out[:8], "little") + rng.randint(-9, 9)).to_bytes(
                8, "little"
            )
        case 6:
            out += rng.randbytes(rng.randint(1, 64)) if rng.random() < 0.5 else data
        case 7:
            out = bytearray(rng.randbytes(rng.randint(0, 64)))
    return bytes(out)


def edit(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON, the digest left as it was."""
    header, payload = split(data)
    meta = header["__metadata__"]
    match rng.randrange(8):
        case 0 | 1 | 2:
            return join(json.dumps(poke(rng, header)), payload)
        case 3:
            del meta[rng.choice(list(meta))]
            return join(header, payload)
        case 4:
            manifest = poke(rng, json.loads(meta["maskwright"]))
            return join(header | {"__metadata__": meta | {"maskwright": json.dumps(manifest)}}, payload)
        case 5:  # the same key twice, the second one another
            text, name = json.dumps(header), rng.choice([*header, "maskwright", "digest"])
            again = json.dumps({name: poke(rng, copy.deepcopy(header.get(name, "x")))})
            return join(again[:-1] + ", " + text[1:] if rng.random() < 0.5 else text[:-1] + ", " + again[1:], payload)
        case 6:  # nested deeper than any parser's stack
            deep = rng.choice(("[", '{"a":')) * rng.choice((100, 1000, 30_000))
            where = rng.choice(("header", "manifest", "open"))
            if where == "manifest":
                header["__metadata__"] = meta | {"maskwright": deep}
                return join(header, payload)
            return join(deep if where == "open" else json.dumps(header)[:-1] + ', "x": ' + deep, payload)
        case _:
            other = rng.choice((2, 0, -1, "1", 1.5, None, 10**40))
            version = meta["maskwright"].replace('"version":1', f'"version":{json.dumps(other)}')
            return join(header | {"__metadata__": meta | {"maskwright": version}}, payload)


def forge(rng: random.Random, data: bytes) -> bytes:
    """Manifest, tensors or payload changed, and the digest made right for them where that can be done."""
    header, payload = split(data)
    meta = header.pop("__metadata__")
    manifest = json.loads(meta["maskwright"])
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.75:
            manifest = poke(rng, manifest)
        elif header and rng.random() < 0.6:
            header = poke(rng, header)
    if payload and rng.random() < 0.3:
        changed = bytearray(payload)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        payload = bytes(changed)
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode())
    try:
        for site in manifest["sites"]:
            start, end = header[site["name"]]["data_offsets"]
            digest.update(payload[start:end])
    except (TypeError, KeyError, ValueError, AttributeError):
        pass
    tensors = header if isinstance(header, dict) else {"x": header}
    return join({"__metadata__": {"maskwright": text, "digest": digest.hexdigest()}} | tensors, payload)


MUTATORS: tuple[Callable[[random.Random, bytes], bytes], ...] = (damage, edit, forge)


def mutation(seed: int, turn: int, files: dict[str, bytes]) -> tuple[str, str, bytes]:
    """(file mutated, mutator, bytes) of one turn; each turn has its own generator, so any one can be made again."""
    rng = random.Random(f"{seed}.{turn}")
    name = rng.choices(list(files), weights=(6, 3, 1))[0]
    mutator = MUTATORS[turn % len(MUTATORS)]
    return name, mutator.__name__, mutator(rng, files[name])


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
    outcomes: dict[tuple[str, str], int] = {}
    for turn in range(TURNS):
        name, how, data = mutation(SEED, turn, files)
        path.write_bytes(data)
        began, trouble = time.perf_counter(), ""
        try:
            back = load(path)
        except BadInput as error:
            said = str(error)
            assert said.startswith(str(path)) and said.isprintable() and len(said) < len(str(path)) + 400, (SEED, turn, said)
            outcome = "refused"
        except BaseException as error:  # a panic in the reader's Rust is no Exception
            trouble = f"{type(error).__name__}: {error}"
        else:
            outcome = "loaded"
            try:
                assert_same(back, masks[name]) if how != "forge" else assert_consistent(back, data)
            except AssertionError as error:
                trouble = f"loaded to something else: {error}"
        assert not trouble, f"seed {SEED}, turn {turn} ({how} of the {name} file): {trouble}"
        assert time.perf_counter() - began < SLOWEST, (SEED, turn)
        outcomes[how, outcome] = outcomes.get((how, outcome), 0) + 1
    if TURNS >= 10_000:  # the mutators do what they are for: most are refused, harmless edits and good forgeries pass
        assert all(outcomes.get((mutator.__name__, "refused"), 0) > TURNS / 6 for mutator in MUTATORS), outcomes
        assert outcomes["forge", "loaded"] > TURNS / 100 and outcomes["edit", "loaded"] > 0, outcomes


def test_every_flipped_bit_of_a_small_file_is_noticed(tmp_path: Path) -> None:
    masks = MaskSet({"w": select(torch.rand(2, 4, generator=generator(0)), NM(2, 4))}, {"seed": 1})
    path = tmp_path / "m.safetensors"
    masks.save(path)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert_same(load(path), masks)  # white space in the header, a letter's case in an escape
        except BadInput as error:
            assert str(error).isprintable(), bit


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
    scratch.write_bytes(mutation(int(sys.argv[1]), int(sys.argv[2]), originals)[2])
