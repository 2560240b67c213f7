"""The file of sparse differences: one .safetensors, small, checked to the byte.

Entries are cut into blocks of 65,536. A tensor stores how many entries each block has, their 16-bit offsets inside it, and
the values; from density 1/16 on a bit for every entry is smaller than the offsets. The manifest holds shapes, how the
deltas were made, and for which base: a full hash and a quick one a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.store import pack, replacing, unpack
from maskwright.kernels.scatter import BLOCK, DTYPES, Stored, places, reference, room
from maskwright.updates.deltas import BaseId, Delta, Deltas

FORMAT, VERSION = "maskwright.delta", 1
_NONE = torch.empty(0, dtype=torch.int64)
_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def save(deltas: Deltas, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write under a temporary name and rename. dtype: of the stored values. Raises BadInput where one would overflow it,
    and OSError where the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    sites: list[dict[str, Any]] = []
    for name, delta in deltas.items():
        values = delta.values if dtype is None else delta.values.to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise BadInput(f"{name}: a difference does not fit {dtype}")
        packed = delta.count * 16 >= prod(delta.shape)
        if packed:
            tensors[f"{name}:bits"] = torch.from_numpy(pack(delta.mask.keep))
        else:
            tensors |= dict(zip((f"{name}:counts", f"{name}:offsets"), _blocks(delta), strict=True))
        tensors[f"{name}:values"] = values.contiguous()
        site = {"name": name, "shape": list(delta.shape), "count": delta.count, "form": "bits" if packed else "offsets"}
        if name in deltas.base:
            site |= {"base": deltas.base[name].full, "quick": deltas.base[name].quick}
        sites.append(site)
    for name, value in deltas.full.items():
        tensors[f"{name}:full"] = value.detach().cpu().contiguous().clone()
        sites.append({"name": name, "shape": list(value.shape), "count": value.numel(), "form": "full"})
    told = {"format": FORMAT, "version": VERSION, "sites": sites, "made_by": dict(deltas.made_by)}
    if alone := {name: [known.full, known.quick] for name, known in deltas.base.items() if name not in deltas}:
        told["around"] = alone  # of tensors that are left alone; a maskwright that does not know the key reads the rest
    try:
        manifest = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"made_by cannot be stored as JSON: {error}") from None
    if not tensors:
        tensors["nothing:values"] = torch.zeros(0)  # safetensors wants a tensor
    digest = _digest(manifest, tensors)
    with replacing(path) as partial:
        # One key: the library's writer puts several in a random order, and equal deltas should give equal bytes.
        try:
            save_file(tensors, partial, metadata={"maskwright": f"{digest} {manifest}"})
        except SafetensorError as error:  # its word for a missing folder or a full disk
            raise OSError(_line(error)) from None


def _blocks(delta: Delta) -> tuple[Tensor, Tensor]:
    blocks = -(-prod(delta.shape) // BLOCK)
    counts = torch.bincount(delta.indices >> 16, minlength=blocks).to(torch.int32)
    return counts, torch.from_numpy((delta.indices & (BLOCK - 1)).numpy().astype(np.uint16))


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(name for name, tensor in tensors.items() if tensor.numel()):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: Path) -> Deltas:
    """Read a delta file. Raises BadInput, one line naming the file, for anything that is not exactly one."""
    try:
        return _load(path)
    except BadInput as error:
        raise BadInput(f"{path}: {_line(error)}") from None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile file provokes in json, numpy, torch or safetensors
        raise BadInput(f"{path}: not a readable delta file ({type(error).__name__}: {_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:300]


def _load(path: Path) -> Deltas:
    with safe_open(path, framework="pt") as handle:  # it judges the header
        digest, _, manifest = (handle.metadata() or {}).get("maskwright", "").partition(" ")
        told = json.loads(manifest) if manifest.startswith("{") else {}
        if told.get("format") != FORMAT:
            raise BadInput("not a delta file (no manifest)")
        if told.get("version") != VERSION:
            raise BadInput(f"delta file version {told.get('version')!r}; this maskwright reads version {VERSION}")
    file = _File(path)
    stored = file.stored()
    # The kernel needs no lock of Python's: it runs while this thread hashes.
    with ThreadPoolExecutor(1) as aside:
        found = aside.submit(places, file.bytes, list(stored.values()))
        if file.digest(manifest) != digest:
            raise BadInput("the digest does not match: the file was changed or damaged")
    return _deltas(told, file, dict(zip(stored, found.result() or (), strict=False)))


def _deltas(told: dict[str, Any], file: _File, found: Mapping[str, tuple[Tensor, int]]) -> Deltas:
    out, full, ids = {}, {}, {}
    for site in told["sites"]:
        name, shape, count = site["name"], tuple(site["shape"]), site["count"]
        if type(name) is not str or not all(type(size) is int and size >= 0 for size in shape) or type(count) is not int:
            raise BadInput("the manifest is malformed")
        if name in out or name in full:
            raise BadInput(f"{name} is there twice")
        if site["form"] == "full":
            full[name] = file.pop(f"{name}:full")
            if tuple(full[name].shape) != shape:
                raise BadInput(f"{name}: shape {tuple(full[name].shape)}, the manifest says {shape}")
            continue
        form = _from_bits if site["form"] == "bits" else _from_offsets
        out[name] = form(name, shape, file, *found.get(name, (_NONE, -2)))
        if out[name].count != count:
            raise BadInput(f"{name}: {out[name].count} entries, the manifest says {count}")
        if "quick" in site:
            ids[name] = BaseId(str(site["base"]), str(site["quick"]))
    if set(file.left) - {"nothing:values"}:
        raise BadInput(f"{min(file.left)} is not in the manifest")
    for name, (whole, quick) in told.get("around", {}).items():
        ids[name] = BaseId(str(whole), str(quick))
    return Deltas(out, full, ids, told["made_by"])


def _from_bits(name: str, shape: tuple[int, ...], file: _File, indices: Tensor, last: int) -> Delta:
    size = prod(shape)
    if -2 < last < size and file.left[f"{name}:bits"].shape == (-(-size // 8),):
        del file.left[f"{name}:bits"]
        return Delta.checked(shape, indices, file.pop(f"{name}:values"))
    indices = unpack(file.pop(f"{name}:bits").numpy(), shape).flatten().nonzero().flatten()
    return Delta(shape, indices, file.pop(f"{name}:values"))


def _from_offsets(name: str, shape: tuple[int, ...], file: _File, indices: Tensor, last: int) -> Delta:
    size = prod(shape)
    blocks = -(-size // BLOCK)
    if -2 < last < size and file.left[f"{name}:counts"].shape == (blocks,):
        del file.left[f"{name}:counts"], file.left[f"{name}:offsets"]
        return Delta.checked(shape, indices, file.pop(f"{name}:values"))
    # What the kernel did not look through or did not find sound.
    counts, offsets = file.pop(f"{name}:counts"), file.pop(f"{name}:offsets")
    if counts.dtype != torch.int32 or counts.shape != (blocks,) or bool((counts < 0).any()):
        raise BadInput(f"{name}: {tuple(counts.shape)} {counts.dtype} cannot count the entries of {blocks} blocks")
    if offsets.dtype != torch.uint16 or offsets.shape != (int(counts.sum()),):
        raise BadInput(f"{name}: {tuple(offsets.shape)} {offsets.dtype} offsets for {int(counts.sum())} entries")
    return Delta(shape, reference.places(counts, offsets, BLOCK), file.pop(f"{name}:values"))


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int  # its bytes in the file
    end: int


class _File:
    """A file's bytes, read once, and the tensors in them that nothing asked for yet."""

    def __init__(self, path: Path) -> None:
        with path.open("rb", buffering=0) as handle:
            size = path.stat().st_size
            self.bytes = room(size, torch.uint8)
            self.data = self.bytes.numpy().data
            at = 0
            while got := handle.readinto(self.data[at:]):
                at += got
        start = 8 + int.from_bytes(self.data[:8], "little")
        header = json.loads(bytes(self.data[8:start]))
        header.pop("__metadata__", None)
        self.left: dict[str, _Entry] = {}
        for name, told in header.items():
            dtype, shape, (begin, end) = _CODES[told["dtype"]], tuple(told["shape"]), told["data_offsets"]
            if not 0 <= begin <= end <= at - start or end - begin != prod(shape) * dtype.itemsize:
                raise BadInput(f"{name}: the header does not fit the file")
            self.left[name] = _Entry(dtype, shape, start + begin, start + end)

    def pop(self, name: str) -> Tensor:
        entry = self.left.pop(name)
        if entry.at == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = (entry.end - entry.at) // entry.dtype.itemsize
        flat = torch.frombuffer(self.data, dtype=entry.dtype, count=count, offset=entry.at)
        return flat if len(entry.shape) == 1 else flat.view(entry.shape)

    def digest(self, manifest: str) -> str:
        """Over manifest and tensors, in the order of their names."""
        digest, data = hashlib.sha256(manifest.encode()), self.data
        for name in sorted(self.left):
            _, _, at, end = self.left[name]
            digest.update(data[at:end])
        return digest.hexdigest()

    def stored(self) -> dict[str, Stored]:
        """The deltas that the kernel can look through: name -> where their parts are."""
        out = {}
        for key, values in self.left.items():
            name, _, part = key.rpartition(":")
            if part != "values" or values.dtype not in DTYPES or len(values.shape) != 1:
                continue
            (number,) = values.shape
            counts, offsets = self.left.get(f"{name}:counts"), self.left.get(f"{name}:offsets")
            bits = self.left.get(f"{name}:bits")
            if (
                counts
                and offsets
                and (counts.dtype, offsets.dtype, offsets.shape) == (torch.int32, torch.uint16, values.shape)
            ):
                out[name] = Stored(counts.at, prod(counts.shape), offsets.at, number, values.at, values.dtype)
            elif bits and not offsets and bits.dtype == torch.uint8:
                out[name] = Stored(bits.at, prod(bits.shape), -1, number, values.at, values.dtype)
        return out
