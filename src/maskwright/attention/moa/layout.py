"""Where MoA's bands and sinks lie: whole prompts in blocks, single rows and stored caches in tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.attention import AttentionSite, Padding, Pieces, Rows

_ALL = 1 << 24  # blocks: a band without an end


def bands(alpha: Tensor, beta: Tensor, length: Tensor, block: int) -> Tensor:
    """`rules.band` for alpha, beta (kv_heads,) and length (batch,). -> (batch, kv_heads) int64; one that covers the
    prompt has no end."""
    every = -(-length // block)[:, None]
    wide = ((alpha / block).floor() + beta * every).trunc().clamp(min=1).long()
    return wide.masked_fill(wide >= every, _ALL)


def prompt(band: Tensor, block: int, sink: int, keys: int) -> Pieces:
    """A whole prompt without padding: query blocks as long as key blocks. band (kv_heads,)."""
    own = torch.arange(-(-keys // block))
    start = (own - band[:, None] + 1).clamp(min=0)  # (kv_heads, groups): the band's first block
    low = torch.stack([torch.zeros_like(start), start], -1) * block
    # The sink ends where the band starts: a key is listed once.
    high = torch.stack([start.clamp(max=sink), own.expand_as(start) + 1], -1) * block
    real = low < high
    counts = real.sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shape = (1, len(band), len(own))
    return Pieces(offsets, low[real].int(), high[real].clamp(max=keys).int(), shape, block, keys, keys)


def rows(site: AttentionSite, band: Tensor, block: int, sink: int) -> Rows:
    """Row by row: of a padded prompt in blocks from each sample's first key, else in tokens. band (batch | 1, kv_heads)."""
    first = torch.zeros(1, 1, dtype=torch.int64) if site.first is None else site.first[:, None]
    if site.evicted and site.structure is not None:  # an eviction's keys are filled up on the left, head by head
        first = next(part.first for part in site.structure.parts() if isinstance(part, Padding))  # (batch, heads)
    at = torch.arange(site.queries) + site.offset - first[..., None]  # (batch | 1, heads | 1, queries)
    wide = band.repeat_interleave(site.group, 1)[..., None]
    start = (at.div(block, rounding_mode="floor") - wide + 1) * block if site.begins else at - wide * block + 1
    at, start, first = torch.broadcast_tensors(at, start, first[..., None])
    runs = [first, first + sink * block, first + start.clamp(min=0), first + at + 1]
    return Rows(torch.stack(runs, -1).unflatten(-1, (2, 2)), site.offset)


def stored(site: AttentionSite, band: Tensor, block: int, sink: int) -> Tensor:
    """After the prompt: the first sink blocks and the last band x block keys. (batch, kv_heads, keys) bool."""
    first = torch.zeros(1, dtype=torch.int64) if site.first is None else site.first
    at = torch.arange(site.keys) - first[:, None, None]  # (batch | 1, 1, keys)
    keep = (at >= 0) & ((at < sink * block) | (at > at[..., -1:] - band[..., None] * block))
    return keep.expand(site.batch, site.kv_heads, -1)
