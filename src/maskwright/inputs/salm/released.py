"""What SALM gives: the protected images, as real values and as 8 bits, with their noise, masks and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, inf, log10
from typing import final

import torch
from torch import Tensor

from maskwright.core.mask import Mask

_BATCH = 256


@final
@dataclass(frozen=True, eq=False)
class Protected:
    """What a run gives. The noise of image i is `delta[row[i]]`: a row an image, or a row a class.

    clean: the images as given. delta: (rows, channels, height, width), exactly 0 outside `mask` (rows, height, width).
    error: the surrogate's on x + delta, after `rounds`.
    """

    clean: Tensor
    delta: Tensor
    mask: Mask
    row: Tensor
    eps: float
    rounds: int
    error: float

    @property
    def levels(self) -> int:
        """Steps of 1/255 that an 8-bit value may move at most."""
        return floor(self.eps * 255 + 1e-9)  # as binary fractions, 8/255 of 255 may be less than 8

    @property
    def images(self) -> Tensor:
        """(n, channels, height, width) real in [0, 1]."""
        return noisy(unit(self.clean), self.delta[self.row])

    @property
    def images8(self) -> Tensor:
        """The same as uint8: no value is more than `levels` from the clean image's, none changes outside the mask."""
        return torch.cat([after for _, after in self.pairs()])

    def pairs(self, batch: int = _BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """(clean, protected) as uint8, some images at a time."""
        for index in torch.arange(len(self.clean)).split(batch):
            delta = self.delta[self.row[index]]
            yield tuple(eight_bits(self.clean[index], noise, self.levels) for noise in (torch.zeros_like(delta), delta))  # type: ignore[misc]

    def report(self) -> dict[str, float]:
        """Figures of the 8-bit images.

        nominal: share of pixels in the masks. changed: share of pixels with another value (clipping at black and white
        makes it less). l2: mean norm of an image's noise, in units of [0, 1]. psnr: in dB. greatest: change of a value,
        in steps of 1/255. error, rounds: as above.
        """
        changed, greatest, squares, norms = 0, 0, 0.0, 0.0
        for before, after in self.pairs():
            step = after.double() - before.double()
            changed += int((step != 0).any(1).sum())
            greatest = max(greatest, int(step.abs().max()))
            square = (step / 255).square().flatten(1).sum(1)
            squares, norms = squares + float(square.sum()), norms + float(square.sqrt().sum())
        return {
            "nominal": self.mask.density, "changed": changed / self.clean[:, 0].numel(), "l2": norms / len(self.clean),
            "psnr": -10 * log10(squares / self.clean.numel()) if squares else inf, "greatest": float(greatest),
            "error": self.error, "rounds": float(self.rounds),
        }  # fmt: skip


def unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def noisy(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in [0, 1]."""
    return (x + delta).clamp(0, 1)


def eight_bits(clean: Tensor, delta: Tensor, levels: int) -> Tensor:
    """The 8-bit image: the noise is rounded, not the sum, so that what has none keeps its value to the bit."""
    x = unit(clean)
    steps = ((noisy(x, delta) - x) * 255).round().clamp(-levels, levels)
    base = clean.float() if clean.dtype == torch.uint8 else (x * 255).round()
    return (base + steps).clamp(0, 255).to(torch.uint8)
