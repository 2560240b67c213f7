"""The file of a packed checkpoint: sparse weights as bitmask and kept values, the other tensors as they were.

A weight NAME is stored as NAME.shape, NAME.compressed (values), NAME.bitmask, NAME.row_offsets and, for int8 values,
NAME.scale: compressed-tensors' first `sparse-bitmask` naming. All tensors lie in falling item size, so each is
aligned. The header's `__metadata__` holds `maskwright`, the manifest as canonical JSON: {"format", "version", "part":
[i, of n], "weights": [{name, shape, dtype, values, kept}], "source": {file, header}, "restore": {file: text}}, and
`digest`, the sha256 of that text and of the data. From the manifest alone follows where every tensor lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.layout import packed_bytes
from maskwright.models.raw import DTYPES, Entry, Raw, one_line, parse, place

FORMAT, VERSION = "maskwright.packed", 1
WHOLE, INDEX = "packed.safetensors", "packed.safetensors.index.json"
VALUES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
SOURCES = {"float64": "F64", **{name: code for name, code in VALUES.items() if name != "int8"}}


def holds_packed(folder: Path) -> bool:
    """Whether a folder has our packed files, be they damaged."""
    return any((folder / name).is_file() for name in (WHOLE, INDEX))


@dataclass(frozen=True)
class Weight:
    """A packed weight by name. dtype: of the dense source; values: of what is stored. Both as torch names them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: str
    kept: int

    @property
    def total(self) -> int:
        return prod(self.shape)

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def dense_bytes(self) -> int:
        return self.total * DTYPES[SOURCES[self.dtype]].itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of values, bitmask, row offsets and scales."""
        return packed_bytes(self.shape, self.kept, DTYPES[VALUES[self.values]])

    def parts(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """The stored tensors: dtype code, shape and bytes."""
        rows, width = self.shape[0], -(-prod(self.shape[1:]) // 8)
        told: dict[str, tuple[str, tuple[int, ...]]] = {
            "shape": ("I64", (len(self.shape),)), "compressed": (VALUES[self.values], (self.kept,)),
            "bitmask": ("U8", (rows, width)), "row_offsets": ("I64", (rows,)),
        }  # fmt: skip
        if self.values == "int8":
            told["scale"] = ("F32", (rows,))
        return {
            f"{self.name}.{key}": (code, shape, prod(shape) * DTYPES[code].itemsize) for key, (code, shape) in told.items()
        }


def stored(weights: Iterable[Weight], source: Mapping[str, Entry]) -> dict[str, Entry]:
    """Where every tensor of a packed file lies. Raises BadInput when weights and source do not go together."""
    packed: dict[str, Weight] = {}
    for weight in weights:
        if weight.name in packed:
            raise BadInput(f"{weight.name}: the manifest names it twice")
        packed[weight.name] = weight
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    count = 0
    for name, entry in source.items():
        if found := packed.pop(name, None):
            if (SOURCES[found.dtype], found.shape) != (entry.dtype, entry.shape):
                raise BadInput(f"{name}: {found.dtype} of shape {found.shape}, its source is {entry.dtype} {entry.shape}")
            new = found.parts()
        else:
            new = {name: (entry.dtype, entry.shape, entry.nbytes)}
        tensors |= new
        count += len(new)
    if packed or len(tensors) != count:
        raise BadInput(f"the manifest's weights and its source's tensors do not go together ({len(packed)} are unknown)")
    return place(dict(sorted(tensors.items(), key=lambda item: -DTYPES[item[1][0]].itemsize if item[1][0] in DTYPES else 0)))


@dataclass(frozen=True)
class Part:
    """One of our files: its manifest, and the header of the file it was made from."""

    raw: Raw
    manifest: Mapping[str, Any]
    weights: tuple[Weight, ...]
    source: Mapping[str, Entry]

    def verify(self) -> None:
        """Raise BadInput when the digest over manifest and data does not match."""
        if digest(self.raw) != self.raw.meta.get("digest"):
            raise BadInput(f"{self.raw.path}: the digest does not match: the file was changed or damaged")


def digest(raw: Raw) -> str:
    """sha256 of the manifest and the data."""
    out = hashlib.sha256(raw.meta["maskwright"].encode())
    for piece in raw.chunks():
        out.update(piece)
    return out.hexdigest()


def read_part(raw: Raw) -> Part:
    """The manifest, and that the file's own header is the one it implies. Raises BadInput otherwise."""
    with one_line(raw.path):
        manifest = json.loads(raw.meta["maskwright"])
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise BadInput("not a packed checkpoint (a mask file?)")
        if manifest.get("version") != VERSION:
            raise BadInput(f"packed version {manifest.get('version')!r}; this maskwright reads version {VERSION}")
        if not well_formed(manifest):
            raise BadInput("the manifest is malformed")
        weights = tuple(Weight(**{**told, "shape": tuple(told["shape"])}) for told in manifest["weights"])
        for text in (manifest["source"]["header"], *manifest["restore"].values()):
            text.encode()  # they will be written: a lone surrogate is refused here
        source = parse(manifest["source"]["header"])[1]
        if stored(weights, source) != raw.entries:
            raise BadInput("the tensors are not those of the manifest")
        return Part(raw, manifest, weights, source)


def well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether every field has the type and range it must have, and file names stay in their folder."""
    part, weights, restore = manifest["part"], manifest["weights"], manifest["restore"]
    fields: dict[str, type] = {"name": str, "shape": list, "dtype": str, "values": str, "kept": int}
    return (
        [type(n) for n in part] == [int, int]
        and 1 <= part[0] <= part[1]
        and isinstance(weights, list)
        and all({key: type(value) for key, value in told.items()} == fields for told in weights)
        and all(type(side) is int and side >= 0 for told in weights for side in told["shape"])
        and all(told["shape"] and told["dtype"] in SOURCES and told["values"] in VALUES for told in weights)
        and all(0 <= told["kept"] <= prod(told["shape"]) for told in weights)
        and _file_name(manifest["source"]["file"], ".safetensors")
        and isinstance(manifest["source"]["header"], str)
        and all(name == "config.json" or _file_name(name, ".safetensors.index.json") for name in restore)
        and all(isinstance(text, str) for text in restore.values())
    )


def _file_name(name: Any, end: str) -> bool:
    # Files of these names are written: nothing that leaves the folder, hides in it, or is too long for one.
    fits = isinstance(name, str) and name.endswith(end) and name.isprintable() and len(name) < 200
    return fits and Path(name).name == name and "\\" not in name and not name.startswith(".")
