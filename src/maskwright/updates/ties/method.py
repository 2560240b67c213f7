"""TIES-Merging (arXiv 2306.01708): trim small deltas, elect a sign per entry, average those that agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from maskwright.updates.consensus import Elected, Zero
from maskwright.updates.parts import MergeMethod, Parts
from maskwright.updates.sparsify import Band, Group


@final
@dataclass(frozen=True)
class Ties(MergeMethod):
    """Trim to the `density` of greatest magnitude, elect the sign of the weighted sum, average what agrees (2306.01708).

    Averaging disjointly keeps an entry that one model alone moved at its full size. group: what competes, "global" as
    in the paper, "tensor" as in mergekit. zero: the sign where the sum is exactly 0, see `Elected`.
    Differs: the paper's code keeps one entry more (its threshold, at index n - k n, is kept by >=), and all that tie.
    """

    density: float = 0.2
    group: Group = "tensor"
    zero: Zero = "plus"
    normalise: bool = True

    def parts(self) -> Parts:
        return Parts(Band(self.density, group=self.group), Elected(self.normalise, self.zero), scale=self.scale)
