"""FlexPrefill's counting, and its second pattern: blocks of pooled attention in the heads that pooling foretells."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.attention import AttentionSite, Pieces
from maskwright.attention.scores import best, block_means, force, real_span
from maskwright.attention.slashes import TILE


def covering(share: Tensor, alpha: float) -> Tensor:
    """How many of the greatest shares it takes to pass alpha: those whose running sum is <= alpha, and one more. (..., n)"""
    return (share.sort(-1, descending=True).values.double().cumsum(-1) <= alpha).sum(-1) + 1


def divergence(one: Tensor, two: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions over the last dim, in nats."""
    entropy = torch.special.entr
    mean = (one + two) / 2
    return (entropy(mean).sum(-1) - (entropy(one).sum(-1) + entropy(two).sum(-1)) / 2).clamp(min=0)


def query_aware(site: AttentionSite, column: Tensor, pieces: Pieces, alpha: float, tau: float, window: int) -> Pieces:
    """The same lists, with blocks in the heads where pooled attention is within tau of the true one.

    column (batch, heads, keys): mean weights of the last `window` queries (arXiv 2502.20766, section 3.2). Blocks of
    64 x 64; those that cover alpha of the pooled attention stay, over all rows of a head at once; each row's own block
    and the first one always stay.
    """
    first, last = real_span(site)
    q, k = block_means(site.q, TILE, first, last), block_means(site.k, TILE, first, last)
    k = k.repeat_interleave(site.group, 1).mT  # (batch, heads, width, n)
    row, begin = torch.arange(q.shape[2])[:, None], (first // TILE)[:, None, None, None]
    col = row.T
    empty = (col < begin) | (col > (last[:, None, None, None] - 1) // TILE)  # blocks of padding
    ends = zip(site.q.float(), (last - window).clamp(min=0).maximum(first), last, strict=True)
    final = torch.stack([x[:, i:j].mean(1, keepdim=True) for x, i, j in ends])  # (batch, heads, 1, width)
    guess = ((final @ k) * site.scale).masked_fill(empty, float("-inf")).softmax(-1)[:, :, 0]
    true = torch.nn.functional.pad(column, (0, -site.keys % TILE)).unflatten(2, (-1, TILE)).sum(3)
    aware = divergence(guess, true).sqrt() < tau  # (batch, heads)
    if not bool(aware.any()):
        return pieces
    hidden = empty | (col > row)
    weight = ((q @ k) * site.scale).masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    weight = weight / weight.sum((-1, -2), keepdim=True)  # (batch, heads, n, n)
    must = ((row == col) | (col == begin)) & ~hidden  # (batch, 1, n, n)
    many = covering(weight.flatten(2), alpha).maximum(must.sum((-1, -2))).minimum((~hidden).sum((-1, -2)))
    keep = best("flexprefill", site, force(weight, must, hidden).flatten(2), many).view_as(weight)
    return _choose(aware, Pieces.from_blocks(keep, TILE, TILE, site.queries, site.keys), pieces)


def _choose(which: Tensor, one: Pieces, two: Pieces) -> Pieces:
    """The lists of `one` where `which` (batch, heads), else those of `two`."""
    wide = which[..., None].expand(one.shape).flatten()
    counts = torch.where(wide, one.offsets.diff(), two.offsets.diff())
    begin = torch.where(wide, one.offsets[:-1], two.offsets[:-1] + len(one.starts))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    source = torch.repeat_interleave(begin - offsets[:-1], counts) + torch.arange(int(offsets[-1]))
    starts, stops = torch.cat([one.starts, two.starts])[source], torch.cat([one.stops, two.stops])[source]
    return Pieces(offsets, starts, stops, one.shape, one.rows, one.queries, one.keys)
