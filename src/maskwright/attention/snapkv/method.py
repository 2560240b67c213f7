"""SnapKV: after the prompt, keep the keys that its last queries looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.eviction import check_capacity, smoothed_worth
from maskwright.attention.scores import best, column_sum, real_span, window_scores


@final
@dataclass(frozen=True)
class SnapKV(AttentionMethod):
    """Keep `capacity` keys a key head once the prompt is read, the rest is dropped for good (arXiv 2404.14469, in the form
    of arXiv 2504.17768).

    The prompt's last `window` queries say which keys the answer will need: their weights, summed over rows and averaged
    over the query heads of the group, smoothed over `kernel` neighbours, with the first `prefix` and the last `local`
    keys always kept. The prompt itself is read densely, and new keys are appended and never dropped. A prompt of at most
    `capacity` keys keeps them all.
    Raises BadInput for capacity <= local + prefix, an even kernel, an empty window, and queries or keys that are not
    finite.
    """

    capacity: int = 512
    window: int = 128
    kernel: int = 7
    local: int = 64
    prefix: int = 4

    def __post_init__(self) -> None:
        check_capacity("snapkv", self.capacity, self.window, self.kernel, self.local, self.prefix)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return site.dense()

    @torch.no_grad()
    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        first, last = real_span(site)
        real = (last - first)[:, None]
        if bool((real <= self.capacity).all()):
            return None
        (column,) = window_scores(site, self.window, column_sum)  # (batch, heads, keys)
        worth = column.unflatten(1, (site.kv_heads, site.group)).mean(2)
        score = smoothed_worth(site, worth, self.kernel, self.local, self.prefix)
        return best("snapkv", site, score, real.clamp(max=self.capacity))
