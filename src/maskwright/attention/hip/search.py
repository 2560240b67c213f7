"""HiP's tree search: segments of key blocks are halved, judged by one representative block, and the best half stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.attention import Pieces
from maskwright.core.errors import BadInput

Representative = Literal["first", "center", "max"]
_ENTRIES = 1 << 21  # gathered key entries and scores at a time: query blocks are worked in chunks of this size


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found: block numbers `starts` (batch, heads, groups, n) int64, ascending, the first `counts`
    (batch, heads, groups) of them valid; `scored` (groups,): segments judged for each query block of one head."""

    starts: Tensor
    counts: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Search:
    """The tree search for `n` key blocks of `block` keys (arXiv 2406.09827, algorithm 1; the sheet's steps 2-5).

    representative: which block of a segment stands for it: its "first", its "center", or the "max" over all of its
    blocks (an oracle that looks at every pair: for tests).
    """

    n: int
    block: int
    representative: Representative = "first"

    def __call__(self, q: Tensor, k: Tensor, at: Tensor, limit: Tensor) -> Found:
        """q (batch, heads, groups, rows, width): the rows that judge, standing at `at` (batch, groups, rows);
        k (batch, kv_heads, keys, width); limit (batch, groups): keys [0, limit) are searched for a query block.
        """
        batch, heads, groups, rows, width = q.shape
        blocks = -(-k.shape[2] // self.block)
        k = F.pad(k, (0, 0, 0, blocks * self.block - k.shape[2])).reshape(-1, blocks, self.block * width)
        owner = torch.arange(batch * heads, device=q.device) // (heads * batch // k.shape[0])
        owner = owner.view(batch, heads, 1, 1)  # which keys a head reads
        step = max(1, _ENTRIES // (batch * heads * self.n * self.block * (width + rows)))
        parts = []
        for g in range(0, groups, step):
            part = slice(g, g + step)
            parts.append(self._groups(q[:, :, part], k, owner, at[:, part], limit[:, part]))
        starts, counts, scored = (torch.cat([p[i] for p in parts], 0 if i == 2 else 2) for i in range(3))
        return Found(starts, counts, scored)

    def _groups(self, q: Tensor, k: Tensor, owner: Tensor, at: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, groups = q.shape[1:3]
        start, size = segments(-(-limit // self.block), self.n)
        start, size = (x[:, None].expand(-1, heads, -1, -1) for x in (start, size))  # (batch, heads, groups, n)
        table = self._table(q, k, owner, at) if self.representative == "max" else None
        scored = torch.zeros(groups, dtype=torch.int64, device=q.device)

        def judge(start: Tensor, size: Tensor) -> Tensor:
            scored.add_(start.shape[-1])
            if table is not None:
                block = torch.arange(table.shape[-1], device=q.device)
                inside = (block >= start[..., None]) & (block < (start + size)[..., None])
                return table[..., None, :].masked_fill(~inside, -torch.inf).amax(-1)
            found = self._score(q, k, owner, at, start + size // 2 if self.representative == "center" else start)
            return found.masked_fill(size == 0, -torch.inf)

        known = None
        while int(size.max() if size.numel() else 0) > 1:
            half = size // 2
            right = judge(start + half, size - half)
            if self.representative == "first":  # a left child's first block is its parent's: nothing new to score
                known = judge(start, size) if known is None else known
                left = known.masked_fill(half == 0, -torch.inf)
            else:
                left = judge(start, half)
            score = torch.stack([left, right], -1).flatten(-2)  # (batch, heads, groups, 2n), ascending starts
            if bool(score.isnan().any()):
                raise BadInput(f"hip: scores of q {tuple(q.shape)} hold NaN; nothing can be selected from them")
            # Ties fall to the lower index, so that the result is the same on every machine.
            best = score.sort(dim=-1, descending=True, stable=True).indices[..., : self.n].sort(-1).values
            start = torch.stack([start, start + half], -1).flatten(-2).gather(-1, best)
            size = torch.stack([half, size - half], -1).flatten(-2).gather(-1, best)
            known = score.gather(-1, best)
        # Segments of size 0 (fewer blocks than n) go to the end, where `counts` cuts them off.
        start = start.masked_fill(size == 0, k.shape[1]).sort(-1).values
        return start, (size > 0).sum(-1), scored

    def _score(self, q: Tensor, k: Tensor, owner: Tensor, at: Tensor, block: Tensor) -> Tensor:
        """max of q.k over the judging rows and the keys of `block` (batch, heads, groups, m); future keys do not count."""
        rows, width = q.shape[3:]
        m = block.shape[-1]
        keys = k.flatten(0, 1).index_select(0, (owner * k.shape[1] + block).flatten()).view(-1, m * self.block, width)
        score = torch.bmm(keys, q.reshape(-1, rows, width).mT)  # (batch * heads * groups, m * block, rows)
        last = block[..., None] * self.block + torch.arange(self.block, device=q.device)
        if bool((last.amax((1, 3, 4)) > at.amin(-1)).any()):
            future = last.flatten(-2)[..., None] > at[:, None, :, None]
            score = score.masked_fill(future.view(score.shape), -torch.inf)
        return score.view(*q.shape[:3], m, self.block * rows).amax(-1)

    def _table(self, q: Tensor, k: Tensor, owner: Tensor, at: Tensor) -> Tensor:
        """The score of every block: (batch, heads, groups, blocks)."""
        every = torch.arange(k.shape[1], device=q.device).expand(*q.shape[:3], -1)
        return self._score(q, k, owner, at, every)


def segments(blocks: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(…,) block counts -> n segments that cover them: starts and sizes (…, n). Fewer blocks than n: one each, then none."""
    i = torch.arange(n, device=blocks.device)
    many = blocks[..., None]
    start = torch.where(many > n, many * i // n, i.expand(*blocks.shape, n))
    stop = torch.where(many > n, many * (i + 1) // n, i + 1)
    return start, torch.where(start < many, stop - start, 0)


def forced(runs: Tensor, rows: int, queries: int, keys: int) -> Pieces:
    """Pieces of two runs a query block that do not overlap; empty ones are left out. runs (start|stop, 2, batch, groups)."""
    start, stop = runs.permute(0, 2, 3, 1)  # (batch, groups, 2) each
    real = start < stop
    counts = real.sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Pieces(offsets, start[real].int(), stop[real].int(), (len(start), 1, start.shape[1]), rows, queries, keys)
