"""The operators in plain torch: what runs where no native kernel can, and what tests hold the kernels against.

Shapes depend on no data, so they trace; sums are float32, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1 << 22  # entries of the dense weight made at a time


def packed_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, scale: Tensor | None, bias: Tensor | None,
    step: int, dense_from: int, impl: str = "",
) -> Tensor:  # fmt: skip
    """x (..., cols) times the transposed packed weight, plus bias: (..., rows) in the dtype of x."""
    cols, at = x.shape[-1], torch.arange(8, dtype=torch.uint8)
    parts = []
    for first, last in _runs(bitmask.shape[0], cols):
        bits = bitmask[first:last, :, None].bitwise_right_shift(at).bitwise_and(1).flatten(1)[:, :cols].bool()
        place = bits.long().cumsum(1).add_(row_offsets[first:last, None] - 1).clamp_(0, max(0, len(values) - 1))
        found = values.float()[place] if len(values) else torch.zeros(place.shape)
        parts.append(_product(x, torch.where(bits, found, 0.0), scale, first, last))
    return _joined(parts, x, bias)


def indexed_linear(
    x: Tensor, values: Tensor, offsets: Tensor, bases: Tensor, row_groups: Tensor, scale: Tensor | None,
    bias: Tensor | None, dense_from: int, impl: str = "",
) -> Tensor:  # fmt: skip
    """The same from the index layout."""
    cols = x.shape[-1]
    column = bases.long().repeat_interleave(8) + offsets.long()
    parts = []
    for first, last in _runs(len(row_groups) - 1, cols):
        start, end = int(row_groups[first]), int(row_groups[last])
        row = torch.repeat_interleave(torch.arange(last - first), torch.diff(row_groups[first : last + 1]) * 8)
        run = slice(start * 8, end * 8)
        dense = torch.zeros(last - first, cols).index_put_((row, column[run]), values[run].float(), accumulate=True)
        parts.append(_product(x, dense, scale, first, last))
    return _joined(parts, x, bias)


def dense_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, impl: str = "") -> Tensor:
    """The same from a dense weight (rows, cols) of any value dtype."""
    return _joined([_product(x, weight.float(), scale, 0, weight.shape[0])], x, bias)


def _runs(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, cols))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, first: int, last: int) -> Tensor:
    y = F.linear(x.float(), weight)
    return y if scale is None else y * scale[first:last]


def _joined(parts: list[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.cat(parts, -1) if parts else x.new_zeros(*x.shape[:-1], 0, dtype=torch.float32)
    return (y if bias is None else y + bias).to(x.dtype)
