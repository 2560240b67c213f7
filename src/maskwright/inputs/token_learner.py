"""Masked modelling over tokens: the encoder runs on what is kept, a decoder tells what is hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.apply import hide, masked_loss
from maskwright.inputs.method import Learner, Shown
from maskwright.inputs.patches import sides
from maskwright.inputs.targets import Target, made, painted
from maskwright.inputs.vit import Decoder, TokenEncoder, encode, encoder_of

Draw = Callable[[tuple[int, int, int], torch.Generator], Mask]
Aside = Callable[[Tensor, Tensor], Tensor]  # kept tokens (n, kept, width), their targets -> a loss


@dataclass(frozen=True, eq=False)
class Parts:
    """A step's losses and what it hid. masked: on hidden tokens; visible: on kept ones (None without that branch).

    mask: (views * batch, rows, columns), all of view 1 first.
    """

    masked: Tensor
    visible: Tensor | None
    mask: Mask


@final
class TokenLearner(Learner):
    """A ViT-like backbone with a decoder that tells every hidden token's target, seen from the kept tokens alone.

    draw((batch, rows, columns), rng) gives the mask, (batch, rows, columns), or (views, batch, rows, columns) for several
    views of each image in one step. aside: a module that gives a second loss from kept tokens and their targets, in the
    same order; it counts `theta` times. Every step's compute falls with the density: only kept tokens enter the blocks.
    """

    def __init__(
        self, backbone: nn.Module, decoder: Decoder, target: Target, draw: Draw, *, aside: nn.Module | None = None,
        theta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.decoder, self.aside = backbone, decoder, aside
        self.target, self.draw, self.theta = target, draw, theta

    @property
    def encoder(self) -> TokenEncoder:
        """The backbone's steps; not an attribute, so that its parameters are registered once."""
        return encoder_of(self.backbone)

    def parts(self, images: Tensor, rng: torch.Generator) -> Parts:
        """Both branches' losses of one batch and the masks they came from. Raises BadInput as `loss` does."""
        encoder = self.encoder
        mask = self._masks(images, rng)
        views = len(mask.keep) // len(images)
        target = made(self.target, images, encoder.patch).repeat(views, 1, 1)
        seen = encode(encoder, encoder.embed(images).repeat(views, 1, 1), mask)
        hidden = Mask(~mask.keep.flatten(1))
        masked = masked_loss(self.decoder(seen), target, hidden)
        if self.aside is None:
            return Parts(masked, None, mask)
        # Targets are gathered by the index that took the tokens out: each prediction meets its own token's target.
        own = target.gather(1, seen.index.unsqueeze(-1).expand(-1, -1, target.shape[2]))
        return Parts(masked, self.aside(seen.values, own), mask)

    def loss(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """masked + theta * visible. Raises BadInput for images that do not fit or are NaN, and a mask that hides nothing."""
        parts = self.parts(images, rng)
        return parts.masked if parts.visible is None else parts.masked + self.theta * parts.visible

    def features(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        return encoder.norm(encoder.blocks(encoder.embed(images))).mean(1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, rng: torch.Generator) -> Shown:
        """The first view. Where the target does not say pixels, see `targets.painted`."""
        encoder = self.encoder
        mask = Mask(self._masks(images, rng).keep[: len(images)])
        told = self.decoder(encode(encoder, encoder.embed(images), mask))
        grey = images.mean((0, 2, 3), keepdim=True)
        return Shown(images, hide(images, mask, grey), painted(images, mask, told, self.target, encoder.patch))

    def _masks(self, images: Tensor, rng: torch.Generator) -> Mask:
        batch, _, height, width = sides(images, self.encoder.patch)
        grid = (height // self.encoder.patch, width // self.encoder.patch)
        keep = self.draw((batch, *grid), rng).keep
        if keep.shape[-3:] != (batch, *grid):
            raise BadInput(
                f"the mask drawn for {batch} images of {grid[0]} x {grid[1]} tokens has shape {tuple(keep.shape)}"
            )
        return Mask(keep.reshape(-1, *grid).to(images.device))


def decoder_for(
    backbone: nn.Module, example: Tensor, target: Target, *, width: int, layers: int, heads: int, seed: int
) -> Decoder:
    """The decoder that fits a backbone, images like `example` and a target. width 0: half the encoder's.

    Raises BadInput for a backbone that cannot run on a part of its tokens, and sizes that do not fit.
    """
    encoder = encoder_of(backbone)
    _, _, tall, wide = sides(example, encoder.patch)
    with torch.no_grad():
        encoder.embed(example)  # refuses images of another size now, not in the first step
    outputs = made(target, example, encoder.patch).shape[2]
    grid = (tall // encoder.patch, wide // encoder.patch)
    rng = generator(seed, "decoder")
    return Decoder(encoder.width, outputs, grid, width=width or encoder.width // 2, layers=layers, heads=heads, rng=rng)
