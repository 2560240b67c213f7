"""The same masks through torch's FlexAttention: the path for a GPU, and a peer on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from maskwright.core.errors import BadInput
from maskwright.kernels.block_attention.lower import lower, touched_blocks
from maskwright.kernels.block_attention.pieces import Pieces

_BLOCK = 128
ModFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_attention_flex(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None,
    bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) by FlexAttention: compiled on a GPU; on the CPU as torch runs it uncompiled, forward only.

    Raises BadInput where a gradient is asked for on the CPU, which torch cannot give.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise BadInput("impl 'flex' has no backward on the CPU: use 'gather' or 'cpu'")
    mask = block_mask(q, k.shape[2], bounds, pieces, positions)
    added = None if bias is None else _bias(bias)
    run: Any = torch.compile(flex_attention) if q.device.type != "cpu" else flex_attention
    with warnings.catch_warnings():
        # Compiled on the CPU it would not compile a second length, and fall back unasked past a few of them.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out, aux = run(
            q, k, v, score_mod=added, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
    lse = aux.lse
    seen = torch.isfinite(lse)
    return out.masked_fill(~seen[..., None], 0.0), lse


def block_mask(
    q: Tensor, keys: int, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None = None, block: int = _BLOCK
) -> BlockMask:
    """The mask as FlexAttention's BlockMask over blocks of `block` x `block`, built from the lists, not from all pairs."""
    batch, heads, queries, _ = q.shape
    lists = lower(queries, keys, bounds if positions is None else None, pieces, q.device)
    touched = touched_blocks(lists, block)  # (B', H', rows, key blocks)
    touched = touched.repeat_interleave(heads // touched.shape[1], 1).expand(batch, -1, -1, -1)
    counts = touched.sum(-1, dtype=torch.int32)
    order = torch.sort(touched.int(), dim=-1, descending=True, stable=True).indices.int()
    mod = _member(bounds, pieces, positions, heads)
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=block, mask_mod=mod, seq_lengths=(queries, keys))


def _member(bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None, heads: int) -> ModFn:
    table = None if pieces is None else pieces.keep()
    rows = 1 if pieces is None else pieces.rows

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = (i >= 0) & (j >= 0)
        if table is not None:
            keep = keep & table[b * (table.shape[0] > 1), h * table.shape[1] // heads, i // rows, j]
        if bounds is not None:
            at = j if positions is None else positions[j]
            mine = bounds[b * (bounds.shape[0] > 1), h * bounds.shape[1] // heads, i]
            first = (mine[..., 0, 0] <= at) & (at < mine[..., 0, 1])
            keep = keep & (first | ((mine[..., 1, 0] <= at) & (at < mine[..., 1, 1])))
        return keep

    return mod


def _bias(bias: Tensor) -> Callable[..., Tensor]:
    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = [x * (size > 1) for x, size in zip((b, h, i, j), bias.shape, strict=True)]
        return score + bias[at[0], at[1], at[2], at[3]]

    return mod
