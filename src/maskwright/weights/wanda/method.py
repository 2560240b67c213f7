"""Wanda: pruning by weights and activations."""

from dataclasses import dataclass
from typing import final

from maskwright.core.score import Score
from maskwright.weights import ByScore, input_weighted


@final
@dataclass(frozen=True)
class Wanda(ByScore):
    """Keep the largest |w| x ||x||_2, compared within each output row (arXiv 2306.11695, eq. 1).

    A weight matters as much as the input it multiplies; comparing within a row keeps every output alive.
    No weight is changed, and no gradient is needed.
    """

    @property
    def score(self) -> Score:
        return input_weighted
