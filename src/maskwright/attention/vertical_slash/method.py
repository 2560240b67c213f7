"""Vertical-slash: a few columns and a few diagonals, chosen by what the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.scores import TILE, best, column_sum, force, real_span, slash_pieces, slash_sum, window_scores
from maskwright.core.errors import BadInput

SINKS = 4


@final
@dataclass(frozen=True)
class VerticalSlash(AttentionMethod):
    """Keep the `vertical_size` keys and the `slash_size` distances that the last queries weigh most (MInference's
    vertical-slash, arXiv 2407.02490, in the form of arXiv 2504.17768).

    Attention of long prompts lies on columns (keys everyone reads) and diagonals (keys at a fixed distance), and the last
    `approximation_size` queries show which. The first 4 keys and the last 64 distances always stay. A prompt alone is
    masked; later calls (decoding, further chunks of a prompt) are dense. Sizes beyond the prompt are cut to it.
    Raises BadInput for fewer than 4 columns, 64 distances or 1 query, and for queries or keys that are not finite.
    """

    vertical_size: int = 256
    slash_size: int = 128
    approximation_size: int = 128

    def __post_init__(self) -> None:
        if self.vertical_size < SINKS or self.slash_size < TILE or self.approximation_size < 1:
            raise BadInput(
                f"vertical_slash: vertical_size >= {SINKS} (sinks), slash_size >= {TILE} (local), "
                f"approximation_size >= 1; got {self.vertical_size}, {self.slash_size}, {self.approximation_size}"
            )

    @torch.no_grad()
    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if not site.begins:
            return site.dense()
        column, slash = window_scores(site, self.approximation_size, column_sum, slash_sum)  # (batch, heads, keys)
        first, last = (x[:, None, None] for x in real_span(site))
        at, real = torch.arange(site.keys), last - first
        column = force(column, at < first + SINKS, (at < first) | (at >= last))
        slash = force(slash, at < TILE, at >= real)
        columns = best("vertical_slash", site, column, real.clamp(max=self.vertical_size)[..., 0])
        slashes = best("vertical_slash", site, slash, real.clamp(max=self.slash_size)[..., 0])
        return KeyPlan(site.queries, site.keys, site.structure, slash_pieces(columns, slashes))
