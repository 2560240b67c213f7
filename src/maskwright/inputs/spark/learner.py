"""A convnet with SparK's decoder: it sees the kept patches only, and tells the hidden ones' pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.mask import Mask
from maskwright.inputs.active import active
from maskwright.inputs.apply import hide, masked_loss
from maskwright.inputs.method import Learner, Shown
from maskwright.inputs.patches import patches, sides
from maskwright.inputs.spark.decoder import Decoder, Under
from maskwright.inputs.spark.stages import Stage, captured, still
from maskwright.inputs.targets import made, normalised, painted

Draw = Callable[[tuple[int, int, int], torch.Generator], Mask]


@final
class SparkLearner(Learner):
    """draw((batch, rows, columns), rng) gives the mask over patches of `patch` x `patch` pixels.

    under(module, mask): the context in which the backbone and the norms run; `active`, unless a comparison needs another.
    """

    def __init__(
        self, backbone: nn.Module, stages: Sequence[Stage], decoder: Decoder, draw: Draw, patch: int, under: Under = active
    ) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.stages, self.draw, self.patch, self.under = tuple(stages), draw, patch, under

    def loss(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Mean squared error over the hidden patches, each normed by its own mean and deviation.

        Raises BadInput for images that do not fit or are not finite, and what `active` refuses.
        """
        mask = self.mask(images, rng)
        target = made(normalised, images, self.patch)
        return masked_loss(self.told(images, mask), target, Mask(~mask.keep.flatten(1)))

    def maps(self, images: Tensor, mask: Mask) -> list[Tensor]:
        """The stages' maps of the kept patches, coarsest first; 0 where a place is not active."""
        with self.under(self.backbone, mask), captured(self.backbone, self.stages) as found:
            self.backbone(hide(images, mask))
        return [found[stage.name] for stage in self.stages]

    def told(self, images: Tensor, mask: Mask) -> Tensor:
        """What is told of every patch. (batch, patches, channels * patch * patch), normed pixels."""
        return patches(self.decoder(self.maps(images, mask), mask, self.under), self.patch)

    def features(self, images: Tensor) -> Tensor:
        """The mean over space of the coarsest map of whole images, in eval mode, through the plain dense net."""
        with still(self.backbone), captured(self.backbone, self.stages[:1]) as found:
            self.backbone(images)
        return found[self.stages[0].name].mean((2, 3))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, rng: torch.Generator) -> Shown:
        mask = self.mask(images, rng)
        with still(self):
            told = self.told(images, mask)
        grey = images.mean((0, 2, 3), keepdim=True)
        return Shown(images, hide(images, mask, grey), painted(images, mask, told, normalised, self.patch))

    def mask(self, images: Tensor, rng: torch.Generator) -> Mask:
        """A mask for these images. (batch, rows, columns) of patches."""
        sides(images, self.stages[0].stride)
        batch, _, height, width = sides(images, self.patch)
        return self.draw((batch, height // self.patch, width // self.patch), rng).to(images.device)
