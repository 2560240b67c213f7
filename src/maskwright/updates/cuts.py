"""The k-th greatest magnitude of a row too long to hold, exactly: counting passes over its chunks, then a cut.

Magnitudes of float32 order like their bits read as whole numbers. A histogram of the upper 16 bits of a sample says in
which few bins the k-th should lie; one pass counts every value in that window and all that lies beyond it, so that a
sample that misled is noticed (then all is counted first). Where only some of the entries that equal the k-th stay, a last
pass finds the chunk in which they part. No sort, no copy of the row: differences are taken by the kernels that count them
(`kernels/merge`), from pieces as they are stored. `core.select` on the whole row gives the same entries.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from math import isfinite, isqrt
from typing import TypeVar

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import top
from maskwright.kernels.merge import ABS, BINS, LOW, Keep, Piece, difference, equal, histogram, within

_INFINITE = 0x7F800000 >> LOW  # the first bin with an infinity or NaN in it
_SEEN, _HEAD = 1 << 20, 1 << 14  # entries that are looked at first: so many of all, but so many of each chunk
_WIDEST = 16  # bins of a window: 4 MiB of counts a thread
_BLOCK = 256

Pair = tuple[Piece, Piece]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Row:
    """Deltas that compete with each other, chunk by chunk. starts[i]: where chunk i begins.

    read(i, count): base and tuned of chunk i, (n,) each; of its first `count` entries where count is not 0.

    what: for messages. stream: names its random choices. wide: some deltas are float64, so all are ranked in memory.
    """

    what: str
    starts: tuple[int, ...]
    length: int
    read: Callable[[int, int], Pair]
    stream: str = ""
    wide: bool = False


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

    def keep(self, chunk: int) -> Keep:
        """The choice in one chunk."""
        return Keep(self.bits - (chunk < self.chunk), self.quota if chunk == self.chunk else 0)


@dataclass(frozen=True)
class Chosen:
    """A choice already made for the whole row, for rows that fit in memory (float64)."""

    kept: tuple[Tensor, ...]

    def keep(self, chunk: int) -> Keep:
        return Keep(mask=self.kept[chunk])


def finite(delta: Tensor, what: str) -> None:
    """Raise BadInput naming `what` when a delta is NaN or infinite."""
    if not isfinite(float(delta.sum())) and not bool(torch.isfinite(delta).all()):  # the sum alone may overflow
        raise BadInput(f"{what}: {int((~torch.isfinite(delta)).sum())} deltas are NaN or infinite")


def cuts(row: Row, counts: Sequence[int], pool: Executor | None = None) -> list[Cut | Chosen]:
    """For each count the cut that keeps exactly so many entries of `row` (0..length).

    Raises BadInput when a delta is NaN or infinite.
    """
    if row.wide:
        return [_chosen(row, count) for count in counts]
    left = {count for count in counts if 0 < count <= row.length}
    made: dict[int, Cut] = {}
    parting: dict[int, tuple[int, int]] = {}
    for head in (max(_HEAD, _SEEN // max(1, len(row.starts))), 0):  # a sample, then everything where it misled
        if not left:
            break
        bins = _bins(row, head, pool)
        windows = {count: window for count in left if (window := _window(bins, count, row.length)) is not None}
        for count, (bits, quota, tied) in _within(row, windows, pool).items():
            left.remove(count)
            if quota == tied:
                made[count] = Cut(bits, len(row.starts))  # all that tie stay, in every chunk
            else:
                parting[count] = bits, quota
    made |= _parted(row, parting, pool)
    return [made.get(count, Cut(ABS)) for count in counts]


class _Counts(threading.local):
    """A table of counts for each thread that asks for one; all of them are in `tables`."""

    def __init__(self, size: int, tables: list[Tensor]) -> None:
        self.mine = torch.zeros(size, dtype=torch.int64)
        tables.append(self.mine)


def _bins(row: Row, head: int, pool: Executor | None) -> Tensor:
    """The histogram of the upper bits, of each chunk's first `head` entries or (0) of all."""
    tables: list[Tensor] = []
    here = _Counts(BINS, tables)
    for _ in each(pool, lambda i: histogram(here.mine, *row.read(i, head)), range(len(row.starts))):
        pass
    bins = sum(tables[1:], tables[0])
    odd = int(bins[_INFINITE:].sum())
    if odd and int(bins.sum()) == row.length:
        raise BadInput(f"{row.what}: {odd} deltas are NaN or infinite")
    return bins


