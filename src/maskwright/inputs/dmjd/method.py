"""DMJD (arXiv 2301.00230): views of one image that hide different places, and a loss on hidden and kept tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.dmjd.distil import Distil
from maskwright.inputs.method import Pretraining
from maskwright.inputs.samplers import Views
from maskwright.inputs.targets import Target, target_of
from maskwright.inputs.token_learner import TokenLearner, decoder_for
from maskwright.inputs.vit import encoder_of


@final
@dataclass(frozen=True)
class Dmjd(Pretraining):
    """Each image is seen `views` times in a step; each view keeps `density` of it, and hides what no other one has hidden,
    until the share `cover` was hidden by some view (1: every token is told in every step).

    density: 1 - rho. cover: the paper's prediction ratio pi. block: side in tokens of what is kept or hidden as one.
    target: "hog" (the paper), "normalised", "pixels", or a function (images, patch) -> (batch, tokens, features).
    theta: weight of the loss on kept tokens, 0 for none; beta: where that smooth-L1 loss turns linear.
    decoder_*: its blocks, width (0: half the encoder's) and heads.
    """

    density: float = 0.4
    views: int = 2
    cover: float = 1.0
    block: int = 2
    target: str | Target = "hog"
    theta: float = 1.0
    beta: float = 2.0
    decoder_layers: int = 2
    decoder_width: int = 0
    decoder_heads: int = 4

    def validate(self) -> None:
        target_of(self.target)
        if self.block < 1 or not (isfinite(self.theta) and self.theta >= 0 and isfinite(self.beta) and self.beta > 0):
            asked = f"{self.block}, {self.theta} and {self.beta}"
            raise BadInput(f"block is at least 1, theta finite and at least 0, beta finite and above 0: got {asked}")
        if self.decoder_layers < 1 or self.decoder_width < 0 or self.decoder_heads < 1:
            sizes = (self.decoder_layers, self.decoder_width, self.decoder_heads)
            raise BadInput(f"a decoder has layers and heads of at least 1 and a width of at least 0, got {sizes}")
        _ = self.sampler
        hide, cover = 1 - Fraction(repr(self.density)), Fraction(repr(self.cover))
        if not hide <= cover <= self.views * hide:
            need = f"{ceil(cover / hide)} views" if cover > hide else f"a density of at least {float(1 - cover):g}"
            raise BadInput(f"{self.views} views of density {self.density} cannot cover {self.cover}: it takes {need}")

    @property
    def sampler(self) -> Views:
        """The coupled draw of all views."""
        return Views(self.density, self.views, self.cover, () if self.block == 1 else (self.block, self.block))

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """Masks of all views, (views, batch, *grid), for an x of shape (batch, rows, columns), or (batch, tokens) if `block`
        is 1. Raises BadInput for a grid that `block` does not divide, and one too small for the shares asked."""
        return self.masks(tuple(x.shape), rng or generator(0, "dmjd"))

    def masks(self, shape: tuple[int, ...], rng: torch.Generator) -> Mask:
        """The same for a shape (batch, *grid)."""
        grid, side = shape[1:], self.block
        if side > 1 and (len(grid) != 2 or any(part % side for part in grid)):
            tokens = " x ".join(map(str, grid))
            raise BadInput(
                f"a grid of {tokens} tokens cannot be cut into blocks of {side} x {side}; block=1 hides single ones"
            )
        return self.sampler(shape, rng=rng)

    def rate(self, base: float, images: int) -> float:
        """The paper's learning rate for a batch of so many images (not views): base * images * (pi / rho) / 256."""
        return base * images * self.cover / (1 - self.density) / 256

    def learner(self, backbone: nn.Module, example: Tensor, *, seed: int = 0) -> TokenLearner:
        target = target_of(self.target)
        decoder = decoder_for(
            backbone, example, target,
            width=self.decoder_width, layers=self.decoder_layers, heads=self.decoder_heads, seed=seed,
        )  # fmt: skip
        encoder = encoder_of(backbone)
        grid = (example.shape[-2] // encoder.patch, example.shape[-1] // encoder.patch)
        self.masks((1, *grid), generator(seed))  # refuses a grid that does not fit now, not in the first step
        told, rng = decoder.head.out_features, generator(seed, "distil")
        aside = Distil(encoder.width, told, self.beta, rng=rng) if self.theta else None
        return TokenLearner(backbone, decoder, target, self.masks, aside=aside, theta=self.theta)
