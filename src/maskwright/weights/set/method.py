"""SET: sparse evolutionary training."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.core.select import generator
from maskwright.weights import WeightSite
from maskwright.weights.rewired import Rewired


@final
@dataclass(frozen=True)
class Set(Rewired):
    """Drop the smallest |w|, grow uniformly at random (arXiv 1707.04780).

    Growth is a function of the run's seed, the site's name and the step, so a resumed run grows the same weights.
    Differs: SET drops after every epoch, the most negative and smallest positive weights, at a constant share;
    here, as in Sparse-IFT's and RigL's comparisons, the smallest |w| on RigL's schedule.
    """

    def grow(self, site: WeightSite, step: int) -> Tensor:
        rng = generator(site.seed, f"{site.name}@{step}")
        return torch.rand(site.shape, generator=rng, dtype=torch.float64).to(site.value.device)
