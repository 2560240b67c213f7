"""The packed layout of a sparse weight: one bit an entry, the kept values row by row, and where each row begins.

The bits are those of compressed-tensors' `sparse-bitmask` for matrices: column c of a row is bit c % 8 of byte
c // 8, spare bits 0. A weight of more dims is a matrix of shape[0] rows here, its other dims flattened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput

VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers that show a float's bit pattern
_BLOCK = 1 << 22  # entries worked on at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """A sparse weight as a bitmask and its kept values, row by row.

    shape: of the dense weight; rows = shape[0], cols = product of the rest. values: (kept,) float32, bfloat16,
    float16 or int8, row-major. bitmask: (rows, ceil(cols / 8)) uint8. row_offsets: (rows,) int64, the index in
    `values` where each row begins. scale: (rows,) float32 with int8 values (weight = value * scale), else None.
    """

    shape: tuple[int, ...]
    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    scale: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return prod(self.shape[1:])

    @property
    def kept(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        """Share kept; 1.0 for a weight without entries."""
        return self.kept / (self.rows * self.cols) if self.rows * self.cols else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.values, self.bitmask, self.row_offsets, *([] if self.scale is None else [self.scale]))
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def counts(self) -> Tensor:
        """Kept entries of each row. (rows,) int64."""
        return torch.diff(self.row_offsets, append=torch.tensor([self.kept]))


def packed_bytes(shape: tuple[int, ...], kept: int, values: torch.dtype) -> int:
    """`Packed.nbytes` of such a weight, without its data."""
    rows, cols = shape[0], prod(shape[1:])
    return kept * values.itemsize + rows * (-(-cols // 8) + 8 + (4 if values == torch.int8 else 0))


def blocks(rows: int, cols: int) -> Iterator[slice]:
    """Runs of rows of a few million entries, so that what is made on the way stays small."""
    step = max(1, _BLOCK // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def bit_patterns(weight: Tensor) -> Tensor:
    """A contiguous float tensor as integers of its own size: 0 only where the entry is +0.0."""
    return weight.view(_WORDS[weight.element_size()])


def pack(weight: Tensor, keep: Tensor | None = None, values: torch.dtype | None = None) -> Packed:
    """Pack a dense float weight of 1 or more dims.

    keep: boolean, of the weight's shape; exactly these entries are stored, zeros too, and a -0.0 outside becomes 0.0.
    Without it everything but +0.0 is stored. values: dtype to store (None: the weight's own, bit for bit); int8 is
    symmetric per row, scale = max |w| / 127, value = w / scale rounded half to even.

    Raises BadInput for other dtypes, inf or NaN, a nonzero weight outside `keep`, and a value that overflows `values`.
    """
    shape = tuple(weight.shape)
    kind = values or weight.dtype
    if not shape or weight.dtype not in (*VALUES[:3], torch.float64):
        raise BadInput(f"only float weights of 1 or more dims can be packed, got {_name(weight.dtype)} of shape {shape}")
    if kind not in VALUES:
        raise BadInput(f"{_name(kind)} values cannot be packed, only {', '.join(map(_name, VALUES))}; shape {shape}")
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != shape):
        raise BadInput(f"the mask is {_name(keep.dtype)} of shape {tuple(keep.shape)}, the weight has shape {shape}")
    rows, cols = shape[0], prod(shape[1:])
    bits, parts, counts, scales = [], [], [], []
    outside = 0
    for run in blocks(rows, cols):
        part = weight[run].detach().cpu().reshape(-1, cols) if cols else weight.new_zeros(run.stop - run.start, 0)
        part = part.contiguous()
        words = bit_patterns(part)
        if keep is None:
            stored = words != 0
        else:
            stored = keep[run].cpu().reshape(part.shape)
            outside += int(((part != 0) & ~stored).sum())
        count = np.count_nonzero(stored.numpy(), axis=1)
        kept = torch.from_numpy(words.numpy()[stored.numpy()]).view(weight.dtype)
        if not torch.isfinite(kept).all():
            raise BadInput(f"the weight of shape {shape} holds inf or NaN")
        bits.append(torch.from_numpy(np.packbits(stored.numpy(), axis=1, bitorder="little")))
        counts.append(torch.from_numpy(count))
        if kind == torch.int8:
            scale, kept = _quantize(part, kept, counts[-1])
            scales.append(scale)
        elif kind != weight.dtype:
            kept = kept.to(kind)
            if not torch.isfinite(kept).all():
                raise BadInput(f"the weight of shape {shape} holds values beyond the range of {_name(kind)}")
        parts.append(kept)
    if outside:
        raise BadInput(f"{outside:,} weights outside the mask are not 0 (shape {shape})")
    each = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)
    return Packed(
        shape,
        torch.cat(parts) if parts else torch.zeros(0, dtype=kind),
        torch.cat(bits) if bits else torch.zeros(0, -(-cols // 8), dtype=torch.uint8),
        each.cumsum(0) - each,
        (torch.cat(scales) if scales else torch.zeros(0)) if kind == torch.int8 else None,
    )


def _quantize(part: Tensor, kept: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (rows,) and int8 values (kept,) of a block. Entries not kept are 0, so a row's maximum is the block's."""
    top = part.abs().amax(1).float() if part.shape[1] else torch.zeros(len(part))
    scale = top / 127
    if not torch.isfinite(scale * 127).all():
        raise BadInput("the weight holds values beyond the range of float32")
    # A row of zeros has scale 0, and so has one whose largest value is too small for float32: its values are 0.
    by = torch.where(scale > 0, scale, torch.inf).repeat_interleave(counts)
    return scale, (kept.float() / by).round().clamp(-127, 127).to(torch.int8)


def unpack(packed: Packed) -> Tensor:
    """The dense weight, in the dtype of the values; int8 gives float32, value times its row's scale."""
    rows, cols = packed.rows, packed.cols
    dtype = torch.float32 if packed.scale is not None else packed.values.dtype
    out = torch.zeros(rows, cols, dtype=dtype)
    counts = packed.counts
    start = 0
    for run in blocks(rows, cols):
        each = counts[run]
        end = start + int(each.sum())
        kept = packed.values[start:end]
        if packed.scale is not None:
            kept = kept.float() * packed.scale[run].repeat_interleave(each)
        stored = torch.from_numpy(unpack_bits(packed.bitmask[run], cols))
        bit_patterns(out[run]).masked_scatter_(stored, bit_patterns(kept.contiguous()))
        start = end
    return out.reshape(packed.shape)


def unpack_bits(bitmask: Tensor, cols: int) -> np.ndarray:
    """(rows, ceil(cols / 8)) uint8 -> (rows, cols) bool."""
    if not cols:
        return np.zeros((len(bitmask), 0), dtype=bool)
    return np.unpackbits(bitmask.numpy(), axis=1, bitorder="little", count=cols).view(bool)


def row_counts(bitmask: Tensor) -> Tensor:
    """Set bits of each row. (rows,) int64."""
    rows, width = bitmask.shape
    out = torch.zeros(rows, dtype=torch.int64)
    for run in blocks(rows, width):
        out[run] = torch.from_numpy(np.bitwise_count(bitmask[run].numpy()).sum(1, dtype=np.int64))
    return out


def check(packed: Packed) -> Packed:
    """Return `packed` if every invariant holds, else raise BadInput with the first that does not."""
    shape, values, bitmask, scale = packed.shape, packed.values, packed.bitmask, packed.scale
    if not shape or not all(type(side) is int and side >= 0 for side in shape):
        raise BadInput(f"{shape} is not the shape of a packed weight")
    if values.dtype not in VALUES or values.ndim != 1:
        raise BadInput(f"values are {_name(values.dtype)} of shape {tuple(values.shape)}, not a row of packable ones")
    if (values.dtype == torch.int8) != (scale is not None):
        raise BadInput("int8 values, and only they, need a scale")
    _expect("bitmask", bitmask, torch.uint8, (packed.rows, -(-packed.cols // 8)))
    _expect("row_offsets", packed.row_offsets, torch.int64, (packed.rows,))
    if scale is not None:
        _expect("scale", scale, torch.float32, (packed.rows,))
        if not (torch.isfinite(scale * 127) & (scale >= 0)).all():
            raise BadInput("a scale is negative, not finite, or gives weights that are not")
    if not all(tensor.is_contiguous() for tensor in (values, bitmask, packed.row_offsets)):
        raise BadInput("a tensor is not contiguous")
    if packed.cols % 8 and (bitmask[:, -1] >> packed.cols % 8).any():
        raise BadInput("spare bits of the bitmask are set")
    counts = row_counts(bitmask)
    if int(counts.sum()) != packed.kept:
        raise BadInput(f"the bitmask keeps {int(counts.sum()):,} entries, there are {packed.kept:,} values")
    if not torch.equal(packed.row_offsets, counts.cumsum(0) - counts):
        raise BadInput("row_offsets are not those of the bitmask")
    for part in values.split(_BLOCK):
        if not torch.isfinite(part).all() if scale is None else (part == -128).any():
            raise BadInput("a value is inf or NaN" if scale is None else "an int8 value is -128")
    return packed


def _expect(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise BadInput(
            f"{what} is {_name(tensor.dtype)} of shape {tuple(tensor.shape)}, expected {_name(dtype)} of shape {shape}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
