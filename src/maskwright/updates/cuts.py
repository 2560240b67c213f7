"""The k-th greatest magnitude of a row too long to hold, exactly: two counting passes over its chunks, then a cut.

Magnitudes of float32 order like their bits read as whole numbers, so a histogram of the upper 16 bits finds the bin that
holds the k-th, and the lower 15 bits of that bin's entries find it: no sort, no copy of the row. `core.select` on the
whole row gives the same entries (tests compare them); here nothing longer than a chunk is in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import top

_LOW = 15  # bits below a bin
_BINS = 1 << (31 - _LOW)
_INFINITE = 0x7F800000 >> _LOW  # the first bin with an infinity or NaN in it
_ABS = 0x7FFFFFFF

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Row:
    """Deltas that compete with each other, chunk by chunk. read(i): (n,) float, chunk i; starts[i]: where it begins.

    what: for messages. stream: names its random choices.
    """

    what: str
    starts: tuple[int, ...]
    length: int
    read: Callable[[int], Tensor]
    stream: str = ""


def each(pool: Executor | None, work: Callable[[In], Out], items: Iterable[In], ahead: int = 4) -> Iterator[Out]:
    """`work` of every item in their order, at most `ahead` results waiting; in the pool's threads if there is one."""
    if pool is None:
        yield from map(work, items)
        return
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


@dataclass(frozen=True)
class Cut:
    """The `count` entries of greatest magnitude of a row; equal ones fall to the lower index.

    bits: those of the smallest magnitude kept. chunk, quota: of the entries that have exactly it, all of the chunks before
    `chunk` stay, the first `quota` of that chunk, and none after.
    """

    bits: int
    chunk: int = 0
    quota: int = 0

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        """(n,) float32 of one chunk -> (n,) bool."""
        bits = magnitude_bits(delta)
        if chunk < self.chunk:
            return bits > self.bits - 1
        kept = bits > self.bits
        if chunk == self.chunk and self.quota:
            kept[(bits == self.bits).nonzero().flatten()[: self.quota]] = True
        return kept

    def least(self, chunk: int) -> float | None:
        """The magnitude that what stays exceeds (a kept 0 apart), or None where only some of the tied entries may stay."""
        if not self.bits or chunk > self.chunk or (chunk == self.chunk and not self.quota):
            return _float(self.bits)
        return _float(self.bits - 1) if chunk < self.chunk else None


@dataclass(frozen=True)
class Chosen:
    """A choice already made for the whole row, for rows that fit in memory (float64)."""

    kept: tuple[Tensor, ...]

    def keep(self, delta: Tensor, chunk: int) -> Tensor:
        return self.kept[chunk]

    def least(self, chunk: int) -> float | None:
        return None


def finite(delta: Tensor, what: str) -> None:
    """Raise BadInput naming `what` when a delta is NaN or infinite."""
    if not isfinite(float(delta.sum())) and not bool(torch.isfinite(delta).all()):  # the sum alone may overflow
        raise BadInput(f"{what}: {int((~torch.isfinite(delta)).sum())} deltas are NaN or infinite")


def magnitude_bits(delta: Tensor) -> Tensor:
    """|float32| as int32 whose order is that of the magnitudes."""
    return delta.view(torch.int32) & _ABS


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def cuts(row: Row, counts: Sequence[int], pool: Executor | None = None) -> list[Cut | Chosen]:
    """For each count the cut that keeps exactly so many entries of `row` (0..length).

    Raises BadInput when a delta is NaN or infinite.
    """
    if row.length and row.read(0).dtype == torch.float64:
        return [_chosen(row, count) for count in counts]
    number = len(row.starts)
    bins = torch.zeros(_BINS, dtype=torch.int64)
    for found in each(pool, lambda i: torch.bincount(magnitude_bits(row.read(i)) >> _LOW, minlength=_BINS), range(number)):
        bins += found
    if int(bins[_INFINITE:].sum()):
        raise BadInput(f"{row.what}: {int(bins[_INFINITE:].sum())} deltas are NaN or infinite")
    # above[b]: entries in bins beyond b
    above = bins.flip(0).cumsum(0).flip(0) - bins
    wanted = {count: int((above >= count).sum()) for count in counts if 0 < count <= row.length}
    held: dict[int, list[Tensor]] = {where: [] for where in wanted.values()}

    def inside(i: int) -> list[Tensor]:
        bits = magnitude_bits(row.read(i))
        upper = bits >> _LOW
        return [(bits[upper == where] & ((1 << _LOW) - 1)).to(torch.int16) for where in held]

    if held:
        for parts in each(pool, inside, range(number)):
            for where, part in zip(held, parts, strict=True):
                held[where].append(part)
    return [
        _cut(row, held[wanted[count]], wanted[count], count - int(above[wanted[count]])) if count in wanted else Cut(_ABS)
        for count in counts
    ]


def _cut(row: Row, parts: list[Tensor], where: int, count: int) -> Cut:
    """The cut that keeps `count` of one bin's entries, whose lower bits are `parts`, chunk by chunk."""
    lower = torch.zeros(1 << _LOW, dtype=torch.int64)
    for part in parts:
        lower += torch.bincount(part.to(torch.int32), minlength=1 << _LOW)
    above = lower.flip(0).cumsum(0).flip(0) - lower
    low = int((above >= count).sum())
    left = count - int(above[low])
    for chunk, part in enumerate(parts):
        tied = int((part == low).sum())
        if tied >= left:
            return Cut(where << _LOW | low, chunk, left)
        left -= tied
    raise BadInput(f"{row.what}: changed while it was read")


def _chosen(row: Row, count: int) -> Chosen:
    parts = [row.read(i).abs() for i in range(len(row.starts))]
    magnitudes = torch.cat(parts)
    finite(magnitudes, row.what)
    kept = top(magnitudes[None], torch.tensor([count]))[0]
    return Chosen(tuple(kept.split([len(part) for part in parts])))
