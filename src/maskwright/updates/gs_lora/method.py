"""GS-LoRA and GS-LoRA++: group-sparse low-rank updates that forget chosen classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import final

from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import Tuning
from maskwright.updates.branch import LinearSite, branched, linears
from maskwright.updates.gs_lora.run import GROUPS, GsLoraRun
from maskwright.updates.lora import LowRank


@final
@dataclass(frozen=True)
class GsLora(Tuning):
    """W + scale B A on both Linear layers of each MLP (arXiv 2403.11530; ++: 2501.09705); a block's A and B are one group.

    L = CE(remain) + beta ReLU(bound - CE(forget)) + alpha sum over groups of |G|
        + forget_weight ReLU(proto_bound - KL(forget)) + remain_weight KL(remain), KL from the class's prototype.
    GS-LoRA: the defaults. ++: forget_weight > 0 with prototypes, and ema_decay 0.9.
    alpha_epoch: alpha is 0 in the epochs before it. proximal: the lasso as an exact step after the optimiser's, which
    gives exact zeros. The code's scale is 1 / rank (loralib's), the paper's text has 1.
    Raises BadInput for settings that make no sense.
    """

    where: tuple[str, ...] = ()
    rank: int = 8
    scale: float = 1.0
    group_by: str = "block"
    size_weighted: bool = False
    alpha: float = 1e-4
    alpha_epoch: int = 0
    beta: float = 0.15
    bound: float = 10.0
    proximal: bool = False
    forget_weight: float = 0.0
    remain_weight: float = 0.0
    proto_bound: float = 18.0
    ema_decay: float = 0.0
    ema_epoch: int = 30

    def validate(self) -> None:
        if self.rank < 1 or not isfinite(self.scale) or self.scale <= 0:
            raise BadInput(f"gs_lora needs rank >= 1 and scale > 0, got rank {self.rank}, scale {self.scale}")
        if self.group_by not in GROUPS:
            raise BadInput(f"gs_lora groups by {', '.join(GROUPS)}, got {self.group_by!r}")
        if not min(self.bound, self.proto_bound) > 0:
            raise BadInput(f"gs_lora needs bound and proto_bound > 0, got {self.bound}, {self.proto_bound}")
        weights = (self.alpha, self.beta, self.forget_weight, self.remain_weight)
        if not all(isfinite(w) and w >= 0 for w in weights) or not 0 <= self.ema_decay < 1:
            raise BadInput(f"gs_lora needs weights >= 0 and ema_decay in [0, 1), got {weights}, {self.ema_decay}")
        if min(self.alpha_epoch, self.ema_epoch) < 0:
            raise BadInput(f"gs_lora needs epochs >= 0, got alpha_epoch {self.alpha_epoch}, ema_epoch {self.ema_epoch}")

    @contextmanager
    def attach(self, model: nn.Module, *, seed: int = 0) -> Iterator[GsLoraRun]:
        """Hang the pairs on a model: the output is the model's own at first (B = 0). `forget` is the whole loop."""
        sites = linears(model, self.where) if self.where else mlp_layers(model)
        pairs = {n: LowRank(s.shape, self.rank, self.scale, seed=seed, name=n) for n, s in sites.items()}
        with branched(model, sites, pairs) as held:
            yield GsLoraRun(self, seed, held, pairs)


def mlp_layers(model: nn.Module) -> dict[str, LinearSite]:
    """The widening and narrowing Linear layers of each block, found by shape: (h, d) with h > d where (d, h) is there too.

    Raises BadInput when there is none: then `where` must name the layers.
    """
    inside = {name: site for name, site in linears(model).items() if site.block}
    shapes = {(site.block, *site.shape) for site in inside.values()}
    found = [n for n, s in inside.items() if s.shape[0] != s.shape[1] and (s.block, *s.shape[::-1]) in shapes]
    if not found:
        raise BadInput(f"{type(model).__name__}: no MLP (h, d) and (d, h) found in a block; name the layers with where")
    return linears(model, [f"re:^{re.escape(name)}$" for name in found])
