"""How a delta is made sparse before merging: a band of magnitudes with exact counts, chance, or nothing dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from maskwright.core.errors import BadInput
from maskwright.core.select import top
from maskwright.kernels.merge import Keep, difference
from maskwright.updates.cuts import Chosen, Cut, Pair, Row, cuts, finite
from maskwright.updates.noise import stream

Group = Literal["row", "tensor", "global"]


class Kept(Protocol):
    """Which entries of a row stay."""

    def keep(self, chunk: int, read: Callable[[], Pair]) -> Keep:
        """The choice in one chunk. read: gives its base and tuned pieces, (n,) each."""
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
    def keep(self, chunk: int, read: Callable[[], Pair]) -> Keep:
        return Keep()


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

    def keep(self, chunk: int, read: Callable[[], Pair]) -> Keep:
        lower = self.lower.keep(chunk)
        if self.upper is None:
            return lower
        upper = self.upper.keep(chunk)
        if lower.mask is not None and upper.mask is not None:
            return Keep(mask=lower.mask & ~upper.mask)
        return lower._replace(beyond=upper.above, beyond_ties=upper.above_ties)


@dataclass(frozen=True)
class _Rows:
    """Each row of the tensor by itself; a chunk holds whole rows."""

    band: Band
    width: int
    what: str

    def keep(self, chunk: int, read: Callable[[], Pair]) -> Keep:
        rows = difference(*read()).abs_().view(-1, self.width)
        finite(rows, self.what)
        dropped, kept = self.band.counts(self.width)
        both = top(rows, torch.full((len(rows),), dropped + kept))
        return Keep(mask=(both & ~top(rows, torch.full((len(rows),), dropped)) if dropped else both).flatten())


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

    def keep(self, chunk: int, read: Callable[[], Pair]) -> Keep:
        if self.density == 1:  # 2^32 is no bound of 32 bits
            return Keep()
        return Keep(chance=(*stream(self.seed, self.row.stream), self.row.starts[chunk], int(self.density * 2**32)))
