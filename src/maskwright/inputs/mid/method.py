"""MID: hide most pixels of a noisy image, let a network fill in and denoise at once, learn the noise from what is left.

(Chihaoui and Favaro 2025, arXiv 2503.21377; read: its abstract. What is not in it is a reconstruction, see README.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.method import InputMethod
from maskwright.inputs.mid.rounds import Rounds
from maskwright.inputs.samplers import Bernoulli


@final
@dataclass(frozen=True)
class Mid(InputMethod):
    """Settings; `density` is the share of pixels the network sees (1 - rho). Values and sigmas in the images' own units.

    Raises BadInput for values outside the ranges in the README.
    """

    density: float = 0.25
    rounds: int = 3
    steps: int = 1000
    batch: int = 32
    patch: int = 32
    rate: float = 1e-3
    low: float = 5 / 255
    high: float = 50 / 255
    masks: int = 10
    floor: float = 1e-4

    def validate(self) -> None:
        """Raise BadInput for settings that make no sense."""
        Bernoulli(self.density)
        for name in ("rounds", "steps", "batch", "patch", "masks"):
            if getattr(self, name) < 1:
                raise BadInput(f"MID needs {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.low <= self.high < float("inf") or not 0 < self.rate < float("inf") or not 0 < self.floor:
            told = f"low {self.low}, high {self.high}, rate {self.rate}, floor {self.floor}"
            raise BadInput(f"MID needs 0 < low <= high, rate above 0 and floor above 0, got {told}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """The pixels seen: each with probability `density`, by itself, anew for each sample. x: (batch, rows, columns)."""
        if rng is None:
            raise BadInput("MID draws its masks: give rng")
        return Bernoulli(self.density)(tuple(x.shape), rng=rng)

    def start(self, clean: Tensor, noisy: Tensor, build: Callable[[int, int], nn.Module], *, seed: int = 0) -> Rounds:
        """The run on unpaired images (n, channels, rows, columns), before its first round.

        `build(inputs, outputs)` makes the network: inputs = channels + 1 (the mask is the last one), outputs = channels.
        Raises BadInput for images that do not fit each other or are NaN.
        """
        return Rounds(self, clean, noisy, build, seed)
