"""MaskSet: names and their masks, with how they were made. A site that is not masked is absent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask

Align = Literal["strict", "inner"]


@dataclass(frozen=True, eq=False)
class MaskSet(Mapping[str, Mask]):
    """Ordered, immutable name -> Mask. A name is a full parameter name.

    made_by: method, version, settings and seed. base: hash of the weights the masks were made for, or "".
    """

    masks: Mapping[str, Mask]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", dict(self.masks))
        object.__setattr__(self, "made_by", dict(self.made_by))

    def __getitem__(self, name: str) -> Mask:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} sites, {self.count} of {self.total} kept, density {self.density:.6g})"

    @property
    def count(self) -> int:
        """Kept entries over all sites."""
        return sum(mask.count for mask in self.values())

    @property
    def total(self) -> int:
        """Entries over all sites."""
        return sum(mask.keep.numel() for mask in self.values())

    @property
    def density(self) -> float:
        return self.count / self.total if self.total else 1.0

    def check(self) -> MaskSet:
        """Return self if every pattern holds; BadInput naming the first site where one does not."""
        for name, mask in self.items():
            try:
                mask.check()
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
        return self

    def equal(self, other: MaskSet) -> bool:
        """Same sites, same kept entries, same patterns (how they were made may differ)."""
        return list(self) == list(other) and all(mask.equal(other[name]) for name, mask in self.items())

    def overlap(self, other: MaskSet) -> float:
        """Kept by both over kept by either (Jaccard), over the sites both have."""
        names = self._names(other, "inner")
        both = sum((self[n] & other[n]).count for n in names)
        either = sum((self[n] | other[n]).count for n in names)
        return both / either if either else 1.0

    def combine(
        self, other: MaskSet, op: Callable[[Mask, Mask], Mask], align: Align = "strict", word: str = "combine"
    ) -> MaskSet:
        """`op` per name. strict: the names must agree; inner: the names both have, the rest is left out."""
        names = self._names(other, align)
        made = {"method": word, "of": [dict(self.made_by), dict(other.made_by)]}
        base = self.base if self.base == other.base else ""
        return MaskSet({name: op(self[name], other[name]) for name in names}, made, base)

    def __and__(self, other: MaskSet) -> MaskSet:
        return self.combine(other, lambda a, b: a & b, word="and")

    def __or__(self, other: MaskSet) -> MaskSet:
        return self.combine(other, lambda a, b: a | b, word="or")

    def __sub__(self, other: MaskSet) -> MaskSet:
        return self.combine(other, lambda a, b: a - b, word="minus")

    def __invert__(self) -> MaskSet:
        return MaskSet({n: ~m for n, m in self.items()}, {"method": "not", "of": [dict(self.made_by)]}, self.base)

    def _names(self, other: MaskSet, align: Align) -> list[str]:
        odd = [n for n in self if n not in other] + [n for n in other if n not in self]
        if align == "strict" and odd:
            raise BadInput(f"the mask sets name different sites: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}")
        return [name for name in self if name in other]

    def fits(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Raise BadInput when `target` lacks a site or has it in another shape."""
        found = _tensors(target)
        missing = [name for name in self if name not in found]
        if missing:
            raise BadInput(f"no parameter named {', '.join(missing[:3])} ({len(missing)} of {len(self)} sites are missing)")
        for name, mask in self.items():
            if tuple(found[name].shape) != mask.shape:
                raise BadInput(f"{name}: the mask has shape {mask.shape}, the parameter {tuple(found[name].shape)}")

    def same_base(self, target: nn.Module | Mapping[str, Tensor]) -> bool:
        """Whether the target's weights are those the masks were made for (True where no hash was stored)."""
        found = _tensors(target)
        return not self.base or self.base == base_hash({name: found[name] for name in self})

    def save(self, path: str | Path) -> None:
        """Write one .safetensors, one bit an entry (see core/store.py)."""
        from maskwright.core.store import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> MaskSet:
        """Read what `save` wrote. Raises BadInput in one line for anything else."""
        from maskwright.core.store import load

        masks = load(Path(path))
        if not isinstance(masks, MaskSet):
            raise BadInput(f"{path}: holds soft masks; use maskwright.core.store.load")
        return masks


@dataclass(frozen=True, eq=False)
class SoftMaskSet(Mapping[str, SoftMask]):
    """Name -> SoftMask, stored as kind "soft"."""

    masks: Mapping[str, SoftMask]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", dict(self.masks))
        object.__setattr__(self, "made_by", dict(self.made_by))

    def __getitem__(self, name: str) -> SoftMask:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)


def _tensors(target: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(target.named_parameters(remove_duplicate=False)) if isinstance(target, nn.Module) else target


def tensor_hash(value: Tensor) -> str:
    """sha256 of a tensor's shape and values. Half precision is widened first, so a bf16 file and its float32
    load share a hash."""
    value = value.detach().cpu().contiguous()
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_hash(tensors: Mapping[str, Tensor] | Mapping[str, str]) -> str:
    """One hash over named tensors (or their `tensor_hash`), whatever the order they come in."""
    parts = {name: v if isinstance(v, str) else tensor_hash(v) for name, v in tensors.items()}
    return hashlib.sha256("".join(f"{name}\0{parts[name]}\n" for name in sorted(parts)).encode()).hexdigest()
