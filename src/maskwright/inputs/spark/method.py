"""SparK (arXiv 2301.03580): BERT-like pre-training of a convnet that stays sparse in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.method import Pretraining
from maskwright.inputs.patches import sides
from maskwright.inputs.samplers import Exact
from maskwright.inputs.spark.decoder import Decoder
from maskwright.inputs.spark.learner import SparkLearner
from maskwright.inputs.spark.stages import find


@final
@dataclass(frozen=True)
class Spark(Pretraining):
    """Each image keeps whole(density, patches) patches by chance; the convnet's active-only form sees these alone.

    Its maps at several scales, their empty places filled with a learned token each, go up a light U-Net that tells the
    hidden patches' normed pixels. On a zeroed image a dense net would fill the holes from layer to layer, and its
    statistics would be those of holes; here both stay as on a whole image, which is what is fine-tuned on later.
    density: share kept (the paper hides 60%). stages: names of the modules whose maps are decoded; () finds the one that
    ends each resolution, the coarsest four. patch: side of a patch in pixels, 0 for the coarsest map's stride as in the
    paper. width: of the decoder at the coarsest scale, halved with every doubling of the size. hierarchy: False decodes
    the coarsest map alone.
    Differs: any patch size; stages and channels are found by a dry run, not told by the model.
    """

    density: float = 0.4
    stages: tuple[str, ...] = ()
    patch: int = 0
    width: int = 768
    hierarchy: bool = True

    def validate(self) -> None:
        if not 0 < self.density < 1:
            raise BadInput(f"spark keeps a share in (0, 1) of each image, got density {self.density}")
        if self.patch < 0 or self.width < 1:
            raise BadInput(f"spark needs a patch of at least 0 and a width of at least 1, got {self.patch}, {self.width}")
        if isinstance(self.stages, str):
            raise BadInput(f"stages is a tuple of module names, got the text {self.stages!r}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """An exact random mask of x's shape, (batch, rows, columns)."""
        return Exact(self.density)(tuple(x.shape), rng=rng or generator(0, "spark"))

    def learner(self, backbone: nn.Module, example: Tensor, *, seed: int = 0) -> SparkLearner:
        """Raises BadInput also for a density that keeps none or all of the patches, and for what `stages.find` refuses."""
        _, channels, height, width = sides(example, 1)
        if not bool(example.isfinite().all()):
            raise BadInput(f"example images of shape {tuple(example.shape)} are not finite")
        stages = find(backbone, example, self.stages)
        patch = self.patch or stages[0].stride
        for side in (patch, stages[0].stride):
            sides(example, side)
        units = (height // patch) * (width // patch)
        if not 0 < (kept := whole(self.density, units)) < units:
            raise BadInput(f"density {self.density} keeps {kept} of the {units} patches of {patch} x {patch} pixels")
        if not self.hierarchy:
            stages = stages[:1]
        layer_norm = not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        decoder = Decoder(stages, channels, self.width, layer_norm=layer_norm, seed=seed)
        sampler = Exact(self.density)
        return SparkLearner(backbone, stages, decoder, lambda shape, rng: sampler(shape, rng=rng), patch)
