"""Block attention by the native kernels: AVX2 or AVX-512, float32, bfloat16 and float64, forward, backward and decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.kernels.block_attention import ops
from maskwright.kernels.block_attention.pieces import Pieces

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_WIDEST = 1024


def available() -> str | None:
    """None when the native kernels run here, else why not. The first call builds them (some 30 s, once)."""
    return ops.load()


def refuses(q: Tensor) -> str | None:
    """None when the native kernels can do this dtype and width, else why not."""
    if q.dtype not in _DTYPES:
        return f"the native kernels do float32, bfloat16 and float64, not {str(q.dtype).removeprefix('torch.')}"
    if not 1 < q.shape[-1] <= _WIDEST:
        return f"the native kernels do heads 2 to {_WIDEST} wide, not {q.shape[-1]}"
    return None


def block_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None,
    bias: Tensor | None, scale: float, impl: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as `block_attention` promises them; gradients flow to q, k, v and bias.

    `impl` names an instruction set, for tests. Results have the same bits for any number of threads, gradients for up to
    eight of them.
    """
    lists: tuple[Tensor | None, Tensor | None, Tensor | None, list[int], int] = (None, None, None, [], 0)
    if pieces is not None:
        lists = (pieces.offsets, pieces.starts, pieces.stops, list(pieces.shape), pieces.rows)
    bounds, positions = (None if t is None else t.contiguous() for t in (bounds, positions))
    told = torch.ops.maskwright.block_attention(q, k, v, bounds, *lists, positions, bias, scale, impl)
    return told[0], told[1]
