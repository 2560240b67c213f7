"""MAE (arXiv 2111.06377): encode a random quarter of the tokens, tell the pixels of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.method import Pretraining
from maskwright.inputs.samplers import Exact
from maskwright.inputs.targets import Target, target_of
from maskwright.inputs.token_learner import TokenLearner, decoder_for


@final
@dataclass(frozen=True)
class Mae(Pretraining):
    """Each image keeps whole(density, tokens) tokens by chance; the mean squared error is taken over the hidden ones.

    density: share kept (the paper masks 75%). target: "normalised" pixels (the paper's best), "pixels", "hog", or a
    function (images, patch) -> (batch, tokens, features). decoder_*: its blocks, width (0: half the encoder's) and heads.
    """

    density: float = 0.25
    target: str | Target = "normalised"
    decoder_layers: int = 2
    decoder_width: int = 0
    decoder_heads: int = 4

    def validate(self) -> None:
        target_of(self.target)
        Exact(self.density)
        if self.decoder_layers < 1 or self.decoder_width < 0 or self.decoder_heads < 1:
            sizes = (self.decoder_layers, self.decoder_width, self.decoder_heads)
            raise BadInput(f"a decoder has layers and heads of at least 1 and a width of at least 0, got {sizes}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """An exact random mask of x's shape, (batch, tokens) or (batch, rows, columns)."""
        return Exact(self.density)(tuple(x.shape), rng=rng or generator(0, "mae"))

    def learner(self, backbone: nn.Module, example: Tensor, *, seed: int = 0) -> TokenLearner:
        target = target_of(self.target)
        decoder = decoder_for(
            backbone, example, target,
            width=self.decoder_width, layers=self.decoder_layers, heads=self.decoder_heads, seed=seed,
        )  # fmt: skip
        sampler = Exact(self.density)
        return TokenLearner(backbone, decoder, target, lambda shape, rng: sampler(shape, rng=rng))
