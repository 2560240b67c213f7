"""One call for every layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.indexed import Indexed
from maskwright.kernels.packed_linear.layout import Packed
from maskwright.kernels.packed_linear.ops import engine

MOST = 16  # rows of x the small-batch kernels take at once
NEVER = 1 << 62  # `dense_from` of a layer whose packed kernel serves every batch


def linear(
    x: Tensor, weight: Packed | Indexed | Tensor, bias: Tensor | None = None, *,
    scale: Tensor | None = None, dense_from: int = NEVER, impl: str = "",
) -> Tensor:  # fmt: skip
    """x (..., cols) times the transposed weight (rows, cols), plus bias: (..., rows), in the dtype of x.

    weight: packed, indexed, or dense (then `scale` belongs to int8 rows). From `dense_from` rows of x on, the
    weight is expanded in blocks and multiplied by torch. impl: `avx2`, `avx512`, `avx512_bf16`; "" takes the best.

    Raises BadInput when x does not fit, RuntimeError when the machine lacks `impl`.
    """
    engine()
    shape = tuple(weight.shape)
    if x.shape[-1:] != shape[1:]:
        raise BadInput(f"x of shape {tuple(x.shape)} does not fit a weight of shape {shape}")
    if isinstance(weight, Packed):
        held = (weight.values, weight.bitmask, weight.row_offsets, weight.scale)
        return torch.ops.maskwright.packed_linear(x, *held, bias, steady(weight), dense_from, impl)
    if isinstance(weight, Indexed):
        parts = (weight.values, weight.offsets, weight.bases, weight.row_groups, weight.scale)
        return torch.ops.maskwright.indexed_linear(x, *parts, bias, dense_from, impl)
    return torch.ops.maskwright.dense_linear(x, weight, scale, bias, impl)


def steady(weight: Packed) -> int:
    """Kept entries in every byte of the bitmask when all hold the same number (2:4 holds 4), else 0.

    Such a weight needs no counting: N:M masks whose M divides 8.
    """
    if not weight.bitmask.numel() or weight.cols % 8 or weight.kept * 8 % (weight.rows * weight.cols):
        return 0
    step = weight.kept * 8 // (weight.rows * weight.cols)
    return step if bool((np.bitwise_count(weight.bitmask.numpy()) == step).all()) else 0
