"""Sparse differences between a tuned model and its base: made, added, subtracted, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates.base import BaseId, around
from maskwright.updates.fitting import matching

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Delta:
    """The entries of one tensor that differ. indices: (n,) int64, flat and ascending. values: (n,) float, what is added."""

    shape: Shape
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int64 or self.indices.shape != self.values.shape or self.indices.ndim != 1:
            raise BadInput(f"a delta needs (n,) int64 indices and as many values, got {tuple(self.indices.shape)}")
        if not self.values.dtype.is_floating_point or not bool(torch.isfinite(self.values).all()):
            raise BadInput(f"a delta of shape {self.shape} needs finite float values, got {self.values.dtype}")
        if len(self.indices):
            low, high = int(self.indices[0]), int(self.indices[-1])
            if low < 0 or high >= prod(self.shape) or bool((self.indices[1:] <= self.indices[:-1]).any()):
                raise BadInput(f"a delta of shape {self.shape} needs ascending indices below {prod(self.shape)}")

    @staticmethod
    def checked(shape: Shape, indices: Tensor, values: Tensor) -> Delta:
        """Of what was checked already, as the file's kernels do for all tensors at once."""
        made = object.__new__(Delta)
        made.__dict__.update(shape=shape, indices=indices, values=values)
        return made

    @property
    def count(self) -> int:
        """Stored entries."""
        return len(self.indices)

    @property
    def mask(self) -> Mask:
        """Where the entries lie."""
        keep = torch.zeros(prod(self.shape), dtype=torch.bool)
        keep[self.indices] = True
        return Mask(keep.view(self.shape))

    def dense(self) -> Tensor:
        """The difference as a tensor of the shape."""
        out = torch.zeros(prod(self.shape), dtype=self.values.dtype)
        out[self.indices] = self.values
        return out.view(self.shape)

    def plus(self, other: Delta, sign: float = 1.0) -> Delta:
        """The sum over the union of entries, in the wider dtype."""
        if self.shape != other.shape:
            raise BadInput(f"deltas of shapes {self.shape} and {other.shape} cannot be added")
        where, place = torch.cat([self.indices, other.indices]).unique(return_inverse=True)
        values = torch.zeros(len(where), dtype=torch.promote_types(self.values.dtype, other.values.dtype))
        values[place[: self.count]] = self.values.to(values.dtype)
        values[place[self.count :]] += other.values.to(values.dtype) * sign
        return Delta(self.shape, where, values)

    def times(self, factor: float) -> Delta:
        return replace(self, values=self.values * factor)

    def only(self, mask: Mask) -> Delta:
        """The entries that a mask keeps."""
        if mask.shape != self.shape:
            raise BadInput(f"a mask of shape {mask.shape} on a delta of shape {self.shape}")
        kept = mask.keep.flatten()[self.indices]
        return Delta(self.shape, self.indices[kept], self.values[kept])


