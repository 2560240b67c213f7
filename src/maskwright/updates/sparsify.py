"""How a delta is made sparse before merging: a band of magnitudes with exact counts, chance, or nothing dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import top
from maskwright.updates.cuts import Chosen, Cut, Row, cuts, finite
from maskwright.updates.noise import bernoulli

Group = Literal["row", "tensor", "global"]


class Kept(Protocol):
    """Which entries of a row stay."""

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        """(n,) deltas of one chunk -> (n,) bool."""
        ...

    def masked(self, delta: Tensor, chunk: int) -> Tensor:
        """The deltas of one chunk with 0 for what is dropped; may be the tensor given, changed."""
        ...


class Sparsify(ABC):
    """Which entries of a delta take part."""

    group: Group = "tensor"

    @abstractmethod
    def plan(self, row: Row, width: int, seed: int, pool: Executor | None = None) -> Kept:
        """The choice for one row (a whole tensor; all tensors for group "global"). width: entries of its last dims."""


@dataclass(frozen=True)
class All(Sparsify):
    """Every entry stays."""

    def plan(self, row: Row, width: int, seed: int, pool: Executor | None = None) -> Kept:
        return _Everything()


class _Everything:
    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        return torch.ones(len(delta), dtype=torch.bool)

    def masked(self, delta: Tensor, chunk: int) -> Tensor:
        return delta


@dataclass(frozen=True)
class Band(Sparsify):
    """Drop the `drop_top` share of greatest magnitude, keep the next `density` share (arXiv 2312.06795).

    Counts are int(drop_top n) and int(density n) of a group of n, but at least one entry stays. Ties fall to the lower
    index: of equal magnitudes the lower index is the greater. Raises BadInput for shares outside (0, 1] and [0, 1), or
    that together exceed 1.
    """

    density: float
    drop_top: float = 0.0
    group: Group = "tensor"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"density lies in (0, 1], got {self.density:g}")
        if not 0 <= self.drop_top < 1:
            raise BadInput(
                f"drop_top, the share of greatest magnitude that is dropped, lies in [0, 1), got {self.drop_top:g}"
            )
        if self.density + self.drop_top > 1 + 1e-12:
            raise BadInput(
                f"density {self.density:g} and drop_top {self.drop_top:g} together exceed 1; "
                f"drop_top is the share removed, not a percentile"
            )
        if self.group not in ("row", "tensor", "global"):
            raise BadInput(f"group is row, tensor or global, not {self.group!r}")

    def counts(self, number: int) -> tuple[int, int]:
        """(dropped from the top, kept) of a group of `number`."""
        dropped = int(self.drop_top * number)
        # Differs: the codes keep int(density n), which is nothing for a bias of three entries and wipes its delta.
        return dropped, max(1, min(int(self.density * number), number - dropped)) if number else 0

    def plan(self, row: Row, width: int, seed: int, pool: Executor | None = None) -> Kept:
        if self.group == "row":
            return _Rows(self, width, row.what)
        dropped, kept = self.counts(row.length)
        upper, lower = cuts(row, (dropped, dropped + kept), pool)
        return _Between(upper if dropped else None, lower)


@dataclass(frozen=True)
class _Between:
    upper: Cut | Chosen | None
    lower: Cut | Chosen

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        kept = self.lower.keep(delta, chunk)
        return kept if self.upper is None else kept & ~self.upper.keep(delta, chunk)

    def masked(self, delta: Tensor, chunk: int) -> Tensor:
        # hardshrink is one pass where a comparison and a product are three; it drops what `keep` drops, and zeros.
        least = self.lower.least(chunk)
        most = None if self.upper is None else self.upper.least(chunk)
        if least is None or (self.upper is not None and most is None):
            return torch.where(self.keep(delta, chunk), delta, 0.0)
        out = torch.nn.functional.hardshrink(delta, least)
        return out if most is None else out.sub_(torch.nn.functional.hardshrink(delta, most))


@dataclass(frozen=True)
class _Rows:
    """Each row of the tensor by itself; a chunk holds whole rows."""

    band: Band
    width: int
    what: str

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        rows = delta.abs().view(-1, self.width)
        finite(rows, self.what)
        dropped, kept = self.band.counts(self.width)
        both = top(rows, torch.full((len(rows),), dropped + kept))
        return (both & ~top(rows, torch.full((len(rows),), dropped)) if dropped else both).flatten()

    def masked(self, delta: Tensor, chunk: int) -> Tensor:
        return torch.where(self.keep(delta, chunk), delta, 0.0)


@dataclass(frozen=True)
class Chance(Sparsify):
    """Each entry stays with probability `density`, by seed, name and index alone (DARE, arXiv 2311.03099)."""

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"density lies in (0, 1], got {self.density:g}")

    def plan(self, row: Row, width: int, seed: int, pool: Executor | None = None) -> Kept:
        return _Drawn(self.density, seed, row)


@dataclass(frozen=True)
class _Drawn:
    density: float
    seed: int
    row: Row

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        finite(delta, self.row.what)  # or chance would drop it unseen
        start = self.row.starts[chunk]
        return bernoulli(self.seed, self.row.stream, start, start + len(delta), self.density)

    def masked(self, delta: Tensor, chunk: int) -> Tensor:
        return delta if self.density == 1 else torch.where(self.keep(delta, chunk), delta, 0.0)
