"""What methods that drop keys of a prompt share: their settings' limits, and how worth of keys is smoothed and forced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from maskwright.attention.scores import force, real_span
from maskwright.attention.site import AttentionSite
from maskwright.core.errors import BadInput


def check_capacity(who: str, capacity: int, window: int, kernel: int, local: int, prefix: int) -> None:
    """Raise BadInput, naming `who`, for settings that leave nothing to choose or a kernel that shifts keys."""
    if window < 1 or local < 1 or prefix < 0 or capacity <= local + prefix:
        raise BadInput(
            f"{who}: window >= 1, local >= 1, prefix >= 0 and capacity > local + prefix, got capacity {capacity}, "
            f"window {window}, local {local}, prefix {prefix}"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise BadInput(f"{who}: an odd kernel keeps each key at its place, got {kernel}")


def smoothed_worth(site: AttentionSite, worth: Tensor, kernel: int, local: int, prefix: int) -> Tensor:
    """Worth (batch, kv_heads, keys) averaged over `kernel` neighbours; first and last keys must stay, padding must go.

    The first `prefix` and the last `local` real keys of each sample become +inf, padding -inf. Zeros beyond the ends
    count in the mean.
    """
    first, last = (x[:, None, None] for x in real_span(site))
    at = torch.arange(site.keys)
    smooth = avg_pool1d(worth, kernel, 1, kernel // 2)
    return force(smooth, (at < first + prefix) | (at >= last - local), (at < first) | (at >= last))
