"""Ada-SnapKV: SnapKV whose budget goes to the heads that need it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.eviction import check_capacity, smoothed_worth
from maskwright.attention.scores import best, column_peak, real_span, window_scores
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class AdaSnapKV(AttentionMethod):
    """Keep `capacity` keys a key head on average once the prompt is read (Ada-KV, arXiv 2407.11550, in the form of
    arXiv 2504.17768).

    A key's worth is the greatest weight that any of the last `window` queries of any query head of the group gives it,
    smoothed over `kernel` neighbours. Each head keeps its best max(capacity x min_head_capacity_ratio, local + prefix)
    keys at least; what is left of capacity x key heads goes to the best keys of all heads together. The first `prefix`
    and last `local` keys always stay. The prompt is read densely; new keys are appended and never dropped.
    Raises BadInput for capacity <= local + prefix, an even kernel, a ratio outside 0..1, and queries or keys that are not
    finite.
    """

    capacity: int = 512
    min_head_capacity_ratio: float = 0.2
    window: int = 128
    kernel: int = 7
    local: int = 64
    prefix: int = 4

    def __post_init__(self) -> None:
        check_capacity("ada_snapkv", self.capacity, self.window, self.kernel, self.local, self.prefix)
        if not 0 <= self.min_head_capacity_ratio <= 1:
            raise BadInput(f"ada_snapkv: min_head_capacity_ratio lies in 0..1, got {self.min_head_capacity_ratio}")

    @property
    def floor(self) -> int:
        """Keys that every head keeps at least."""
        # Differs: the reference cuts the float product, so that 0.29 of 100 is 28; here it is 29.
        return max(math.floor(self.capacity * self.min_head_capacity_ratio + 1e-6), self.local + self.prefix)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return site.dense()

    @torch.no_grad()
    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        first, last = real_span(site)
        real = (last - first)[:, None]  # (batch, 1)
        if bool((real <= self.capacity).all()):
            return None
        (peak,) = window_scores(site, self.window, column_peak)  # (batch, heads, keys)
        worth = peak.unflatten(1, (site.kv_heads, site.group)).amax(2)
        score = smoothed_worth(site, worth, self.kernel, self.local, self.prefix)
        least = real.clamp(max=self.floor)
        keep = best("ada_snapkv", site, score, least)  # every head's own
        rest = (real.clamp(max=self.capacity) - least)[:, 0] * site.kv_heads
        shared = score.masked_fill(keep, float("-inf")).flatten(1)  # Differs: ties fall to the lower head, then key
        return keep | best("ada_snapkv", site, shared, rest).view_as(keep)
