"""HiP: a tree search over key blocks instead of scores of all keys, for prefill and decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import ClassVar, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Pieces, State, Window
from maskwright.attention.hip.search import Found, Representative, Search, forced
from maskwright.attention.method import Direction
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class Hip(AttentionMethod):
    """Every block of `block_q` rows reads `mask_k` searched keys, the first `sink` and at least its last `window` ones.

    Neighbouring keys score alike, so halving segments of keys and keeping the half of them whose first key block has the
    larger max q.k finds nearly the best blocks after O(log T) steps (arXiv 2406.09827). The search runs over the keys
    before the window; rows with at most mask_k keys there, or among the first `dense_queries` ones, read all of them.
    block_k: keys a block; judges: rows of a query block that score (its last and every block_q / judges-th before it).
    refresh: decoding steps that share a list. dense_layers: first layers left as they are. representative: see Search.
    Differs: blocks of 64 x 8 judged by 8 rows instead of 32 x 2 judged by all 32, and dense_queries 0 (None: the code's
    3 (k log2(T / 2k) + k), at 8k three rows in four). A model's own sliding-window layers are left as they are.
    Raises BadInput for settings out of range, mask_k no multiple of block_k, and NaN scores.
    """

    mask_k: int = 512
    block_q: int = 64
    block_k: int = 8
    window: int = 128
    sink: int = 16
    dense_layers: int = 3
    refresh: int = 8
    judges: int = 8
    dense_queries: int | None = 0
    representative: Representative = "first"
    direction: ClassVar[Direction] = "causal"

    def __post_init__(self) -> None:
        low = {"mask_k": 1, "block_q": 1, "block_k": 1, "window": 0, "sink": 0, "dense_layers": 0, "refresh": 1, "judges": 1}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise BadInput(f"hip: {name} >= {least}, got {getattr(self, name)}")
        if self.mask_k % self.block_k:
            raise BadInput(f"hip: mask_k {self.mask_k} is no multiple of block_k {self.block_k}")
        if self.dense_queries is not None and self.dense_queries < 0:
            raise BadInput(f"hip: dense_queries >= 0 or None, got {self.dense_queries}")
        if self.representative not in ("first", "center", "max"):
            raise BadInput(f'hip: representative is "first", "center" or "max", not {self.representative!r}')

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        narrow = site.structure is not None and any(isinstance(part, Window) for part in site.structure.parts())
        if site.layer < self.dense_layers or site.evicted or narrow or site.offset < 0:
            return site.dense()
        found = self.found(site, state)
        return KeyPlan(site.queries, site.keys, site.structure, self.pieces(site, *found), offset=site.offset)

    def found(self, site: AttentionSite, state: State) -> tuple[Found, Tensor]:
        """The searched blocks of this call, and (batch, groups) up to which key they were searched.

        A decoding step takes those of the last search while that is less than `refresh` keys old.
        """
        if site.queries > 1 or site.begins:
            return self.search(site)
        if "found" not in state or not 0 <= site.keys - state["keys"] < self.refresh:
            state["found"], state["keys"] = self.search(site), site.keys
        found: tuple[Found, Tensor] = state["found"]
        return found

    def search(self, site: AttentionSite) -> tuple[Found, Tensor]:
        """Search for every query block of the call."""
        low, high = self._rows(site)
        limit = (high - self.window).clamp(min=0)
        dense = self.dense_queries
        if dense is None:
            many = site.offset + site.queries
            dense = int(3 * (self.mask_k * max(log2(many / (2 * self.mask_k)), 0) + self.mask_k))
        # Dense rows: nothing is searched, the run of their window starts at the first key.
        limit = limit.masked_fill((limit <= self.mask_k) | (low < dense), 0)
        judges = min(self.judges, self.block_q)
        back = torch.arange(judges, device=site.q.device) * (self.block_q // judges)
        at = (high[..., None] - 1 - back).maximum(low[..., None])  # (batch, groups, judges)
        row = (at - site.offset + (0 if site.first is None else site.first[:, None, None])).flatten(1)
        q = site.q.gather(2, row[:, None, :, None].expand(site.batch, site.heads, -1, site.q.shape[-1]))
        k = site.k
        if site.first is not None:
            index = (torch.arange(site.keys, device=k.device) + site.first[:, None]).clamp(max=site.keys - 1)
            k = k.gather(2, index[:, None, :, None].expand_as(k))
        tree = Search(self.mask_k // self.block_k, self.block_k, self.representative)
        return tree(q.unflatten(2, at.shape[1:]), k, at.expand(site.batch, -1, -1), limit.expand(site.batch, -1)), limit

    def pieces(self, site: AttentionSite, found: Found, limit: Tensor) -> Pieces:
        """The searched blocks, the sink and the window of every query block, as runs of keys."""
        groups, (low, high) = -(-site.queries // self.block_q), self._rows(site)
        told = (self.block_q, site.queries, site.keys)
        blocks = Pieces.from_indices(found.starts, found.counts, self.block_k, *told)
        # Until the next search the window keeps its first key, so that no key falls between the two.
        start = limit.minimum(low + 1 - self.window) if self.window else limit
        start, stop = start.clamp(min=0).expand_as(high), high.clamp(min=0)
        runs = torch.stack([torch.zeros_like(high), start, stop.clamp(max=self.sink), stop]).view(2, 2, -1, groups)
        if site.first is not None:
            first = site.first.to(runs.dtype)
            runs = runs + first[:, None]
            shift = first.repeat_interleave(site.heads * groups).repeat_interleave(blocks.offsets.diff()).int()
            blocks = replace(blocks, starts=blocks.starts + shift, stops=(blocks.stops + shift).clamp(max=site.keys))
        runs[0, 1] = runs[0, 1].maximum(runs[1, 0])  # the sink ends where the window starts
        return blocks.union(forced(runs, *told))

    def _rows(self, site: AttentionSite) -> tuple[Tensor, Tensor]:
        """(batch | 1, groups) each: the rows of a query block stand at low <= p < high, the first real key at 0."""
        low = torch.arange(0, site.queries, self.block_q, device=site.q.device)[None]
        high = (low + self.block_q).clamp(max=site.queries)
        shift = site.offset if site.first is None else site.offset - site.first[:, None].long()
        return low + shift, high + shift
