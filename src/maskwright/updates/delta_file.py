"""The file of sparse differences: one .safetensors, small, checked to the byte.

Entries are cut into blocks of 65,536. A tensor stores how many entries each block has, their 16-bit offsets inside it, and
the values; from density 1/16 on a bit for every entry is smaller than the offsets. The manifest holds shapes, how the
deltas were made, and for which base: a full hash and a quick one a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.store import pack, replacing, unpack
from maskwright.updates.deltas import BaseId, Delta, Deltas

FORMAT, VERSION, BLOCK = "maskwright.delta", 1, 1 << 16


def save(deltas: Deltas, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write under a temporary name and rename. dtype: of the stored values. Raises BadInput where one would overflow it."""
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
    try:
        manifest = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"made_by cannot be stored as JSON: {error}") from None
    if not tensors:
        tensors["nothing:values"] = torch.zeros(0)  # safetensors wants a tensor
    digest = _digest(manifest, tensors)
    with replacing(path) as partial:
        # One key: the library's writer puts several in a random order, and equal deltas should give equal bytes.
        save_file(tensors, partial, metadata={"maskwright": f"{digest} {manifest}"})


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
    with safe_open(path, framework="pt") as handle:
        digest, _, manifest = (handle.metadata() or {}).get("maskwright", "").partition(" ")
        told = json.loads(manifest) if manifest.startswith("{") else {}
        if told.get("format") != FORMAT:
            raise BadInput("not a delta file (no manifest)")
        if told.get("version") != VERSION:
            raise BadInput(f"delta file version {told.get('version')!r}; this maskwright reads version {VERSION}")
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    if _digest(manifest, tensors) != digest:
        raise BadInput("the digest does not match: the file was changed or damaged")
    out, full, ids = {}, {}, {}
    for site in told["sites"]:
        name, shape, count = site["name"], tuple(site["shape"]), site["count"]
        if type(name) is not str or not all(type(size) is int and size >= 0 for size in shape) or type(count) is not int:
            raise BadInput("the manifest is malformed")
        if name in out or name in full:
            raise BadInput(f"{name} is there twice")
        if site["form"] == "full":
            full[name] = tensors.pop(f"{name}:full")
            if tuple(full[name].shape) != shape:
                raise BadInput(f"{name}: shape {tuple(full[name].shape)}, the manifest says {shape}")
            continue
        indices = _from_bits(name, shape, tensors) if site["form"] == "bits" else _from_offsets(name, shape, tensors)
        out[name] = Delta(shape, indices, tensors.pop(f"{name}:values"))
        if out[name].count != count:
            raise BadInput(f"{name}: {out[name].count} entries, the manifest says {count}")
        if "quick" in site:
            ids[name] = BaseId(str(site["base"]), str(site["quick"]))
    if set(tensors) - {"nothing:values"}:
        raise BadInput(f"{min(tensors)} is not in the manifest")
    return Deltas(out, full, ids, told["made_by"])


def _from_bits(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    return unpack(tensors.pop(f"{name}:bits").numpy(), shape).flatten().nonzero().flatten()


def _from_offsets(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    counts, offsets = tensors.pop(f"{name}:counts"), tensors.pop(f"{name}:offsets")
    blocks = -(-prod(shape) // BLOCK)
    if counts.dtype != torch.int32 or counts.shape != (blocks,) or bool((counts < 0).any()):
        raise BadInput(f"{name}: {tuple(counts.shape)} {counts.dtype} cannot count the entries of {blocks} blocks")
    if offsets.dtype != torch.uint16 or offsets.shape != (int(counts.sum()),):
        raise BadInput(f"{name}: {tuple(offsets.shape)} {offsets.dtype} offsets for {int(counts.sum())} entries")
    starts = np.repeat(np.arange(blocks, dtype=np.int64) * BLOCK, counts.numpy())
    return torch.from_numpy(starts + offsets.numpy())
