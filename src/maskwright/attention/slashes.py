"""Vertical-slash lists: single columns and tiles along diagonals, chosen by score and turned into runs of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.attention.scores import best, force, real_span
from maskwright.attention.site import AttentionSite
from maskwright.kernels.block_attention import Pieces

TILE = 64  # query rows a group, and keys a tile; distances below it are always kept
SINKS = 4  # first keys that are always kept


def chosen_slashes(
    who: str, site: AttentionSite, column: Tensor, slash: Tensor, columns: Tensor, distances: Tensor
) -> Pieces:
    """What a whole prompt reads: the best `columns` keys and `distances` distances row - key of each head, as runs.

    column, slash (batch, heads, keys): the scores of `column_sum` and `slash_sum`; columns, distances: counts, against
    (batch, heads). The first SINKS real keys and the distances below TILE always stay, padding never does.
    Raises BadInput, naming `who` and the layer, where a score is NaN.
    """
    first, last = (x[:, None, None] for x in real_span(site))
    at = torch.arange(site.keys)
    column = force(column, at < first + SINKS, (at < first) | (at >= last))
    slash = force(slash, at < TILE, at >= last - first)
    return slash_pieces(best(who, site, column, columns), best(who, site, slash, distances))


def slash_pieces(columns: Tensor, distances: Tensor) -> Pieces:
    """The keys that vertical-slash reads for a whole prompt: single columns, and tiles along kept distances.

    columns, distances (batch, heads, keys) bool: kept keys, and kept distances row - key (0 must be kept).
    MInference's rule: of the rows [a, a + 64) each kept distance o < a + 64 asks for the tile that ends at
    max(a + 64 - o, 64); from the far ones to the near, a tile that begins inside what is covered or at its end but ends
    beyond it lengthens it by one whole tile, and one that ends inside adds nothing. Columns outside are read one by one.
    The work is O(rows / 64 x (tiles + columns)) a head, in as many steps as a row group can have tiles.
    """
    batch, heads, keys = columns.shape
    begin = torch.arange(-(-keys // TILE)) * TILE
    tiles = _tiles(distances.flatten(0, 1), begin)  # (lists, groups, most) first keys, far to near
    found = [
        _lists(column.nonzero()[:, 0], mine, begin, keys) for column, mine in zip(columns.flatten(0, 1), tiles, strict=True)
    ]
    counts, starts, stops = (torch.cat(part) for part in zip(*found, strict=True))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Pieces(offsets, starts, stops, (batch, heads, len(begin)), TILE, keys, keys)


def _lists(column: Tensor, tiles: Tensor, begin: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """One head's runs: how many each group of rows has, their starts and their stops. column (n,) ascending."""
    limit = (begin + TILE).clamp(max=keys)[:, None]
    ends = torch.minimum(tiles + TILE, limit)
    real = tiles < limit  # what is not a tile stands at `keys`
    wide = column.expand(len(begin), -1).contiguous()  # (groups, n): those beyond the rows, or in a tile, fall out
    before = torch.searchsorted(tiles, wide, right=True)  # tiles that begin at the column or in front of it
    inside = torch.nn.functional.pad(ends, (1, 0)).gather(1, before) > column
    alone = ~inside & (column < limit)
    # Where each run stands in its list: behind the tiles and the columns in front of it.
    spot = alone.cumsum(1) - 1 + before
    ahead = torch.zeros(len(begin), tiles.shape[1] + 1, dtype=torch.int64).scatter_add_(1, before, alone.long())
    place = ahead.cumsum(1)[:, :-1] + torch.arange(tiles.shape[1])
    counts = alone.sum(1) + real.sum(1)
    base = (counts.cumsum(0) - counts)[:, None]
    starts, stops = torch.empty(2, int(counts.sum()), dtype=torch.int32)
    where, single = (place + base)[real], wide[alone].int()
    starts[where], stops[where] = tiles[real].int(), ends[real].int()
    where = (spot + base)[alone]
    starts[where], stops[where] = single, single + 1
    # Runs that meet become one.
    opens = torch.ones(len(starts), dtype=torch.bool)
    opens[1:] = starts[1:] != stops[:-1]
    opens[base[counts > 0]] = True
    closes = torch.cat([opens[1:], opens.new_ones(1)])
    owner = torch.repeat_interleave(torch.arange(len(begin)), counts)
    return torch.bincount(owner[opens], minlength=len(begin)), starts[opens], stops[closes]


def _tiles(distances: Tensor, begin: Tensor) -> Tensor:
    """First keys of the tiles of each list and group of rows, ascending. (lists, groups, most), `keys` where there is none.

    In distances, e = rows' end - covered end, the rule is the same for all rows: the next tile ends at the nearest kept
    distance o < e when that lies more than a tile away, else at e - 64. So one table of successors serves all groups,
    and all chains are followed together.
    """
    lists, keys = distances.shape
    kept = torch.where(distances, torch.arange(keys), -1).cummax(1).values
    below = torch.nn.functional.pad(kept, (1, 0), value=-1)  # (lists, keys + 1): the greatest kept o < e
    at = torch.arange(keys + 1)
    follow = torch.where(at - below > TILE, below, at - TILE)
    # Shifted by a tile, for an end may lie up to 63 keys behind the rows; 0 is the end of a chain.
    table = torch.nn.functional.pad(torch.where(below < 0, -TILE, follow) + TILE, (TILE, 0))
    near, far = begin.expand(lists, -1), (begin + TILE).clamp(max=keys).expand(lists, -1)
    chain = [torch.where(below.gather(1, far) >= near, near, below.gather(1, near)) + TILE]
    while bool(chain[-1].any()):
        chain.append(table.gather(1, chain[-1]))
    ends = torch.stack(chain, -1)  # (lists, groups, steps)
    return torch.where(ends > 0, begin[:, None] - ends + TILE, keys).clamp(max=keys)
