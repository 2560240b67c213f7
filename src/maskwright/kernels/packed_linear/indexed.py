"""The index layout for low densities: a byte a kept value, in groups of eight around a base column. Made in memory
from the packed layout, never stored: at density 0.1 both take the same bytes, and this one needs no bit work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.layout import Packed, blocks, unpack_bits

GROUP = 8
_SPAN = 256  # columns a byte reaches


@dataclass(frozen=True, eq=False)
class Indexed:
    """A sparse weight as groups of eight kept values: column = base of the group + offset of the value.

    shape: (rows, cols). values: (groups * 8,), a row's last group padded with zeros. offsets: (groups * 8,) uint8.
    bases: (groups,) int32. row_groups: (rows + 1,) int64, where each row's groups begin. scale: as in Packed.
    """

    shape: tuple[int, ...]
    values: Tensor
    offsets: Tensor
    bases: Tensor
    row_groups: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.values, self.offsets, self.bases, self.row_groups, *([] if self.scale is None else [self.scale]))
        return sum(t.numel() * t.element_size() for t in held)


def index(packed: Packed) -> Indexed:
    """The same weight in the index layout; groups end early where a byte would not reach."""
    rows, counts = packed.rows, packed.counts.numpy()
    column = _columns(packed)
    row = np.repeat(np.arange(rows), counts)
    starts = _starts(row, column, packed.row_offsets.numpy(), counts)
    sizes = np.diff(starts, append=len(column))
    group = np.repeat(np.arange(len(starts)), sizes)
    slot = group * GROUP + np.arange(len(column)) - starts[group]
    values = torch.zeros(len(starts) * GROUP, dtype=packed.values.dtype)
    offsets = np.zeros(len(starts) * GROUP, np.uint8)
    bases = column[starts]
    values[torch.from_numpy(slot)] = packed.values
    offsets[slot] = column - bases[group]
    row_groups = np.searchsorted(row[starts], np.arange(rows + 1))
    return Indexed(
        packed.shape, values, torch.from_numpy(offsets), torch.from_numpy(bases.astype(np.int32)),
        torch.from_numpy(row_groups.astype(np.int64)), packed.scale,
    )  # fmt: skip


def check_indexed(weight: Indexed) -> Indexed:
    """Return `weight` if its groups lie in order and inside the weight, else raise BadInput."""
    rows, cols = weight.shape
    groups, starts = len(weight.bases), weight.row_groups
    kinds = (weight.offsets.dtype, weight.bases.dtype, starts.dtype) == (torch.uint8, torch.int32, torch.int64)
    sizes = (weight.offsets.numel(), weight.values.numel(), len(starts)) == (groups * GROUP, groups * GROUP, rows + 1)
    if not kinds or not sizes or starts[0] != 0 or starts[-1] != groups or (torch.diff(starts) < 0).any():
        raise BadInput(f"the index of a weight of shape {tuple(weight.shape)} does not fit its {groups} groups")
    column = weight.bases[:, None].long() + weight.offsets.view(-1, GROUP)
    if groups and (weight.bases.min() < 0 or column.max() >= cols):
        raise BadInput(f"a column of the index lies outside the shape {tuple(weight.shape)}")
    if (weight.values.dtype == torch.int8) != (weight.scale is not None) or not torch.isfinite(weight.values).all():
        raise BadInput("a value is inf or NaN, or int8 values have no scale")
    return weight


def _columns(packed: Packed) -> np.ndarray:
    found = [np.nonzero(unpack_bits(packed.bitmask[run], packed.cols))[1] for run in blocks(packed.rows, packed.cols)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _starts(row: np.ndarray, column: np.ndarray, row_starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where groups begin: at a row's first kept value, after eight, or where the next column is out of reach."""
    if not len(column):
        return np.zeros(0, np.int64)
    place = np.arange(len(column)) - np.repeat(row_starts, counts)
    plain = np.flatnonzero(place % GROUP == 0)
    ends = np.append(plain[1:], len(column)) - 1
    if (column[ends] - column[plain] < _SPAN).all():
        return plain
    # One group of every row at a time: `key` rises along rows, so the reach of a base is one binary search.
    width = int(column.max()) + 2 * _SPAN
    key = row * width + column
    at, end = row_starts[counts > 0], (row_starts + counts)[counts > 0]
    found = []
    while len(at):
        found.append(at)
        at = np.minimum(np.minimum(at + GROUP, end), np.searchsorted(key, key[at] + _SPAN))
        at, end = at[at < end], end[at < end]
    return np.sort(np.concatenate(found))
