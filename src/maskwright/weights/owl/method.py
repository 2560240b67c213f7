"""OWL: outlier-weighed layerwise densities for Wanda's score."""

from dataclasses import dataclass
from typing import final

from maskwright.core.budget import Budget, owl
from maskwright.core.errors import BadInput
from maskwright.core.score import Score
from maskwright.weights import ByScore, input_weighted


@final
@dataclass(frozen=True)
class Owl(ByScore):
    """Blocks with more outliers (|w| ||x|| above `outlier_multiple` x the mean) keep more (arXiv 2310.05175).

    A budget, not a score: Wanda selects inside each site. Densities differ between blocks by at most 2 lam.
    The outlier shares come from one dense walk before the pruning one.
    """

    lam: float = 0.08
    outlier_multiple: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam < 0 or self.outlier_multiple <= 0:
            raise BadInput(f"owl needs lam >= 0 and outlier_multiple > 0, got {self.lam} and {self.outlier_multiple}")

    @property
    def score(self) -> Score:
        return input_weighted

    @property
    def allocation(self) -> Budget:
        return owl(self.lam)
