"""Mutations that every loader of a .safetensors file with a manifest must survive, and the loop that tries them.

Three kinds: bytes (flips, cuts, insertions), the header edited as JSON with the digest left alone, and a forger who
edits the manifest and the payload and makes the digest right again. The forger may of course write another valid
file; what loads must then be consistent in itself. `MASKWRIGHT_MUTATIONS` sets the number.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskwright.core.errors import BadInput

SEED = 20261124
SLOWEST = 10.0  # seconds for one load: far above any honest one, far below a hang
Digest = Callable[[str, Any, bytes], str]


def turns(usual: int) -> int:
    """How many mutations to try."""
    return int(os.environ.get("MASKWRIGHT_MUTATIONS", str(usual)))


HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 8, 2**31, 2**53, 2**63, 2**64 - 1, 10**30, -(2**63), 1.0, 1.5, 1e308, True, False, None),
    *("", "x", "hard", "soft", "2:4", "1:4", "unstructured@5", "block:9999999x9999999+pad", "block:1x1x1x1x1x1", "group:"),
    *("1:99999999999999999999", "2\n\x1b[31mforged", "\ud800", "a" * 5000, "U8", "F32", "BOOL", "I8", "BF16", "F8_E4M3"),
    *([], {}, [[]], [0], [8, 12], [-8, -12], [1, 96], [96], [0, 10**30], [2**32, 2**32], [1] * 70, ["8", "12"], {"8": 12}),
)


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


def forge(rng: random.Random, data: bytes, digest: Digest) -> bytes:
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
    tensors = header if isinstance(header, dict) else {"x": header}
    return join({"__metadata__": {"maskwright": text, "digest": digest(text, header, payload)}} | tensors, payload)


def digest_in_order(names: Callable[[Any], list[str]]) -> Digest:
    """sha256 of the manifest and of the payloads of `names(manifest)`, as far as there are any."""

    def digest(text: str, header: Any, payload: bytes) -> str:
        out = hashlib.sha256(text.encode())
        try:
            for name in names(json.loads(text)):
                start, end = header[name]["data_offsets"]
                out.update(payload[start:end])
        except (TypeError, KeyError, ValueError, AttributeError):
            pass
        return out.hexdigest()

    return digest


def digest_of_all(text: str, header: Any, payload: bytes) -> str:
    """sha256 of the manifest and of all data."""
    return hashlib.sha256(text.encode() + payload).hexdigest()


MUTATORS = ("damage", "edit", "forge")


def mutation(seed: int, turn: int, files: dict[str, bytes], digest: Digest) -> tuple[str, str, bytes]:
    """(file mutated, mutator, bytes) of one turn; each turn has its own generator, so any one can be made again."""
    rng = random.Random(f"{seed}.{turn}")
    name = rng.choices(list(files), weights=(6, 3, 1)[: len(files)])[0]
    how = MUTATORS[turn % len(MUTATORS)]
    data = files[name]
    return name, how, forge(rng, data, digest) if how == "forge" else (damage if how == "damage" else edit)(rng, data)


def survive(
    path: Path, files: dict[str, bytes], digest: Digest, many: int, load: Callable[[Path], Any],
    holds: Callable[[str, str, Any, bytes], None],
) -> dict[tuple[str, str], int]:  # fmt: skip
    """Each mutation is refused in one line naming the file, or `holds(file, how, loaded, bytes)`. Returns outcomes."""
    outcomes: dict[tuple[str, str], int] = {}
    for turn in range(many):
        name, how, data = mutation(SEED, turn, files, digest)
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
                holds(name, how, back, data)
            except AssertionError as error:
                trouble = f"loaded to something else: {error}"
        assert not trouble, f"seed {SEED}, turn {turn} ({how} of the {name} file): {trouble}"
        assert time.perf_counter() - began < SLOWEST, (SEED, turn)
        outcomes[how, outcome] = outcomes.get((how, outcome), 0) + 1
    return outcomes


def flip_every_bit(path: Path, same: Callable[[], None]) -> None:
    """Every single-bit change of the file loads as the same (white space, a letter's case) or is refused in one line."""
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            same()
        except BadInput as error:
            assert str(error).isprintable(), bit
