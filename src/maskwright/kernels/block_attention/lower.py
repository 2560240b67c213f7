"""From bounds and pieces to the keys that each group of rows must read: no key outside any of its rows' bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.kernels.block_attention.pieces import Pieces

ROWS = 64  # query rows a group where only bounds say what is read


def lower(queries: int, keys: int, bounds: Tensor | None, pieces: Pieces | None, device: torch.device) -> Pieces:
    """Lists to read: the pieces, cut to the hull of the bounds of each group's rows. Work in O(queries + runs)."""
    if bounds is None:
        return everything(queries, keys, max(queries, 1), device) if pieces is None else pieces
    rows = ROWS if pieces is None else pieces.rows
    if pieces is not None and rows > ROWS and rows % ROWS == 0:
        pieces, rows = pieces.split(ROWS), ROWS
    hulls = hull(bounds, rows, queries, keys)
    return hulls if pieces is None else hulls.intersect(pieces)


def everything(queries: int, keys: int, rows: int, device: torch.device) -> Pieces:
    """Every row reads every key."""
    groups = -(-queries // rows)
    offsets = torch.arange(groups + 1, device=device) * (keys > 0)
    starts = torch.zeros(groups if keys else 0, dtype=torch.int32, device=device)
    return Pieces(offsets, starts, starts + keys, (1, 1, groups), rows, queries, keys)


def hull(bounds: Tensor, rows: int, queries: int, keys: int) -> Pieces:
    """Per group the hull of its rows' first intervals and that of their second ones, joined where they meet."""
    groups = -(-queries // rows)
    low, high = bounds[..., 0].clamp(0, keys), bounds[..., 1].clamp(0, keys)  # (B', H', queries, 2)
    none = low >= high
    low, high = low.masked_fill(none, keys), high.masked_fill(none, 0)
    short = groups * rows - queries
    if short:
        low = torch.nn.functional.pad(low, (0, 0, 0, short), value=keys)
        high = torch.nn.functional.pad(high, (0, 0, 0, short), value=0)
    low = low.unflatten(2, (groups, rows)).amin(3)
    high = high.unflatten(2, (groups, rows)).amax(3)
    # (B', H', groups, 2): the two hulls of a group in ascending order, the second one starting where the first ends
    first = low[..., 0] <= low[..., 1]
    one_low, two_low = torch.where(first, low[..., 0], low[..., 1]), torch.where(first, low[..., 1], low[..., 0])
    one_high, two_high = torch.where(first, high[..., 0], high[..., 1]), torch.where(first, high[..., 1], high[..., 0])
    meet = (two_low <= one_high) & (two_high > two_low)
    one_high = torch.where(meet, torch.maximum(one_high, two_high), one_high)
    two_high = torch.where(meet, two_low, two_high)
    starts, stops = torch.stack([one_low, two_low], -1), torch.stack([one_high, two_high], -1)
    real = starts < stops
    counts = real.sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shape = (bounds.shape[0], bounds.shape[1], groups)
    return Pieces(offsets, starts[real].int(), stops[real].int(), shape, rows, queries, keys)


def touched_blocks(lists: Pieces, block: int) -> Tensor:
    """Which `block` x `block` tiles any list reaches into. (B', H', query blocks, key blocks) bool; O(runs + tiles)."""
    tiles, rows = -(-lists.keys // block), -(-lists.queries // block)
    owner = lists.owner()
    edge = torch.zeros(lists.lists, tiles + 1, dtype=torch.int32, device=owner.device)
    one = torch.ones_like(lists.starts)
    edge.index_put_((owner, lists.starts.long() // block), one, accumulate=True)
    edge.index_put_((owner, (lists.stops.long() - 1) // block + 1), -one, accumulate=True)
    seen = (edge[:, :-1].cumsum(1) > 0).view(*lists.shape, tiles)
    # a row group may span several query blocks or be a part of one
    first = torch.arange(lists.shape[2], device=owner.device) * lists.rows
    out = torch.zeros(lists.shape[0], lists.shape[1], rows, tiles, dtype=torch.bool, device=owner.device)
    last = (first + lists.rows).clamp(max=lists.queries) - 1
    for step in range(int((last // block - first // block).max()) + 1 if len(first) else 0):
        where = first // block + step
        inside = where <= last // block
        index = where[inside].expand(lists.shape[0], lists.shape[1], -1)[..., None].expand(-1, -1, -1, tiles)
        out |= (
            torch.zeros_like(out, dtype=torch.int8)
            .scatter_reduce_(2, index, seen[:, :, inside].to(torch.int8), "amax")
            .bool()
        )
    return out