def _window(bins: Tensor, count: int, length: int) -> tuple[int, int] | None:
    """(first bin, bins) in which the `count`-th greatest of `length` should lie, or None where the sample is too small."""
    seen = int(bins.sum())
    if seen == length:
        return _place(bins, count)[0], 1
    rank = count * seen // length
    slack = 8 + 4 * isqrt(rank * (seen - rank) // seen)  # four standard deviations
    if rank <= slack or rank + slack > seen:
        return None
    first, last = (_place(bins, rank + side)[0] for side in (slack, -slack))
    return (first, last + 1 - first) if last < min(first + _WIDEST, _INFINITE) else None


def _within(row: Row, windows: Mapping[int, tuple[int, int]], pool: Executor | None) -> dict[int, tuple[int, int, int]]:
    """For each count whose magnitude lies in its window: its bits, how many that equal it stay, how many there are."""
    if not windows:
        return {}
    first, wide = zip(*(distinct := sorted(set(windows.values()))), (_INFINITE, 0), strict=True)
    tables: list[Tensor] = []
    here, above = _Counts(sum(wide) << LOW, tables), [0] * len(first)
    for beyond in each(pool, lambda i: within(here.mine, *row.read(i, 0), first, wide), range(len(row.starts))):
        above = [a + b for a, b in zip(above, beyond, strict=True)]
    counts = sum(tables[1:], tables[0])
    if above[-1]:
        raise BadInput(f"{row.what}: {above[-1]} deltas are NaN or infinite")
    values = dict(zip(distinct, counts.split([width << LOW for _, width in distinct]), strict=True))
    out = {}
    for count, window in windows.items():
        rank, inside = count - above[distinct.index(window)], values[window]
        if 0 < rank <= int(inside.sum()):
            place, quota = _place(inside, rank)
            out[count] = (window[0] << LOW) + place, quota, int(inside[place])
    return out


def _place(numbers: Tensor, count: int) -> tuple[int, int]:
    """Where the `count`-th greatest lies in a histogram, and the how-manieth of its bin it is."""
    start, left = _walk(numbers.view(-1, _BLOCK).sum(1), count)  # blocks first: most of a histogram is empty
    place, left = _walk(numbers[start * _BLOCK : (start + 1) * _BLOCK], left)
    return start * _BLOCK + place, left


def _walk(numbers: Tensor, count: int) -> tuple[int, int]:
    above = numbers.flip(0).cumsum(0).flip(0) - numbers  # entries beyond each
    where = int((above >= count).sum())
    return where, count - int(above[where])


def _parted(row: Row, parting: Mapping[int, tuple[int, int]], pool: Executor | None) -> dict[int, Cut]:
    """For each count, given the bits of its smallest magnitude and how many of those stay: the chunk they part in."""
    made: dict[int, Cut] = {}
    left = dict(parting)
    levels = sorted({bits for bits, _ in parting.values()})
    chunks = range(len(row.starts)) if levels else ()
    for chunk, found in enumerate(each(pool, lambda i: equal(*row.read(i, 0), levels), chunks)):
        for count, (bits, quota) in list(left.items()):
            tied = found[levels.index(bits)]
            if tied >= quota:
                made[count] = Cut(bits, chunk, quota)
                del left[count]
            else:
                left[count] = bits, quota - tied
        if not left:
            break
    if left:
        raise BadInput(f"{row.what}: changed while it was read")
    return made


def _chosen(row: Row, count: int) -> Chosen:
    parts = [difference(*row.read(i, 0)).abs() for i in range(len(row.starts))]
    magnitudes = torch.cat(parts)
    finite(magnitudes, row.what)
    kept = top(magnitudes[None], torch.tensor([count]))[0]
    return Chosen(tuple(kept.split([len(part) for part in parts])))
