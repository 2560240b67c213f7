"""Mask: which entries of a tensor stay (True = kept), with the pattern that the choice obeys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.pattern import Pattern, Unstructured

_ANY = Unstructured()


@dataclass(frozen=True, eq=False)
class Mask:
    """A boolean keep tensor and its pattern. Frozen; every operation gives a new Mask.

    The same type serves a weight, a delta, a (head, query block, key block) grid, a token row, a pixel plane.
    Raises BadInput when `keep` is not boolean or its shape does not fit the pattern.
    """

    keep: Tensor
    pattern: Pattern = _ANY

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool:
            raise BadInput(f"a mask's keep is boolean, got {self.keep.dtype} of shape {tuple(self.keep.shape)}")
        self.pattern.fits(tuple(self.keep.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.keep.shape)

    @property
    def count(self) -> int:
        """Number of kept entries, exact."""
        return int(self.keep.sum())

    @property
    def density(self) -> float:
        """Share kept; 1.0 for a mask without entries (nothing was dropped)."""
        return self.count / self.keep.numel() if self.keep.numel() else 1.0

    def indices(self) -> Tensor:
        """Flat indices of the kept entries, ascending. (count,) int64."""
        return self.keep.flatten().nonzero().flatten()

    def check(self) -> Mask:
        """Return self if the pattern really holds, else raise BadInput naming the first group that breaks it."""
        self.pattern.check(self.keep)
        return self

    def equal(self, other: Mask) -> bool:
        """Same kept entries and the same pattern."""
        return self.pattern == other.pattern and torch.equal(self.keep, other.keep)

    def _with(self, other: Mask, keep: Tensor) -> Mask:
        # Whole units stay whole under set algebra, but a count per group (N:M) does not survive it.
        same = self.pattern == other.pattern and self.pattern.fixed is None
        return Mask(keep, self.pattern if same else Unstructured())

    def _other(self, other: Mask) -> Tensor:
        if self.shape != other.shape:
            raise BadInput(f"masks of shapes {self.shape} and {other.shape} cannot be combined")
        return other.keep

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, self.keep & self._other(other))

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, self.keep | self._other(other))

    def __sub__(self, other: Mask) -> Mask:
        return self._with(other, self.keep & ~self._other(other))

    def __invert__(self) -> Mask:
        return Mask(~self.keep, self.pattern.complement())

    def to(self, device: torch.device | str) -> Mask:
        return Mask(self.keep.to(device), self.pattern)


@dataclass(frozen=True, eq=False)
class SoftMask:
    """Real values >= 0 in place of a bool, for methods whose mask is a weight (stored as kind "soft").

    Raises BadInput when a value is negative or not finite.
    """

    values: Tensor
    pattern: Pattern = _ANY

    def __post_init__(self) -> None:
        if not self.values.dtype.is_floating_point:
            raise BadInput(f"a soft mask holds real values, got {self.values.dtype}")
        if not bool(torch.isfinite(self.values).all()) or bool((self.values < 0).any()):
            raise BadInput(f"a soft mask of shape {tuple(self.values.shape)} holds a negative or non-finite value")
        self.pattern.fits(tuple(self.values.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def harden(self, threshold: float = 0.0) -> Mask:
        """Kept = value above the threshold (strictly, so a value of 0 is dropped by default)."""
        return Mask(self.values > threshold, Unstructured())
