"""RigL: rigging the lottery."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from maskwright.weights import WeightSite
from maskwright.weights.rewired import Rewired


@final
@dataclass(frozen=True)
class RigL(Rewired):
    """Drop the smallest |w|, grow where the dense gradient is largest (arXiv 1911.11134).

    The gradient is that of the update step's own batch (or accumulated batches), seen by dropped weights too.
    Differs: RigL's code skips the optimiser step where the mask moves; here the step is taken, then the mask moves.
    """

    def wants_dense_grad(self, step: int) -> bool:
        return self.schedule(step) is not None

    def grow(self, site: WeightSite, step: int) -> Tensor:
        return site.stat("dense_grad").abs()
