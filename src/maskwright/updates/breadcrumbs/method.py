"""Model Breadcrumbs (arXiv 2312.06795): drop a delta's outliers and its small entries, and sum what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from maskwright.updates.consensus import Elected, Summed
from maskwright.updates.parts import MergeMethod, Parts
from maskwright.updates.sparsify import Band, Group


@final
@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Of each delta drop the `drop_top` share of greatest magnitude, keep the next `density` share, and sum (2312.06795).

    Outliers disturb the other tasks most, and small entries add up to noise, so a sum of bands bears more tasks at the
    same scale. drop_top is the share removed (the reference's gamma; not a percentile kept below), density the share
    that stays (its beta). scale: its alpha. group: what competes: "tensor" (the paper's layer), "row" (its code), "global".
    elect: sign election on top (mergekit's breadcrumbs_ties). Raises BadInput when density + drop_top exceed 1.
    """

    scale: float = 0.3
    density: float = 0.15
    drop_top: float = 0.006
    group: Group = "tensor"
    elect: bool = False
    normalise: bool = False

    def parts(self) -> Parts:
        consensus = Elected(self.normalise) if self.elect else Summed(self.normalise)
        return Parts(Band(self.density, self.drop_top, self.group), consensus, scale=self.scale)

    @classmethod
    def between(cls, beta: float, gamma: float, scale: float = 0.3, group: Group = "tensor") -> Breadcrumbs:
        """In the paper's percentiles: keep what lies between the beta and the gamma percentile of the magnitudes."""
        return cls(scale, gamma - beta, 1 - gamma, group)
