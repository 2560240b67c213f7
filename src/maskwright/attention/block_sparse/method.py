"""Block-sparse: each block of rows reads the blocks of keys whose pooled keys match its pooled query best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Pieces, State
from maskwright.attention.scores import best, block_means, force, real_span
from maskwright.core.errors import BadInput

FORCED = 3


@final
@dataclass(frozen=True)
class BlockSparse(AttentionMethod):
    """Keep `top_chunks` blocks of `chunk_size` keys for every block of `chunk_size` rows (MInference's block-sparse
    pattern, arXiv 2407.02490, in the form of arXiv 2504.17768).

    A block's worth is the product of its mean key and the mean query of the rows, without scale or softmax. The rows' own
    block, the one before it and the first one always stay. Row block m may see m + 1 blocks, and keeps all of them while
    they are no more than `top_chunks`. A prompt alone is masked; later calls are dense.
    Raises BadInput for blocks of fewer than 1 row, fewer than 3 blocks a row, and queries or keys that are not finite.
    """

    chunk_size: int = 64
    top_chunks: int = 16

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.top_chunks < FORCED:
            raise BadInput(
                f"block_sparse: chunk_size >= 1 and top_chunks >= {FORCED} (own, previous and first block), got "
                f"{self.chunk_size} and {self.top_chunks}"
            )

    @torch.no_grad()
    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        size = self.chunk_size
        if not site.begins or site.keys <= size * self.top_chunks:
            return site.dense()
        first, last = real_span(site)
        q, k = block_means(site.q, size, first, last), block_means(site.k, size, first, last)
        score = (q.unflatten(1, (site.kv_heads, site.group)) @ k[:, :, None].mT).flatten(1, 2)  # (batch, heads, n, n)
        row = torch.arange(score.shape[2])[:, None]
        col, begin = row.T, (first // size)[:, None, None, None]  # the block of each sample's first key
        score = force(score, (col == row) | (col == row - 1) | (col == begin), (col > row) | (col < begin))
        counts = (row[:, 0] + 1 - begin[..., 0]).clamp(min=0, max=self.top_chunks)  # (batch, 1, n)
        keep = best("block_sparse", site, score, counts)
        pieces = Pieces.from_blocks(keep, size, size, site.queries, site.keys)
        return KeyPlan(site.queries, site.keys, site.structure, pieces)
