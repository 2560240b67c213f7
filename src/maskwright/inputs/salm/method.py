"""SALM (arXiv 2403.10573): images that cannot be learned from, by error-minimising noise on the pixels that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Block, Unstructured
from maskwright.inputs.method import InputMethod
from maskwright.inputs.perturbation import Ball
from maskwright.inputs.salm.noise import Choose, Noise, View, sgd
from maskwright.inputs.salm.released import Protected
from maskwright.inputs.samplers import salient


@final
@dataclass(frozen=True)
class Salm(InputMethod):
    """min over theta of the mean over i of min over delta_i of CE(f_theta(x_i + delta_i), y_i), delta_i 0 off its mask.

    Both problems minimise: the noise makes an image look learned already, so that a network that is trained on it finds
    nothing to learn. Medical images are mostly empty, and noise is wasted there: only the whole(density, pixels) pixels of
    greatest sensitivity, the channels' sum of |dCE/dx| at x + delta, carry noise. density 1 is plain error-minimising noise
    (EM, arXiv 2101.04898). For the owner of the data, before release.

    density: share of the pixels that may change, of each image. eps: greatest change, of values in [0, 1]. rate: a step of
    the noise, as a share of eps. noise_steps (T), model_steps (M): steps of each in a round. stop: end when the surrogate's
    error on x + delta is below it. rounds: end then at the latest. refresh: choose the masks anew in every n-th round.
    window: pixels are chosen in squares of this side. taylor: score |x dCE/dx|. classwise: one noise and mask a class.
    batch: images in a batch. Raises BadInput for settings that make no sense.
    """

    density: float = 0.2
    eps: float = 8 / 255
    rate: float = 0.1
    noise_steps: int = 20
    model_steps: int = 10
    stop: float = 0.01
    rounds: int = 50
    refresh: int = 1
    window: int = 1
    taylor: bool = False
    classwise: bool = False
    batch: int = 128

    def validate(self) -> None:
        Ball(self.eps)
        if not 0 < self.density <= 1 or not 0 <= self.stop <= 1:
            raise BadInput(f"salm needs density in (0, 1] and stop in [0, 1], got {self.density} and {self.stop}")
        if not self.eps <= 1 or not 0 < self.rate <= 2:
            raise BadInput(f"salm needs eps of at most 1 and rate in (0, 2], got {self.eps} and {self.rate}")
        counts = (self.noise_steps, self.model_steps, self.rounds, self.refresh, self.window, self.batch)
        if min(counts) < 1:
            raise BadInput(f"salm's steps, rounds, refresh, window and batch are at least 1, got {counts}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """The mask by a score (rows, height, width): exactly the best whole(density, pixels) of each, ties to the lower one.

        A score is at least 0, so a pixel that the surrogate does not react to is kept only where no other is left.
        Raises BadInput on NaN, a density that keeps no pixel, and a window that does not divide the image.
        """
        pattern = Block((self.window, self.window), within=(0,)) if self.window > 1 else Unstructured((0,))
        return salient(x, self.density, pattern)

    def start(
        self, images: Tensor, labels: Tensor, surrogate: Callable[[], nn.Module], *, seed: int = 0,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = sgd, augment: View | None = None,
        choose: Choose | None = None,
    ) -> Noise:  # fmt: skip
        """The run as an object: `round()` until `done`, `save` and `load` between rounds, `result()`. See `protect`."""
        return Noise(
            self, images, labels, surrogate, seed, optimizer, augment, choose or (lambda score, rows: self.keep(score))
        )

    def protect(
        self, images: Tensor, labels: Tensor, surrogate: Callable[[], nn.Module], *, seed: int = 0,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = sgd, augment: View | None = None,
        choose: Choose | None = None,
    ) -> Protected:  # fmt: skip
        """Protected images (also as 8 bits), noise, masks and a report.

        images: (n, channels, height, width), uint8 or real in [0, 1]. labels: (n,) whole numbers. surrogate: makes the
        network, (batch, channels, height, width) -> logits; built from `seed`. optimizer: of its parameters (default SGD).
        augment: `augment(x, rng)`, differentiable, laid on x + delta whenever the network sees it, so that the noise is not
        tied to fixed positions. choose: `choose(score, rows) -> Mask` in place of `keep`, for comparisons.
        Raises BadInput for images outside [0, 1], labels that are missing or do not fit, logits that are not finite.
        """
        run = self.start(images, labels, surrogate, seed=seed, optimizer=optimizer, augment=augment, choose=choose)
        while not run.done:
            run.round()
        return run.result()
