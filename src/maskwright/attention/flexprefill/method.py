"""FlexPrefill: vertical-slash whose sizes follow how each head's attention is spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.flexprefill.blocks import covering, query_aware
from maskwright.attention.scores import column_sum, real_span, slash_sum, window_rows, window_scores
from maskwright.attention.slashes import TILE, chosen_slashes
from maskwright.core.errors import BadInput

Variant = Literal["frontier", "original"]


@final
@dataclass(frozen=True)
class FlexPrefill(AttentionMethod):
    """Keep as many columns and distances as cover the share `alpha` of what the last queries weigh (arXiv 2502.20766).

    A head keeps the count of sorted shares whose running sum is <= alpha, plus one, at least `min_budget`, apart for
    columns and for distances; the first 4 keys and last 64 distances are forced in after the counting.
    variant "frontier" (arXiv 2504.17768) does so in every head. "original" first asks whether products of pooled queries
    and keys foretell a head's attention: where the root of the Jensen-Shannon divergence between the pooled and the
    true attention of the last queries is below `tau`, the head reads the blocks of 64 x 64 that cover `alpha` of the
    pooled attention instead. A prompt alone is masked; later calls are dense.
    Raises BadInput for alpha or tau outside 0..1, a budget below 64, and queries or keys that are not finite.
    """

    alpha: float = 0.65
    approximation_size: int = 128
    min_budget: int = 128
    variant: Variant = "frontier"
    tau: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.tau <= 1):
            raise BadInput(f"flexprefill: alpha and tau lie in 0..1, got {self.alpha} and {self.tau}")
        if self.min_budget < TILE or self.approximation_size < 1 or self.variant not in ("frontier", "original"):
            raise BadInput(
                f"flexprefill: min_budget >= {TILE} (local), approximation_size >= 1, variant 'frontier' or 'original'; got "
                f"{self.min_budget}, {self.approximation_size}, {self.variant!r}"
            )

    @torch.no_grad()
    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if not site.begins:
            return site.dense()
        column, slash = window_scores(site, self.approximation_size, column_sum, slash_sum)  # (batch, heads, keys)
        rows = window_rows(site, self.approximation_size)[:, None, None]
        column, slash = column / rows, slash / rows  # each sums to 1
        first, last = real_span(site)
        real, least = (last - first)[:, None], torch.tensor(self.min_budget)
        many = [torch.minimum(torch.maximum(covering(x, self.alpha), least), real) for x in (column, slash)]
        pieces = chosen_slashes("flexprefill", site, column, slash, *many)
        if self.variant == "original":
            pieces = query_aware(site, column, pieces, self.alpha, self.tau, self.approximation_size)
        return KeyPlan(site.queries, site.keys, site.structure, pieces)
