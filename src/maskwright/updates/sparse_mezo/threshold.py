"""The exact threshold of a tensor read piece by piece: never a copy of it, whatever its size.

A histogram over the leading bits of the values says which are surely in; `core.select` decides among the rest, so
that the count is exact and ties fall to the lower index. The answer, a level and a place, is all that must be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskwright.core.pattern import Unstructured
from maskwright.core.select import select

CHUNK = 1 << 16  # entries a piece; a multiple of 8, so that the bits of every piece begin at a byte
_BUCKETS = 1 << 15  # exponent and 7 leading bits of a float32 without its sign
Values = Callable[[int, int], Tensor]


def pieces(total: int) -> Iterator[tuple[int, int]]:
    """Borders of the pieces of a tensor of `total` entries."""
    for start in range(0, total, CHUNK):
        yield start, min(start + CHUNK, total)


@dataclass(frozen=True)
class Threshold:
    """Kept: values below `level` (above it, with `largest`), and those equal to it up to index `place`."""

    level: float
    place: int
    largest: bool

    def keep(self, values: Tensor, start: int) -> Tensor:
        """Which of the values at indices start, start + 1, ... are kept. (n,) -> (n,) bool."""
        sure = values > self.level if self.largest else values < self.level
        tied = values == self.level
        tied[max(0, self.place + 1 - start) :] = False
        return sure | tied


def threshold(values: Values, total: int, count: int, largest: bool) -> Threshold:
    """The threshold that keeps exactly `count` of `total` (0 < count < total). `values(start, stop)` gives them, >= 0."""
    sizes = np.zeros(_BUCKETS, np.int64)
    for start, stop in pieces(total):
        sizes += np.bincount(_bucket(values(start, stop)), minlength=_BUCKETS)
    order = np.arange(_BUCKETS)[:: -1 if largest else 1]
    filled = np.cumsum(sizes[order])
    at = int(np.searchsorted(filled, count))  # the first bucket that brings the count up to `count`
    missing, border = count - int(filled[at] - sizes[order[at]]), int(order[at])
    level, index = _members(values, total, border)
    kept = select(level if largest else -level, Unstructured(), missing).keep
    last = level[kept].min() if largest else level[kept].max()
    return Threshold(float(last), int(index[kept & (level == last)].max()), largest)


def _members(values: Values, total: int, bucket: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of one bucket's entries, in order."""
    found, index = [], []
    for start, stop in pieces(total):
        piece = values(start, stop)
        inside = torch.from_numpy((_bucket(piece) == bucket).nonzero()[0])
        found.append(piece[inside])
        index.append(inside + start)
    return torch.cat(found), torch.cat(index)


def _bucket(values: Tensor) -> np.ndarray:
    # Rounding a float64 to float32 keeps the order of what lies in different buckets, which is all that is used.
    return values.float().numpy().view(np.int32) >> 16
