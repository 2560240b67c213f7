"""Images with a faint texture inside an organ on black: the regime in which error-minimising noise works at small scale.

Rules: 20 x 20 grey pixels of 8 bits. An ellipse of 160 pixels' area, its long half axis drawn from 7 to 8.5 and turned at
random, its middle up to one pixel from the image's; outside it the image is exactly 0 (about 60%). Inside: 0.5, plus white
noise blurred over 5 x 5 pixels and scaled to a deviation of 0.08, plus a grating of amplitude 0.22, wavelength 4 pixels,
random phase, under a Gaussian window of deviation 2 pixels whose middle lies anywhere in the inner half of the ellipse.
The class is the grating's direction, one of six, 30 degrees apart; classes take turns.
"""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.select import generator

SIDE, CLASSES = 20, 6


def faint_textures(n: int, seed: int, *, amplitude: float = 0.22) -> tuple[Tensor, Tensor]:
    """`n` images (n, 1, 20, 20) uint8 and their classes (n,) int64."""
    rng = generator(seed, "faint textures")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=rng)

    labels = torch.arange(n) % CLASSES
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    x, y = columns - SIDE / 2 - uniform(-1, 1), rows - SIDE / 2 - uniform(-1, 1)
    long, turn = uniform(7, 8.5), uniform(0, pi)
    short = 160 / (pi * long)
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    organ = (u / long).square() + (v / short).square() <= 1
    noise = F.avg_pool2d(torch.randn(n, 1, SIDE + 4, SIDE + 4, generator=rng), 5, 1)[:, 0] * 5 * 0.08
    far, angle = uniform(0, 1).sqrt() / 2, uniform(0, 2 * pi)  # a place in the inner half, in the ellipse's own axes
    window = torch.exp(-((u - far * long * angle.cos()).square() + (v - far * short * angle.sin()).square()) / 8)
    way = (labels * pi / CLASSES)[:, None, None]
    wave = torch.sin((x * way.cos() + y * way.sin()) * 2 * pi / 4 + uniform(0, 2 * pi))
    image = torch.where(organ, 0.5 + noise + amplitude * window * wave, torch.zeros(()))
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).unsqueeze(1), labels
