"""Vertical-slash: a few columns and a few diagonals, chosen by what the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.scores import column_sum, real_span, slash_sum, window_scores
from maskwright.attention.slashes import SINKS, TILE, chosen_slashes
from maskwright.core.errors import BadInput


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
        first, last = real_span(site)
        many = [(last - first).clamp(max=most)[:, None] for most in (self.vertical_size, self.slash_size)]
        pieces = chosen_slashes("vertical_slash", site, column, slash, *many)
        return KeyPlan(site.queries, site.keys, site.structure, pieces)
