"""Patterns: what a unit is, and which units compete. A pattern folds scores to (groups, units) and back.

`within` names the dims that split the competition: () one group for the whole tensor, (0,) one group a row.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput

Shape = tuple[int, ...]


class Pattern(ABC):
    """What a unit is and which units compete. Final subclasses are frozen dataclasses (so `==` works)."""

    @property
    def fixed(self) -> int | None:
        """Kept units per group that the pattern itself imposes, or None."""
        return None

    @abstractmethod
    def fits(self, shape: Shape) -> None:
        """Raise BadInput when a tensor of this shape cannot carry the pattern (ragged groups are refused)."""

    @abstractmethod
    def fold(self, score: Tensor) -> Tensor:
        """Scores of any shape -> (groups, units), units in ascending flat order inside a group."""

    @abstractmethod
    def unfold(self, kept: Tensor, shape: Shape) -> Tensor:
        """(groups, units) -> a tensor of `shape`, each entry carrying its unit's value."""

    @abstractmethod
    def grid(self, shape: Shape) -> tuple[int, int]:
        """(groups, units) for a tensor of this shape, without touching data."""

    @abstractmethod
    def spec(self) -> str:
        """One-line text from which `parse` gives an equal pattern."""

    def unit_size(self, shape: Shape) -> float:
        """Mean number of entries in a unit."""
        groups, units = self.grid(shape)
        return prod(shape) / (groups * units) if groups * units else 1.0

    def complement(self) -> Pattern:
        """The pattern that the dropped entries obey."""
        return self

    def check(self, keep: Tensor) -> None:
        """Raise BadInput where `keep` does not obey the pattern."""
        self.fits(tuple(keep.shape))

    def __str__(self) -> str:
        return self.spec()


