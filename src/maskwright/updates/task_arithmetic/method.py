"""Task arithmetic (arXiv 2212.04089): add the differences of tuned models to their base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from maskwright.updates.consensus import Summed
from maskwright.updates.parts import MergeMethod, Parts


@final
@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """base + scale * sum_t w_t (tuned_t - base), nothing dropped (arXiv 2212.04089).

    scale: the paper's lambda, tuned on validation data (about 0.3 for 8 tasks); negative to forget. normalise: divide by
    the sum of the weights, so that `scale` 1 and equal weights give the mean of the models.
    """

    normalise: bool = False

    def parts(self) -> Parts:
        return Parts(consensus=Summed(self.normalise), scale=self.scale)
