"""How the deltas of several models become one: their sum, or the mean of those that agree with an elected sign."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maskwright.core.errors import BadInput
from maskwright.kernels.merge import Rule

Zero = Literal["plus", "majority"]


class Consensus(ABC):
    """How one chunk's sparse deltas are combined. `normalise` divides by the weights of those that took part."""

    normalise: bool

    @abstractmethod
    def rule(self, weights: Sequence[float], leaning: float, scale: float) -> Rule:
        """What the kernels are told. leaning: see `Elected`."""


@dataclass(frozen=True)
class Summed(Consensus):
    """sum_t w_t delta_t, divided by sum_t w_t if `normalise`."""

    normalise: bool = False

    def rule(self, weights: Sequence[float], leaning: float, scale: float) -> Rule:
        return Rule(False, sum(weights) if self.normalise else 0.0, 0.0, scale)


@dataclass(frozen=True)
class Elected(Consensus):
    """TIES (arXiv 2306.01708): the sign of sum_t w_t delta_t wins, the deltas of that sign are summed or averaged.

    zero: what an exact tie elects. "plus" as mergekit, or "majority", the sign of the sum of all signs of the model, as
    the paper's code does (`leaning`).
    """

    normalise: bool = True
    zero: Zero = "plus"

    def __post_init__(self) -> None:
        if self.zero not in ("plus", "majority"):
            raise BadInput(f"zero is plus or majority, not {self.zero!r}")

    def rule(self, weights: Sequence[float], leaning: float, scale: float) -> Rule:
        return Rule(True, 1.0 if self.normalise else 0.0, 1.0 if self.zero == "plus" else leaning, scale)
