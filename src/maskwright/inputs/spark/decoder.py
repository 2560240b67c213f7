"""SparK's decoder: each scale's empty places get a learned token, then a light U-Net goes up to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.active_maps import Maps
from maskwright.inputs.spark.stages import Stage

Under = Callable[[nn.Module, Mask], AbstractContextManager[None]]


@final
class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@final
class Densify(nn.Module):
    """One scale's map: normed at its active places, filled elsewhere with one learned token, projected to the decoder."""

    def __init__(self, channels: int, width: int, norm: nn.Module, *, coarsest: bool) -> None:
        super().__init__()
        self.norm = norm
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, channels, 1, 1), std=0.02, a=-0.02, b=0.02))
        same, side = coarsest and channels == width, 1 if coarsest else 3
        self.project = nn.Identity() if same else nn.Conv2d(channels, width, side, padding=side // 2)

    def forward(self, x: Tensor, mask: Mask, under: Under) -> Tensor:
        with under(self.norm, mask):
            normed = self.norm(x)
        active = Maps(mask.keep).at(x.shape[2], x.shape[3], x.device).unsqueeze(1)
        return self.project(torch.where(active, normed, self.token))


@final
class Decoder(nn.Module):
    """(maps of the stages, coarsest first; mask) -> (batch, channels, height, width).

    log2(coarsest stride) blocks, each twice as large and half as wide as the one before; a stage's map is added where its
    size comes up. Raises BadInput for a width that cannot be halved that often.
    """

    def __init__(self, stages: Sequence[Stage], channels: int, width: int, *, layer_norm: bool, seed: int) -> None:
        super().__init__()
        coarsest = stages[0].stride
        blocks = coarsest.bit_length() - 1
        if width % coarsest:
            raise BadInput(f"a decoder of width {width} cannot be halved {blocks} times: it needs a multiple of {coarsest}")
        kind = ChannelNorm if layer_norm else nn.BatchNorm2d
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "spark/decoder").initial_seed())
            self.densify = nn.ModuleDict()
            for stage in stages:
                at = (coarsest // stage.stride).bit_length() - 1
                self.densify[str(at)] = Densify(stage.channels, width >> at, kind(stage.channels), coarsest=not at)
            self.blocks = nn.ModuleList(_block(width >> at) for at in range(blocks))
            self.out = nn.Conv2d(width >> blocks, channels, 1)

    def forward(self, maps: Sequence[Tensor], mask: Mask, under: Under) -> Tensor:
        placed = dict(zip(self.densify, maps, strict=True))
        x: Tensor | None = None
        for at, block in enumerate(self.blocks):
            if (name := str(at)) in placed:
                dense = self.densify[name](placed[name], mask, under)
                x = dense if x is None else x + dense
            x = block(x)
        return self.out(x)


def _block(width: int) -> nn.Sequential:
    """Twice the size, half the width."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 4, 2, 1),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        nn.Conv2d(width, width // 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(width // 2),
    )
