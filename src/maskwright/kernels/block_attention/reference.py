"""The oracle: dense masked attention, every score of the (queries x keys) table. For tests and short sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.kernels.block_attention.pieces import Pieces


def allowed(
    queries: int, keys: int, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None, heads: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The mask as booleans. (B', H', queries, keys), B' and H' 1 where nothing differs over them."""
    keep = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if bounds is not None:
        at = torch.arange(keys, device=device) if positions is None else positions
        inside = (bounds[..., 0, None] <= at) & (at < bounds[..., 1, None])  # (B', H', queries, 2, keys)
        keep = keep & inside.any(-2)
    if pieces is not None:
        lists = pieces.keep().repeat_interleave(pieces.rows, 2)[:, :, :queries]
        spread = heads // lists.shape[1] if keep.shape[1] > 1 and lists.shape[1] not in (1, keep.shape[1]) else 1
        keep = keep & lists.repeat_interleave(spread, 1)
    return keep


def block_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None,
    bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as `block_attention` promises them, in float32 or float64 inside."""
    heads, wide = q.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    keep = allowed(q.shape[2], k.shape[2], bounds, pieces, positions, heads, q.device)
    if keep.shape[1] > 1:
        keep = keep.repeat_interleave(heads // keep.shape[1], 1)
    k, v = (t.to(wide).repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = (q.to(wide) @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~keep, float("-inf"))
    # A row without keys: its sum is taken over zeros, so that no NaN enters the gradient, and then taken back.
    empty = (scores == float("-inf")).all(-1)
    total = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    weights = torch.exp(scores - total[..., None])
    return (weights @ v).to(q.dtype), total.masked_fill(empty, float("-inf"))
