"""The best keys so far, row after row: exact, in memory of O(rows x window) beside the lists themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.attention import Pieces

_ROWS = 64  # rows settled at a time


def best_first(rank: Tensor) -> Tensor:
    """(..., n) numbers of the keys from the greatest rank down; of equal ranks the most recent first."""
    return rank.shape[-1] - 1 - rank.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def running_top(rank: Tensor, window: int, queries: int, smooth: int = 0) -> Pieces:
    """For each of the last `queries` keys as a row: the `window` best among the keys up to it.

    rank (batch, heads, keys), no NaN. A key that a row leaves out is never read by a later one, so only the kept keys
    and the new ones are looked at. smooth b > 0: blocks of b keys are read whole or not at all (`smoothed`).
    -> lists of (batch, heads, queries), one row each.
    """
    batch, heads, keys = rank.shape
    flat, offset, parts = rank.flatten(0, 1), keys - queries, []
    best = best_first(flat[:, :offset])[:, :window].sort(1).values
    for first in range(offset, keys, _ROWS):
        rows = torch.arange(first, min(first + _ROWS, keys))
        seen = torch.cat([best, rows.expand(len(flat), -1)], 1)  # (lists, candidates), ascending
        order = best_first(flat.gather(1, seen))
        ranked = seen.gather(1, order)[:, None] <= rows[:, None]  # (lists, rows, candidates), the best candidate first
        ranked &= ranked.cumsum(2, dtype=torch.int32) <= window
        keep = torch.zeros_like(ranked).scatter_(2, order[:, None].expand_as(ranked), ranked)
        best = seen[keep[:, -1]].view(len(flat), -1)
        if smooth:
            keep = torch.zeros(*keep.shape[:2], keys, dtype=torch.bool).scatter_(2, seen[:, None].expand_as(keep), keep)
            keep, seen = smoothed(keep, rows, smooth), torch.arange(keys).expand(len(flat), -1)
        parts.append(_runs(keep, seen))
    return _side_by_side(parts, (batch, heads, queries), keys)


def smoothed(keep: Tensor, rows: Tensor, block: int) -> Tensor:
    """Blocks of keys whole where more than half of them are kept, else not at all; a row left without reads itself.

    keep (..., rows, keys) bool, `rows` the key each row stands at. A row's last block counts up to the row.
    """
    keys = keep.shape[-1]
    part = torch.nn.functional.pad(keep, (0, -keys % block)).unflatten(-1, (-1, block)).sum(-1)
    size = (rows[:, None] + 1 - torch.arange(0, keys, block)).clamp(0, block)
    whole = (2 * part > size).repeat_interleave(block, -1)[..., :keys]
    whole = whole & (torch.arange(keys) <= rows[:, None])
    own = torch.arange(keys) == rows[:, None]
    return whole | (own & ~whole.any(-1, keepdim=True))


Runs = tuple[Tensor, Tensor, Tensor]  # how many (lists, rows), starts and stops (runs,), list after list, row after row


def _runs(keep: Tensor, seen: Tensor) -> Runs:
    """keep (lists, rows, candidates) bool of the ascending keys `seen` (lists, candidates), as runs of neighbours."""
    joined = keep[..., 1:] & keep[..., :-1] & (seen[:, 1:] == seen[:, :-1] + 1)[:, None]
    opens, closes = keep.clone(), keep.clone()
    opens[..., 1:] &= ~joined
    closes[..., :-1] &= ~joined
    numbers = seen.int()[:, None].expand_as(keep)
    return opens.sum(2), numbers[opens], numbers[closes] + 1


def _side_by_side(parts: list[Runs], shape: tuple[int, int, int], keys: int) -> Pieces:
    """Runs of the same lists over following rows as one list a row over all these rows."""
    counts = torch.cat([many for many, _, _ in parts], 1)
    offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    starts, stops = (torch.empty(int(offsets[-1]), dtype=torch.int32) for _ in range(2))
    begins, row = offsets[:-1].view_as(counts), 0
    for many, low, high in parts:
        flat = many.flatten()
        shift = begins[:, row : row + many.shape[1]].flatten() - (flat.cumsum(0) - flat)
        to = torch.repeat_interleave(shift, flat) + torch.arange(len(low))
        starts[to], stops[to], row = low, high, row + many.shape[1]
    return Pieces(offsets, starts, stops, shape, 1, shape[2], keys)