def _dims(dims: tuple[int, ...], ndim: int, what: str) -> tuple[int, ...]:
    out = tuple(sorted(d % ndim if ndim else d for d in dims if -ndim <= d < ndim))
    if len(out) != len(dims) or len(set(out)) != len(out):
        raise BadInput(f"{what} {dims} does not fit a tensor of {ndim} dims")
    return out


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every entry is a unit; `within` splits the competition."""

    within: tuple[int, ...] = ()

    def fits(self, shape: Shape) -> None:
        _dims(self.within, len(shape), "within")

    def _order(self, shape: Shape) -> tuple[tuple[int, ...], int]:
        first = _dims(self.within, len(shape), "within")
        rest = tuple(d for d in range(len(shape)) if d not in first)
        return first + rest, prod(shape[d] for d in first)

    def grid(self, shape: Shape) -> tuple[int, int]:
        _, groups = self._order(shape)
        return groups, prod(shape) // groups if groups else 0

    def fold(self, score: Tensor) -> Tensor:
        order, _ = self._order(tuple(score.shape))
        return score.permute(order).reshape(self.grid(tuple(score.shape)))

    def unfold(self, kept: Tensor, shape: Shape) -> Tensor:
        order, _ = self._order(shape)
        back = [order.index(d) for d in range(len(shape))]
        return kept.reshape([shape[d] for d in order]).permute(back).contiguous()

    def spec(self) -> str:
        return "unstructured" + (f"@{','.join(map(str, self.within))}" if self.within else "")


@dataclass(frozen=True)
class NM(Pattern):
    """N:M, n *kept* of every m consecutive entries along `dim` (papers and codes disagree; here n stays).

    Raises BadInput when m does not divide the size: a ragged tail has no N:M meaning.
    """

    n: int
    m: int
    dim: int = -1

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise BadInput(f"N:M keeps n of m with 0 < n <= m, got {self.n}:{self.m}")

    @property
    def fixed(self) -> int:
        return self.n

    def fits(self, shape: Shape) -> None:
        (dim,) = _dims((self.dim,), len(shape), "N:M dim")
        if shape[dim] % self.m:
            raise BadInput(f"{self.n}:{self.m} along dim {dim} of shape {shape}: {shape[dim]} is not divisible by {self.m}")

    def grid(self, shape: Shape) -> tuple[int, int]:
        self.fits(shape)
        return prod(shape) // self.m, self.m

    def fold(self, score: Tensor) -> Tensor:
        return score.movedim(self.dim, -1).reshape(self.grid(tuple(score.shape)))

    def unfold(self, kept: Tensor, shape: Shape) -> Tensor:
        dim = self.dim % len(shape)
        moved = [*shape[:dim], *shape[dim + 1 :], shape[dim]]
        return kept.reshape(moved).movedim(-1, dim).contiguous()

    def complement(self) -> Pattern:
        return NM(self.m - self.n, self.m, self.dim) if self.n < self.m else Unstructured()

    def check(self, keep: Tensor) -> None:
        wrong = (self.fold(keep).sum(1) != self.n).nonzero()
        if len(wrong):
            group = int(wrong[0])
            count = int(self.fold(keep)[group].sum())
            raise BadInput(
                f"{self.spec()} does not hold on shape {tuple(keep.shape)}: group {group} keeps {count} "
                f"({len(wrong)} groups of {len(self.fold(keep))} are wrong)"
            )

    def spec(self) -> str:
        return f"{self.n}:{self.m}" + ("" if self.dim == -1 else f"@{self.dim}")


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `shape` entries are the units; a unit's score is the sum over its entries.

    `shape` names the block's size along the last dims; `within` names dims of the *grid of blocks*. A ragged
    edge is refused unless `pad=True`, where edge blocks hold fewer entries.
    """

    shape: tuple[int, ...]
    within: tuple[int, ...] = ()
    pad: bool = False

    def __post_init__(self) -> None:
        if not self.shape or any(side < 1 for side in self.shape):
            raise BadInput(f"a block needs sides of at least 1, got {self.shape}")

    def _sides(self, shape: Shape) -> tuple[list[int], list[int]]:
        if len(self.shape) > len(shape):
            raise BadInput(f"block {self.shape} does not fit a tensor of shape {shape}")
        asked = [1] * (len(shape) - len(self.shape)) + list(self.shape)
        if not self.pad and any(size % side for size, side in zip(shape, asked, strict=True)):
            raise BadInput(f"{self.spec()} on shape {shape}: a side is not divisible (pad=True allows smaller edge blocks)")
        # A block longer than the tensor covers it: never pad (and allocate) beyond the next multiple.
        sides = [max(1, min(side, size)) for size, side in zip(shape, asked, strict=True)]
        return sides, [-(-size // side) for size, side in zip(shape, sides, strict=True)]

    def fits(self, shape: Shape) -> None:
        self._sides(shape)
        _dims(self.within, len(shape), "within")

    def grid(self, shape: Shape) -> tuple[int, int]:
        self.fits(shape)
        return Unstructured(self.within).grid(tuple(self._sides(shape)[1]))

    def fold(self, score: Tensor) -> Tensor:
        self.fits(tuple(score.shape))
        units = score.double()
        for dim, (side, count) in enumerate(zip(*self._sides(tuple(score.shape)), strict=True)):
            if side == 1:
                continue
            if short := count * side - units.shape[dim]:
                units = torch.nn.functional.pad(units, [0, 0] * (units.ndim - 1 - dim) + [0, short])
            units = _sum(units.unflatten(dim, (count, side)), (dim + 1,))
        return Unstructured(self.within).fold(units)

    def unfold(self, kept: Tensor, shape: Shape) -> Tensor:
        sides, counts = self._sides(shape)
        out = Unstructured(self.within).unfold(kept, tuple(counts))
        for dim, side in enumerate(sides):
            if side > 1:
                out = out.repeat_interleave(side, dim).narrow(dim, 0, shape[dim])
        return out.contiguous()

    def check(self, keep: Tensor) -> None:
        _whole_units(self, keep)

    def spec(self) -> str:
        tail = f"@{','.join(map(str, self.within))}" if self.within else ""
        return "block:" + "x".join(map(str, self.shape)) + tail + ("+pad" if self.pad else "")


@dataclass(frozen=True)
class Group(Pattern):
    """Whole slices are the units: a unit is everything that shares the indices along `dims` (rows, heads, bins).

    Its score is the sum over the slice. All units compete with each other.
    """

    dims: tuple[int, ...]

    def fits(self, shape: Shape) -> None:
        _dims(self.dims, len(shape), "group dims")

    def grid(self, shape: Shape) -> tuple[int, int]:
        return 1, prod(shape[d] for d in _dims(self.dims, len(shape), "group dims"))

    def fold(self, score: Tensor) -> Tensor:
        dims = _dims(self.dims, score.ndim, "group dims")
        rest = tuple(d for d in range(score.ndim) if d not in dims)
        return (_sum(score.double(), rest) if rest else score).reshape(1, -1)

    def unfold(self, kept: Tensor, shape: Shape) -> Tensor:
        dims = _dims(self.dims, len(shape), "group dims")
        return kept.reshape([n if d in dims else 1 for d, n in enumerate(shape)]).expand(shape).contiguous()

    def check(self, keep: Tensor) -> None:
        _whole_units(self, keep)

    def spec(self) -> str:
        return "group:" + ",".join(map(str, self.dims))


def _sum(score: Tensor, dims: tuple[int, ...]) -> Tensor:
    # Units with equal entries must tie exactly. torch's sum adds in another order in a vector's tail (and between
    # threads), so equal columns differ in the last bit; numpy adds every unit of an array in the same order.
    if score.device.type != "cpu":
        return score.sum(dim=dims)
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(np.asarray(score.detach().contiguous().numpy().sum(axis=dims)))


def _whole_units(pattern: Pattern, keep: Tensor) -> None:
    pattern.fits(tuple(keep.shape))
    some = pattern.unfold(pattern.fold(keep.float()) > 0, tuple(keep.shape))
    torn = int((some != keep).sum())
    if torn:
        raise BadInput(
            f"{pattern.spec()} does not hold on shape {tuple(keep.shape)}: {torn} entries are split from their unit"
        )


def parse(spec: str) -> Pattern:
    """Pattern from text: `unstructured`, `unstructured@0`, `2:4`, `2:4@1`, `block:32x32`, `group:0`.

    Raises BadInput listing the known forms.
    """
    text = spec.strip().lower()
    if match := re.fullmatch(r"unstructured(?:@(-?\d+(?:,-?\d+)*))?", text):
        return Unstructured(_ints(match[1]))
    if match := re.fullmatch(r"(\d+):(\d+)(?:@(-?\d+))?", text):
        return NM(int(match[1]), int(match[2]), int(match[3] or -1))
    if match := re.fullmatch(r"block:(\d+(?:x\d+)*)(?:@(-?\d+(?:,-?\d+)*))?(\+pad)?", text):
        return Block(tuple(int(part) for part in match[1].split("x")), _ints(match[2]), bool(match[3]))
    if match := re.fullmatch(r"group:(-?\d+(?:,-?\d+)*)?", text):
        return Group(_ints(match[1]))
    raise BadInput(f"unknown pattern {spec!r}; known: unstructured, N:M (2:4, 4:8, 1:4), block:ROWSxCOLS, group:DIM")


def _ints(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()
