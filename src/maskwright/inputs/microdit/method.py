"""Micro-diffusion (arXiv 2407.15811): a diffusion transformer trained on a quarter of its tokens, masked late."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.method import InputMethod
from maskwright.inputs.microdit.build import Parts, scaled
from maskwright.inputs.microdit.conditions import Captions, Classes
from maskwright.inputs.microdit.deferred import DeferredMask
from maskwright.inputs.microdit.dit import Bridge, DiT, Last
from maskwright.inputs.microdit.edm import Denoiser, Noise
from maskwright.inputs.samplers import Exact


@final
@dataclass(frozen=True)
class MicroDit(InputMethod):
    """A light mixer sees all patches, then three in four are dropped, then the backbone sees the rest (2407.15811).

    What is kept has heard of what is dropped, so the loss on kept patches alone teaches the whole image. The defaults are
    the paper's XL/2 at 256 pixels; width 512, depth 16, head 32, mixer_depth 4, mixer_width 512 is its Tiny/2. mixer_depth
    0 is naive masking. attention_scale, ffn_scale: multipliers of the first and the last backbone block, linear between.
    experts, capacity, every: every `every`-th block but the last is expert choice (experts 0: none). drop: share of
    conditions dropped for guidance. Raises BadInput for settings out of range and widths that `head` does not divide.
    """

    density: float = 0.25
    patch: int = 2
    width: int = 1024
    depth: int = 28
    head: int = 64
    mixer_depth: int = 6
    mixer_width: int = 768
    mixer_ffn: float = 4.0
    attention_scale: tuple[float, float] = (0.5, 1.0)
    ffn_scale: tuple[float, float] = (0.5, 4.0)
    multiple: int = 256
    experts: int = 8
    capacity: float = 2.0
    every: int = 2
    p_mean: float = -0.6
    p_std: float = 1.2
    sigma_data: float = 0.9
    drop: float = 0.1

    def validate(self) -> None:
        Exact(self.density)
        least = {"patch": 1, "width": 4, "depth": 1, "head": 1, "mixer_depth": 0, "multiple": 1, "experts": 0, "every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"microdit: {name} is at least {low}, got {getattr(self, name)}")
        scales = (*self.attention_scale, *self.ffn_scale, self.mixer_ffn, self.capacity, self.sigma_data)
        if not all(0 < value < inf for value in scales) or not 0 <= self.p_std < inf or not -inf < self.p_mean < inf:
            raise BadInput("microdit: scales, capacity and sigma_data are above 0, p_std at least 0, all finite")
        if not 0 <= self.drop < 1:
            raise BadInput(f"microdit: drop is a share in [0, 1), got {self.drop}")
        for width in (self.width, self.mixer_width) if self.mixer_depth else (self.width,):
            if width % self.head:
                raise BadInput(f"microdit: a width of {width} is no multiple of the head width {self.head}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """Which tokens of x, (batch, *grid), stay: whole(density, tokens) of each sample. Raises BadInput without rng."""
        if rng is None:
            raise BadInput("microdit draws its mask: give a generator (rng)")
        return Exact(self.density)(tuple(x.shape), rng=rng)

    def denoiser(
        self, shape: tuple[int, int, int], *, classes: int = 0, captions: int = 0, interpolation: float = 1.0, seed: int = 0
    ) -> Denoiser:
        """A fresh model for images or latents of `shape` = (channels, height, width), already scaled to sigma_data.

        classes: their number, or captions: the width of a text encoder's tokens. interpolation: 2 for 512 pixels after
        256. Raises BadInput unless exactly one of the two is given, and for a patch that does not divide the image.
        """
        if (classes > 0) == (captions > 0):
            raise BadInput(f"microdit conditions on classes or on captions, got classes={classes}, captions={captions}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conditioner = (
                Classes(classes, self.width) if classes else Captions(captions, self.width, self.head, self.multiple)
            )
            trunk = self.trunk(shape[0] * self.patch**2, crossed=captions > 0)
            net = DiT(shape, self.patch, self.width, conditioner, trunk, interpolation=interpolation)
        return Denoiser(net, Noise(self.p_mean, self.p_std, self.sigma_data), self.drop)

    def trunk(self, outputs: int, *, crossed: bool = False) -> DeferredMask:
        """Mixer, mask and backbone: tokens (batch, tokens, width) -> (batch, tokens, outputs). crossed: with captions."""
        parts = Parts(self.head, self.multiple, self.width, crossed, self.experts, self.capacity, self.every)
        mixed, inside, ffn = self.mixer_depth, scaled(self.attention_scale, self.depth), scaled(self.ffn_scale, self.depth)
        even, own = [0.02 / (2 * self.depth) ** 0.5] * mixed, scaled((self.mixer_ffn, self.mixer_ffn), mixed)
        mixer = [*parts.blocks(self.mixer_width, [Fraction(1)] * mixed, own, even, mixed)]
        deeper = [0.02 / (2 * (layer + 1)) ** 0.5 for layer in range(self.depth)]
        backbone = [*parts.blocks(self.width, inside, ffn, deeper, self.depth - 1), Last(self.width, outputs)]
        if not mixed or self.mixer_width == self.width:
            return DeferredMask(mixer, backbone, self.density)
        # The way back to the backbone's width lies behind the mask, where fewer tokens go.
        into, back = Bridge(self.width, self.mixer_width), Bridge(self.mixer_width, self.width)
        return DeferredMask([into, *mixer], [back, *backbone], self.density)
