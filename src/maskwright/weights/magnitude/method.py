"""Magnitude pruning."""

from dataclasses import dataclass
from typing import final

from maskwright.core.score import Score, magnitude
from maskwright.weights import ByScore


@final
@dataclass(frozen=True)
class Magnitude(ByScore):
    """Keep the largest |w|: the oldest score, and the one every other must beat.

    Differs: exact counts with ties to the lower index, where reference codes threshold with <= and drop more.
    """

    @property
    def score(self) -> Score:
        return magnitude
