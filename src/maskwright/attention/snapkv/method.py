"""SnapKV: after the prompt, keep the keys that its last queries looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State
from maskwright.attention.scores import best, column_sum, force, real_span, window_scores
from maskwright.core.errors import BadInput


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
        if self.window < 1 or self.local < 1 or self.prefix < 0 or self.capacity <= self.local + self.prefix:
            raise BadInput(
                f"snapkv: window >= 1, local >= 1, prefix >= 0 and capacity > local + prefix, got capacity {self.capacity}, "
                f"window {self.window}, local {self.local}, prefix {self.prefix}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadInput(f"snapkv: an odd kernel keeps each key at its place, got {self.kernel}")

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return site.dense()

    @torch.no_grad()
    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        first, last = (x[:, None, None] for x in real_span(site))
        if bool((last - first <= self.capacity).all()):
            return None
        (column,) = window_scores(site, self.window, column_sum)  # (batch, heads, keys)
        score = column.unflatten(1, (site.kv_heads, site.group)).mean(2)
        score = avg_pool1d(score, self.kernel, 1, self.kernel // 2)  # zeros beyond the ends count in the mean
        at = torch.arange(site.keys)
        score = force(score, (at < first + self.prefix) | (at >= last - self.local), (at < first) | (at >= last))
        return best("snapkv", site, score, (last - first).clamp(max=self.capacity)[..., 0])
