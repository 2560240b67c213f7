"""A dense checkpoint packed, shard by shard and tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.kernels.packed_linear import layout
from maskwright.models.checkpoint import Checkpoint, match, plain
from maskwright.models.folder import CONFIG, copy_others, dump, fresh, kept_texts, read_object, sync
from maskwright.models.packed_format import (
    FORMAT,
    INDEX,
    SOURCES,
    VALUES,
    VERSION,
    WHOLE,
    Weight,
    digest,
    stored,
    well_formed,
)
from maskwright.models.raw import DTYPES, Entry, Raw, one_line, raw_bytes, render

_NAMES = {code: name for name, code in SOURCES.items()}
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Report:
    """What packing did or would do. before, after: bytes of the weight files.

    signs: dropped weights that are -0.0 and come back as 0.0; while there are none, `unpack` gives the same bytes.
    """

    weights: tuple[Weight, ...]
    before: int
    after: int
    signs: int = 0


@dataclass(frozen=True)
class _Plan:
    """One file to write."""

    raw: Raw
    name: str
    manifest: str
    entries: Mapping[str, Entry]
    weights: Mapping[str, Weight]
    masks: Mapping[str, Mask]

    def head(self, digest: str) -> bytes:
        return render(self.entries, {"maskwright": self.manifest, "digest": digest})

    @property
    def size(self) -> int:
        return len(self.head(_NO_DIGEST)) + sum(entry.nbytes for entry in self.entries.values())


def survey(source: Path, values: str | None = None, masks: MaskSet | None = None) -> Report:
    """What `write` would do; without masks every weight is read once to count its zeros. Raises what `write` does."""
    return _report(_plans(source, values, masks))


def write(source: Path, out: Path, values: str | None = None, masks: MaskSet | None = None, replace: bool = False) -> Report:
    """Pack a model folder, shard index or .safetensors file into the folder `out`, which appears whole or not at all.

    values: float32, bfloat16, float16 or int8 (None: each weight's own dtype). masks: their sites are packed, as the
    masks say; without, every float weight of 2 or more dims that its zeros make smaller. Raises BadInput when nothing
    gets smaller, a mask does not hold, or `out` exists and `replace` is not set.
    """
    with fresh(out, source, replace) as work:
        plans = _plans(source, values, masks)
        halves, signs = True, 0
        for plan in plans:
            half, lost = _write(plan, work / plan.name, DTYPES[VALUES[values]] if values else None)
            halves, signs = halves and half, signs + lost
        report = _report(plans, signs)
        if len(plans) > 1:
            where = {key: plan.name for plan in plans for key in plan.entries}
            size = sum(entry.nbytes for plan in plans for entry in plan.entries.values())
            dump(work / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
        if source.is_dir():
            copy_others(source, work, [CONFIG])
        if (text := json.loads(plans[0].manifest)["restore"].get(CONFIG)) is not None:
            total, kept = (sum(getattr(weight, key) for weight in report.weights) for key in ("total", "kept"))
            told = {
                "format": "sparse-bitmask", "global_sparsity": 1 - kept / total if total else 0.0,
                "sparsity_structure": "2:4" if halves else "unstructured",
            }  # fmt: skip
            dump(work / CONFIG, read_object(source / CONFIG, text) | {"sparsity_config": told})
    return report


def _report(plans: list[_Plan], signs: int = 0) -> Report:
    weights = tuple(weight for plan in plans for weight in plan.weights.values())
    return Report(weights, sum(plan.raw.size for plan in plans), sum(plan.size for plan in plans), signs)


def _plans(source: Path, values: str | None, masks: MaskSet | None) -> list[_Plan]:
    if values is not None and values not in VALUES:
        raise BadInput(f"values {values!r} cannot be stored, only {', '.join(VALUES)}")
    files = Checkpoint(source)
    raws = [Raw(file) for file in sorted(set(files.where.values()))]
    where = {key: raw for raw in raws for key in raw.entries}
    if len(where) < sum(len(raw.entries) for raw in raws):
        raise BadInput(f"{source}: a tensor is in two of its files")
    chosen, held = _masked(files, where, values, masks) if masks is not None else (_sparse(source, where, values), {})
    restore = kept_texts(source)
    if CONFIG in restore:
        read_object(source / CONFIG, restore[CONFIG])  # refused now, not after the writing
    plans = []
    for at, raw in enumerate(raws):
        weights = {name: chosen[name] for name in raw.entries if name in chosen}
        manifest = {
            "format": FORMAT, "version": VERSION, "part": [at + 1, len(raws)],
            "weights": [weight.__dict__ | {"shape": list(weight.shape)} for weight in weights.values()],
            "source": {"file": raw.path.name, "header": raw.header}, "restore": {} if at else restore,
        }  # fmt: skip
        if not well_formed(manifest):  # a name that no packed file may carry
            raise BadInput(
                f"{plain(str(raw.path))}: cannot be packed; a name ends in .safetensors and holds no odd character"
            )
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        name = f"packed-{at + 1:05d}-of-{len(raws):05d}.safetensors" if len(raws) > 1 else WHOLE
        with one_line(raw.path):
            entries = stored(weights.values(), raw.entries)
        plans.append(_Plan(raw, name, text, entries, weights, held))
    return plans


def _masked(
    files: Checkpoint, where: Mapping[str, Raw], values: str | None, masks: MaskSet
) -> tuple[dict[str, Weight], dict[str, Mask]]:
    """The masks' sites by the tensors' names."""
    held = {key: masks[site] for site, key in match(list(masks), files).items()}
    out = {}
    for key, mask in held.items():
        code, shape = where[key].entries[key][:2]
        if shape != mask.shape:
            raise BadInput(f"{files.path}: {plain(key)}: the checkpoint has shape {shape}, the mask {mask.shape}")
        if code not in _NAMES or not shape or (code == "F64" and values is None):
            raise BadInput(f"{files.path}: {plain(key)}: {code} of shape {shape} cannot be packed")
        out[key] = Weight(key, shape, _NAMES[code], values or _NAMES[code], mask.count)
    packed, dense = sum(w.packed_bytes for w in out.values()), sum(w.dense_bytes for w in out.values())
    if packed >= dense:
        kept, total = sum(w.kept for w in out.values()), sum(w.total for w in out.values())
        raise BadInput(
            f"{files.path}: the mask keeps {kept:,} of {total:,} weights ({kept / max(1, total):.2%}), "
            f"packing would not make it smaller ({dense:,} bytes to {packed:,})"
        )
    return out, held


def _sparse(source: Path, where: Mapping[str, Raw], values: str | None) -> dict[str, Weight]:
    """Every float weight of 2 or more dims that its zeros make smaller; other values alone are no reason to."""
    out = {}
    total = zeros = 0
    most = (-1.0, "")
    for name, raw in where.items():
        code, shape = raw.entries[name][:2]
        if code not in _NAMES or code == "F64" or len(shape) < 2:
            continue
        weight = raw.read(name)
        kept = int(np.count_nonzero(layout.bit_patterns(weight).numpy()))
        own = Weight(name, shape, _NAMES[code], _NAMES[code], kept)
        new = Weight(name, shape, own.dtype, values or own.values, kept)
        total, zeros = total + own.total, zeros + own.total - kept
        most = max(most, (1 - own.density, name))
        if max(own.packed_bytes, new.packed_bytes) < own.dense_bytes and _finite(weight):
            out[name] = new
    if not out:
        told = f"{zeros / max(1, total):.2%} of its {total:,} weights are 0, at most {most[0]:.2%} (in {plain(most[1])})"
        raise BadInput(
            f"{source}: not sparse: {told if total else 'no float weight of 2 or more dims'}; packing would make it larger"
        )
    return out


def _finite(weight: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in weight.flatten().split(1 << 22))


def _write(plan: _Plan, path: Path, values: torch.dtype | None) -> tuple[bool, int]:
    """Write one file: whether all its weights are exactly 2:4 along cols, and how many -0.0 were dropped."""
    head = plan.head(_NO_DIGEST)
    halves, signs = True, 0
    with path.open("w+b") as handle:
        handle.write(head)
        handle.truncate(plan.size)
        for name, entry in plan.raw.entries.items():
            if name not in plan.weights:
                handle.seek(len(head) + plan.entries[name].begin)
                for piece in plan.raw.chunks(entry):
                    handle.write(piece)
                continue
            weight, mask = plan.raw.read(name), plan.masks.get(name)
            try:
                packed = layout.pack(weight, None if mask is None else mask.keep, values)
            except BadInput as error:
                raise BadInput(f"{plan.raw.path}: {plain(name)}: {error}") from None
            if packed.kept != plan.weights[name].kept:
                raise BadInput(f"{plan.raw.path}: {plain(name)} was changed while it was packed")
            halves = halves and _two_of_four(packed)
            signs += 0 if mask is None else _minus_zeros(weight, mask)
            tensors = {"shape": torch.tensor(packed.shape), "compressed": packed.values, "bitmask": packed.bitmask,
                       "row_offsets": packed.row_offsets, "scale": packed.scale}  # fmt: skip
            for key, tensor in tensors.items():
                if tensor is not None:
                    handle.seek(len(head) + plan.entries[f"{name}.{key}"].begin)
                    handle.write(raw_bytes(tensor))
        handle.flush()
        handle.seek(0)
        handle.write(plan.head(digest(Raw(path))))
        sync(handle)
    return halves, signs


def _two_of_four(packed: layout.Packed) -> bool:
    if packed.cols % 4:
        return False
    bits = packed.bitmask.numpy()
    low, high = (np.bitwise_count(half) == 2 for half in (bits & 15, (bits if packed.cols % 8 == 0 else bits[:, :-1]) >> 4))
    return bool(low.all() and high.all())


def _minus_zeros(weight: Tensor, mask: Mask) -> int:
    return sum(
        int((torch.signbit(weight[run]) & (weight[run] == 0) & ~mask.keep[run]).sum())
        for run in layout.blocks(len(weight), weight[:1].numel())
    )
