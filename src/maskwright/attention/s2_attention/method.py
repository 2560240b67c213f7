"""S2-Attention: every head reads a local window and its own shard of the remote blocks; together they read all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import ClassVar, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, Pieces, State
from maskwright.attention.method import Direction
from maskwright.attention.s2_attention.grid import from_first, warn_of_gaps
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class S2Attention(AttentionMethod):
    """Query block i of key head h reads key block j <= i iff i - j < local or (j + h * step + offset) mod stride = 0.

    arXiv 2407.17678 and its code (dkernel). Blocks hold `block` tokens and stand where they stand: a remote block that
    a row does not read is never read again, so the cache can drop it. `homo`: one rule for all heads. The last
    `dense_heads` key heads and the `dense_layers` (numbers) read everything. step None: max(1, stride // key heads),
    with which as many residues as there are heads occur; a union that still misses blocks is warned of once.
    `drop`: keys that no later row reads leave the cache after the prefill; nothing that is computed changes.
    In bidirectional attention stripes are relative: block j is read iff max(0, |i - j| - local + 1) mod stride = 0.
    Differs: the rule and its step go by key heads, so that the shards cover the context under grouped heads too
    (the code divides by query heads), and blocks of a sample padded on the left begin at its first real token.
    Raises BadInput for settings that cannot be.
    """

    block: int = 64
    local: int = 16
    stride: int = 8
    offset: int = 0
    homo: bool = False
    dense_heads: int = 0
    dense_layers: tuple[int, ...] = ()
    step: int | None = None
    drop: bool = False
    direction: ClassVar[Direction] = "both"

    def __post_init__(self) -> None:
        if min(self.block, self.local, self.stride) < 1 or (self.step is not None and self.step < 0):
            raise BadInput(f"s2_attention needs block, local, stride >= 1 and step >= 0 or None, got {self}")
        if self.offset < 0 or self.dense_heads < 0 or any(layer < 0 for layer in self.dense_layers):
            raise BadInput(f"s2_attention needs offset, dense_heads and layer numbers >= 0, got {self}")

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if self._dense(site):
            return site.dense()
        if site.evicted:
            return self._of_kept(site, state)
        causal = site.structure is not None and any(isinstance(part, Causal) for part in site.structure.parts())
        first = (0,) if site.first is None else tuple(site.first.tolist())
        pieces = _pieces(self, site.kv_heads, site.queries, site.keys, site.offset, first, causal)
        return KeyPlan(site.queries, site.keys, site.structure, pieces, offset=site.offset)

    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        if not self.drop or self._dense(site):
            return None
        first = torch.zeros(1, dtype=torch.int64) if site.first is None else site.first
        last = _pieces(self, site.kv_heads, 1, site.keys, site.keys - 1, tuple(first.tolist()), True)
        keep = last.keep()[:, :, 0] & (torch.arange(site.keys) >= first[:, None, None])  # (1|batch, kv_heads, keys)
        # Where the kept keys stood, in the order in which the cache holds them: those of a shorter list at its end.
        order = torch.sort(keep.to(torch.int8), dim=-1, stable=True).indices[..., -int(keep.sum(-1).max()) :]
        state.update(stood=order, seen=site.keys, first=first[:, None, None])
        return keep.expand(site.batch, -1, -1)

    def _of_kept(self, site: AttentionSite, state: State) -> KeyPlan:
        stood, seen, first = state["stood"], state["seen"], state["first"]
        new = torch.arange(seen, seen + site.keys - stood.shape[2])
        at = torch.cat([stood, new.expand(*stood.shape[:2], -1)], 2)  # (1|batch, kv_heads, keys)
        i, j = (((x - first).clamp(min=0)) // self.block for x in (new[-site.queries :], at))
        keep = self._reads(site.kv_heads, i[..., None], j[:, :, None])
        return KeyPlan(site.queries, site.keys, site.structure, Pieces.from_keep(keep, 1, site.queries), offset=site.offset)

    def grid(self, heads: int, rows: Tensor, blocks: int, causal: bool = True) -> Tensor:
        """What each key head reads. rows (n,) int64: the block numbers of n query rows -> (heads, n, blocks) bool."""
        i, j = rows[:, None], torch.arange(blocks)
        if causal:
            return self._reads(heads, i, j)
        return (((i - j).abs() - self.local + 1).clamp(min=0) % self.stride == 0).expand(heads, -1, -1)

    def _reads(self, heads: int, i: Tensor, j: Tensor) -> Tensor:
        """Row blocks i and key blocks j, broadcasting to (..., heads, rows, keys), of the causal rule."""
        head = torch.arange(heads)[:, None, None]
        near, stripe = i - j < self.local, (j + head * self.turn(heads) + self.offset) % self.stride == 0
        return (j <= i) & (near | stripe | (head >= heads - self.dense_heads))

    def turn(self, heads: int) -> int:
        """By how many blocks the stripe moves from one key head to the next."""
        return 0 if self.homo else max(1, self.stride // heads) if self.step is None else self.step

    def _dense(self, site: AttentionSite) -> bool:
        return self.stride == 1 or site.layer in self.dense_layers or self.dense_heads >= site.kv_heads


@lru_cache(maxsize=64)
def _pieces(
    rule: S2Attention, heads: int, queries: int, keys: int, offset: int, first: tuple[int, ...], causal: bool
) -> Pieces:
    """The runs of every sample and key head, made once for all layers. Groups of rows never cross a block."""
    rows = 1 if queries == 1 else gcd(rule.block, *(offset - start for start in first))
    at = torch.arange(0, queries, rows) + offset
    parts = []
    for start in first:
        blocks = -(-(keys - start) // rule.block)
        keep = rule.grid(heads, (at - start).clamp(min=0) // rule.block, blocks, causal)
        if causal and not rule.homo and not rule.dense_heads and not bool(keep[:, -1].any(0).all()):
            warn_of_gaps(heads, rule.stride, rule.turn(heads))
        parts.append(Pieces.from_blocks(keep[None], rows, rule.block, queries, keys - start))
    return parts[0] if first == (0,) else from_first(parts, first, keys)