@dataclass(frozen=True, eq=False)
class Deltas(Mapping[str, Delta]):
    """Name -> Delta, with how they were made and for which base. Frozen; every operation gives new Deltas.

    full: tensors that replace the base's (a head, say) instead of being added, finite. base: name -> BaseId, as
    far as known: of the tensors that the deltas change, or where there are none of some that they leave alone.
    """

    deltas: Mapping[str, Delta]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, BaseId] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.full.items():
            if count := odd(value):
                raise BadInput(f"{name}: {count} entries of a tensor stored whole are NaN or infinite")

    def __getitem__(self, name: str) -> Delta:
        return self.deltas[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)

    def __repr__(self) -> str:
        return f"Deltas({len(self)} tensors, {self.count} of {self.total} entries, {len(self.full)} full)"

    @property
    def count(self) -> int:
        """Stored entries over all tensors."""
        return sum(delta.count for delta in self.values())

    @property
    def total(self) -> int:
        """Entries of the tensors they lie in."""
        return sum(prod(delta.shape) for delta in self.values())

    @property
    def density(self) -> float:
        return self.count / self.total if self.total else 0.0

    @property
    def key(self) -> str:
        """Tells two Deltas apart by what they hold (counts and sums of each tensor)."""
        told = [(name, d.count, int(d.indices.sum()), *_sums(d.values, d.indices)) for name, d in self.items()]
        return repr((told, [(name, *_sums(self.full[name].flatten())) for name in sorted(self.full)]))

    @property
    def masks(self) -> MaskSet:
        """Where the entries lie."""
        return MaskSet({name: delta.mask for name, delta in self.items()}, self.made_by)

    def overlap(self, other: Deltas) -> float:
        """Entries of both over entries of either (Jaccard), over all tensors of both."""
        both = either = 0
        for name in dict.fromkeys([*self, *other]):
            mine = self[name].indices if name in self else torch.empty(0, dtype=torch.int64)
            theirs = other[name].indices if name in other else torch.empty(0, dtype=torch.int64)
            shared = int(torch.isin(mine, theirs, assume_unique=True).sum())
            both, either = both + shared, either + len(mine) + len(theirs) - shared
        return both / either if either else 1.0

    def without_full(self) -> Deltas:
        """The differences alone: a language delta leaves its masked-LM head at home."""
        return replace(self, full={})

    def map(self, change: Callable[[str, Delta], Delta]) -> Deltas:
        """Each delta changed."""
        return replace(self, deltas={name: change(name, delta) for name, delta in self.items()})

    def only(self, masks: MaskSet) -> Deltas:
        """The entries that the masks keep; tensors without a mask stay whole."""
        return self.map(lambda name, delta: delta.only(masks[name]) if name in masks else delta)

    def __mul__(self, factor: float) -> Deltas:
        if self.full:
            raise BadInput(f"{next(iter(self.full))} replaces the base's tensor and cannot be scaled: use without_full()")
        return self.map(lambda name, delta: delta.times(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Deltas:
        return self * -1.0

    def __add__(self, other: Deltas) -> Deltas:
        return self._plus(other, 1.0)

    def __sub__(self, other: Deltas) -> Deltas:
        return self._plus(other, -1.0)

    def _plus(self, other: Deltas, sign: float) -> Deltas:
        if set(self.full) & set(other.full):
            raise BadInput(f"{min(set(self.full) & set(other.full))} would be replaced twice: use without_full() on one")
        if other.full and sign < 0:
            raise BadInput(f"{next(iter(other.full))} replaces the base's tensor and cannot be subtracted")
        for name, theirs in other.base.items():
            if name in self.base and self.base[name] != theirs:
                raise BadInput(f"{name}: the two deltas were made for different bases")
        out = dict(self.deltas)
        for name, delta in other.items():
            try:
                out[name] = out[name].plus(delta, sign) if name in out else delta.times(sign) if sign != 1 else delta
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
        made = {"method": "plus" if sign > 0 else "minus", "of": [dict(self.made_by), dict(other.made_by)]}
        return Deltas(out, {**self.full, **other.full}, {**self.base, **other.base}, made)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one .safetensors (see delta_file.py). dtype: of the values (default: as they are)."""
        from maskwright.updates.delta_file import save

        save(self, Path(path), dtype)

    @staticmethod
    def load(path: str | Path) -> Deltas:
        """Read what `save` wrote. Raises BadInput in one line for anything else."""
        from maskwright.updates.delta_file import load

        return load(Path(path))


def odd(values: Tensor) -> int:
    """How many are NaN or infinite."""
    return values.numel() - int(torch.isfinite(wide(values)).sum())


def wide(values: Tensor) -> Tensor:
    """8-bit floats, of which torch can ask little, as float32; others as they are."""
    return values.float() if values.dtype.itemsize == 1 else values


def _sums(values: Tensor, places: Tensor | None = None) -> tuple[float, float]:
    # Beside the plain sum one by place: d and -d may have the same, and the same values may lie elsewhere.
    values = values.double()
    return float(values.sum()), float((values * (torch.arange(len(values)) if places is None else places)).sum())


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and float buffers by name, tied ones once, under their first name."""
    if isinstance(model, nn.Module):
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    else:
        found = dict(model)
    return {name: value.detach() for name, value in found.items() if value.dtype.is_floating_point}


@torch.no_grad()
def delta(
    tuned: nn.Module | Mapping[str, Tensor], base: nn.Module | Mapping[str, Tensor], *, masks: MaskSet | None = None,
    full: Sequence[str] = (), eps: float = 0.0, made_by: Mapping[str, Any] | None = None,
) -> Deltas:  # fmt: skip
    """tuned - base where it is not 0, float32 (float64 for float64): what `add` gives back.

    masks: only their sites and kept entries. full: patterns of names that are stored whole, and may lie in `tuned` alone
    (a head). eps: differences up to it are dropped (LT-SFT: 1e-7). Raises BadInput for names or shapes that differ, for
    patterns that match nothing, and for differences or whole tensors that are not finite.
    """
    new, old = tensors_of(tuned), tensors_of(base)
    whole = {name: new[name].clone() for name in matching(new, full)}
    names = [name for name in new if name not in whole] if masks is None else list(masks)
    missing = [name for name in names if name not in old or name not in new]
    missing += [name for name in old if name not in new and name not in whole]
    if missing:
        raise BadInput(f"{missing[0]}: only one of the two models has it ({len(missing)} tensors)")
    out, ids = {}, {}
    for name in names:
        if new[name].shape != old[name].shape:
            raise BadInput(f"{name}: shape {tuple(new[name].shape)}, in the base {tuple(old[name].shape)}")
        wide = torch.float64 if torch.float64 in (new[name].dtype, old[name].dtype) else torch.float32
        gap = (new[name].to(wide) - old[name].to(wide)).flatten()
        if not bool(torch.isfinite(gap).all()):
            raise BadInput(f"{name}: {int((~torch.isfinite(gap)).sum())} differences are NaN or infinite")
        changed = gap.abs() > eps
        if masks is not None:
            changed &= masks[name].keep.flatten()
        if bool(changed.any()):
            where = changed.nonzero().flatten()
            out[name] = Delta(tuple(new[name].shape), where, gap[where])
            ids[name] = BaseId.of(old[name])
    if whole and not out:
        ids = {name: BaseId.of(old[name]) for name in around({n: v.shape for n, v in old.items() if n not in whole})}
    return Deltas(out, whole, ids, dict(made_by or {}))
