"""DARE (arXiv 2311.03099): drop deltas at random and rescale the rest, then merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from maskwright.core.errors import BadInput
from maskwright.updates.consensus import Elected, Summed
from maskwright.updates.parts import MergeMethod, Parts, Rescale
from maskwright.updates.sparsify import Chance


@final
@dataclass(frozen=True)
class Dare(MergeMethod):
    """Keep each delta with probability `density`, divide by it, and sum (arXiv 2311.03099).

    The rescaled delta equals the dense one in expectation, so that few entries carry it. elect: sign election on top
    (`dare_ties`). rescale: "density" (the paper: 1 / density), "l1" (mergekit: to the dense delta's L1 norm, per tensor),
    "none". A mask depends on the seed, the model's place in the list and the tensor's name, not on the order of tensors.
    """

    density: float = 0.5
    elect: bool = False
    rescale: Rescale = "density"
    normalise: bool = False

    def parts(self) -> Parts:
        if self.rescale not in ("none", "density", "l1"):
            raise BadInput(f"rescale is none, density or l1, not {self.rescale!r}")
        consensus = Elected(self.normalise) if self.elect else Summed(self.normalise)
        return Parts(Chance(self.density), consensus, self.rescale, self.scale)
