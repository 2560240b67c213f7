"""DMJD's visible branch: what a kept token is, told from that token alone."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.inputs.vit import initialise


@final
class Distil(nn.Module):
    """A projector (three linear maps, layer norms, GELU; the last norm without weights) and a linear predictor.

    Called with kept tokens (n, kept, inputs) and their targets (n, kept, outputs), in the same order; gives the mean
    smooth-L1 loss: quadratic up to a difference of `beta`.
    """

    def __init__(self, inputs: int, outputs: int, beta: float, *, rng: torch.Generator) -> None:
        super().__init__()
        self.beta = beta
        with torch.random.fork_rng(devices=[]):
            parts: list[nn.Module] = []
            for _ in range(2):
                parts += [nn.Linear(inputs, inputs), nn.LayerNorm(inputs), nn.GELU()]
            parts += [nn.Linear(inputs, inputs), nn.LayerNorm(inputs, elementwise_affine=False)]
            self.projector, self.predictor = nn.Sequential(*parts), nn.Linear(inputs, outputs)
        initialise(self, rng)

    def predict(self, kept: Tensor) -> Tensor:
        """(n, kept, inputs) -> (n, kept, outputs), each token by itself."""
        return self.predictor(self.projector(kept))

    def forward(self, kept: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.predict(kept), target, beta=self.beta)
