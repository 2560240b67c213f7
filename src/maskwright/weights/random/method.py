"""Random pruning."""

from dataclasses import dataclass
from typing import final

from maskwright.core.score import Score, uniform_random
from maskwright.weights import ByScore


@final
@dataclass(frozen=True)
class Random(ByScore):
    """Keep a uniformly random choice, a function of the seed and the site's name alone.

    The floor every method must clear; with `budget="erk"` the strong naive baseline of arXiv 2202.02643.
    """

    @property
    def score(self) -> Score:
        return uniform_random
