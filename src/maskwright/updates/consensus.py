"""How the deltas of several models become one: their sum, or the mean of those that agree with an elected sign."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskwright.core.errors import BadInput

Zero = Literal["plus", "majority"]


class Consensus(ABC):
    """Combines one chunk. `normalise` divides by the weights of those that took part."""

    normalise: bool

    @abstractmethod
    def combine(self, deltas: list[Tensor], weights: Sequence[float], leaning: float) -> Tensor:
        """(n,) sparse deltas of each model -> (n,). leaning: see `Elected`. The tensors given may be changed."""


@dataclass(frozen=True)
class Summed(Consensus):
    """sum_t w_t delta_t, divided by sum_t w_t if `normalise`."""

    normalise: bool = False

    def combine(self, deltas: list[Tensor], weights: Sequence[float], leaning: float) -> Tensor:
        out = _weighted(deltas[0], weights[0])
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            out.add_(delta, alpha=weight)
        return out.div_(sum(weights)) if self.normalise else out


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

    def combine(self, deltas: list[Tensor], weights: Sequence[float], leaning: float) -> Tensor:
        parts = [_weighted(delta, weight) for delta, weight in zip(deltas, weights, strict=True)]
        sign = self.total(parts).sign_()
        sign.add_(sign.eq(0), alpha=1.0 if self.zero == "plus" else leaning)
        out, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for part, weight in zip(parts, weights, strict=True):
            agreeing = part.mul_(sign).relu_()  # magnitudes of those with the elected sign
            out.add_(agreeing)
            if self.normalise:
                divisor.add_(agreeing.sign_(), alpha=weight)
        # Where nothing agrees the sum is 0, and 0 over anything above 0 stays 0.
        return out.mul_(sign).div_(divisor.clamp_(min=1e-30)) if self.normalise else out.mul_(sign)

    @staticmethod
    def total(parts: Sequence[Tensor]) -> Tensor:
        """The sum whose sign is elected."""
        out = parts[0].clone()
        for part in parts[1:]:
            out.add_(part)
        return out


def _weighted(delta: Tensor, weight: float) -> Tensor:
    return delta if weight == 1 else delta.mul_(weight)
