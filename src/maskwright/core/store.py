"""The mask file: one .safetensors, one bit an entry, a versioned manifest in its header, a digest over both.

Layout (version 1). Every site is a 1-D uint8 tensor: the mask flattened row-major, packed eight entries a byte,
entry i in bit i % 8 (little-endian bits), spare bits 0. The header's `__metadata__` holds `maskwright`, the
manifest as canonical JSON: {"format", "version", "kind", "sites": [{name, shape, pattern, kept}], "made_by",
"base"}, and `digest`, the sha256 of that text and of the payloads in the manifest's order. Readable with
safetensors and numpy alone; nothing is ever unpickled. Soft masks are float32 tensors under kind "soft".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet
from maskwright.core.pattern import parse

FORMAT, VERSION = "maskwright.masks", 1
_HEADER_LIMIT = 100 << 20  # the safetensors format's own limit


def pack(keep: torch.Tensor) -> np.ndarray:
    """Boolean tensor -> (ceil(entries / 8),) uint8, little-endian bits."""
    return np.packbits(keep.detach().cpu().numpy().reshape(-1), bitorder="little")


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack`. Raises BadInput when the length or the spare bits are wrong."""
    entries = prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-entries // 8),):
        raise BadInput(f"{bits.shape} {bits.dtype} cannot hold {entries} mask bits")
    flat = np.unpackbits(bits, bitorder="little")
    if flat[entries:].any():
        raise BadInput("spare bits are set")
    return torch.from_numpy(flat[:entries].astype(bool).reshape(shape))


def _digest(manifest: str, payloads: list[np.ndarray]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for payload in payloads:
        digest.update(np.ascontiguousarray(payload).view(np.uint8).data)
    return digest.hexdigest()


def save(masks: MaskSet | SoftMaskSet, path: Path) -> None:
    """Write the file under a temporary name and rename it: the same masks give the same bytes.

    Raises BadInput for what `load` would refuse (a pattern that does not hold) and for settings that are not
    plain JSON.
    """
    soft = isinstance(masks, SoftMaskSet)
    if isinstance(masks, MaskSet):
        masks.check()
    payloads: dict[str, np.ndarray] = {}
    sites: list[dict[str, Any]] = []
    for name, mask in masks.items():
        if isinstance(mask, SoftMask):
            stored = SoftMask(mask.values.detach().cpu().float(), mask.pattern)  # float64 may not fit: refused here
            payloads[name] = stored.values.contiguous().numpy()
            kept = int((stored.values > 0).sum())
        else:
            payloads[name], kept = pack(mask.keep), mask.count
        sites.append({"name": name, "shape": list(mask.shape), "pattern": mask.pattern.spec(), "kept": kept})
    try:
        manifest = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "kind": "soft" if soft else "hard",
                "sites": sites,
                "made_by": dict(masks.made_by),
                "base": masks.base,
            },
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise BadInput(f"made_by cannot be stored as JSON: {error}") from None
    meta = {"maskwright": manifest, "digest": _digest(manifest, list(payloads.values()))}
    with replacing(path) as partial:
        _write(partial, payloads, meta)


def _write(path: Path, payloads: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    # The safetensors layout by hand: its own writer puts the metadata in a random order, so bytes would differ.
    header: dict[str, Any] = {"__metadata__": meta}
    offset = 0
    for name, payload in payloads.items():
        if name == "__metadata__":
            raise BadInput("a site cannot be named __metadata__: the file format keeps that name")
        kind, end = ("U8" if payload.dtype == np.uint8 else "F32"), offset + payload.nbytes
        header[name] = {"dtype": kind, "shape": list(payload.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for payload in payloads.values():
            handle.write(payload.tobytes())


@contextlib.contextmanager
def replacing(path: Path) -> Any:
    """A temporary name beside `path`, renamed to it on success and removed on failure: nothing half-written
    ever has the final name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> MaskSet | SoftMaskSet:
    """Read a mask file. Raises BadInput, one line naming the file, for anything that is not exactly one."""
    try:
        return _load(path)
    except BadInput as error:
        raise BadInput(f"{path}: {_line(error)}") from None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile file provokes in json, numpy, torch or safetensors
        raise BadInput(f"{path}: not a readable mask file ({type(error).__name__}: {_line(error)})") from None


def _line(error: Exception) -> str:
    # Names and specs come from the file: no line breaks or control characters of its own in our one line.
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:300]


def _load(path: Path) -> MaskSet | SoftMaskSet:
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise BadInput(f"not a mask file: its header claims {length} bytes in a file of {size}")
    with safe_open(path, framework="np") as handle:
        meta = handle.metadata() or {}
        if "maskwright" not in meta:
            raise BadInput("a safetensors file, but not a mask file (no manifest)")
        manifest = json.loads(meta["maskwright"])
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise BadInput("not a mask file (its manifest has another format)")
        if manifest.get("version") != VERSION:
            raise BadInput(f"mask file version {manifest.get('version')!r}; this maskwright reads version {VERSION}")
        _well_formed(manifest)
        names = [site["name"] for site in manifest["sites"]]
        if len(set(names)) != len(names) or set(names) != set(handle.keys()):
            raise BadInput("the manifest and the tensors name different sites")
        payloads = {name: handle.get_tensor(name) for name in names}
    if _digest(meta["maskwright"], [payloads[name] for name in names]) != meta.get("digest"):
        raise BadInput("the digest does not match: the file was changed or damaged")
    made = {"made_by": manifest["made_by"], "base": manifest["base"]}
    if manifest["kind"] == "soft":
        return SoftMaskSet({s["name"]: _soft(s, payloads[s["name"]]) for s in manifest["sites"]}, **made)
    return MaskSet({s["name"]: _hard(s, payloads[s["name"]]) for s in manifest["sites"]}, **made)


def _well_formed(manifest: Mapping[str, Any]) -> None:
    sites = manifest["sites"]
    fields: tuple[tuple[str, type], ...] = (("name", str), ("shape", list), ("pattern", str), ("kept", int))
    if (
        manifest["kind"] not in ("hard", "soft")
        or not isinstance(manifest["made_by"], dict)
        or not isinstance(manifest["base"], str)
        or not isinstance(sites, list)
        or not all(type(site[key]) is kind for site in sites for key, kind in fields)
        or not all(type(size) is int and size >= 0 for site in sites for size in site["shape"])
    ):
        raise BadInput("the manifest is malformed")


def _hard(site: Mapping[str, Any], payload: np.ndarray) -> Mask:
    mask = Mask(unpack(payload, tuple(site["shape"])), parse(site["pattern"]))
    if mask.count != site["kept"]:
        raise BadInput(f"{site['name']}: {mask.count} entries are kept, the manifest says {site['kept']}")
    return mask.check()


def _soft(site: Mapping[str, Any], payload: np.ndarray) -> SoftMask:
    if payload.dtype != np.float32 or list(payload.shape) != site["shape"]:
        raise BadInput(f"{site['name']}: {payload.dtype} {payload.shape}, the manifest says float32 {site['shape']}")
    mask = SoftMask(torch.from_numpy(payload.copy()), parse(site["pattern"]))
    if int((mask.values > 0).sum()) != site["kept"]:
        raise BadInput(f"{site['name']}: the manifest says {site['kept']} values above 0, the tensor has others")
    return mask
