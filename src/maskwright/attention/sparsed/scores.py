"""Mean attention of query blocks on key blocks, one query block at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_scores(
    q: Tensor, k: Tensor, block: int, scale: float, bounds: Tensor | None = None, *, first: int = 0, whole: bool = False
) -> Tensor:
    """Mean attention of every query block on every key block from block `first` on. -> (batch, heads, n, n - first).

    q (batch, heads, length, width), k (batch, kv_heads, length, width); the softmax runs over the keys from `first`
    on that `bounds` allows. whole: a ragged block counts as a full one. Never more than (block, length) scores a head.
    """
    at = torch.arange(first * block, k.shape[2], device=k.device)
    keys = k[:, :, None, first * block :].float().mT  # (batch, kv_heads, 1, width, keys)
    size = torch.full((-(-len(at) // block),), block, device=k.device)
    size[-1] -= 0 if whole else -len(at) % block
    found = []
    for start in range(0, q.shape[2], block):
        rows = q[:, :, start : start + block].float()
        logits = (rows.unflatten(1, (k.shape[1], -1)) @ keys * scale).flatten(1, 2)  # (batch, heads, rows, keys)
        if bounds is None:
            share = logits.softmax(-1)
        else:
            row = bounds[:, :, start : start + block, :, :, None]
            seen = ((row[..., 0, :] <= at) & (at < row[..., 1, :])).any(-2)
            share = logits.masked_fill(~seen, -torch.inf).softmax(-1).where(seen.any(-1, keepdim=True), 0.0)
        total = F.pad(share.sum(2), (0, -len(at) % block)).unflatten(-1, (-1, block)).sum(-1)
        found.append(total / (size * (block if whole else rows.shape[2])))
    return torch.stack(found, 2)
