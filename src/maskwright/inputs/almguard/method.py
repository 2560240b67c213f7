"""ALMGuard (arXiv 2510.26096): a guard for audio models, one perturbation in the mel bins recognition hardly uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.select import generator, select
from maskwright.inputs.almguard.guard import Guard, Visit, check
from maskwright.inputs.method import InputMethod
from maskwright.inputs.perturbation import Ball

Loss = Callable[[Tensor, int], Tensor]  # features (1, bins, frames) and the clip's number -> a scalar
Utility = Callable[[Tensor, int], Tensor | None]  # the same; None where the recogniser hears nothing


def bin_gradients(loss: Tensor, features: Tensor) -> Tensor:
    """Mean over frames (and batch) of |dloss/dfeatures|: (batch, bins, frames) -> (bins,) float64.

    Weights get no gradient. Raises BadInput for a loss that is no finite scalar or does not depend on the features.
    """
    return _gradient(loss, features).abs().double().mean((0, 2))


@final
@dataclass(frozen=True)
class AlmGuard(InputMethod):
    """score_b = g_safe[b] / (g_use[b] + floor); the best `bins` bins carry one delta, |delta| <= tau, for all clips.

    g_safe, g_use: the mean |gradient| of the safety loss (that of the refusal) and of the recogniser's loss on its own
    transcript, averaged over clips. A defence: delta is trained so that the model refuses what it ought to refuse.

    bins: kept bins, a count. tau: greatest change of a cell, in log-mel units. rate: of Adam, started afresh for each
    clip. steps: most steps of one clip's turn. epochs: turns of each clip. stop: a turn ends when the loss is below it.
    floor: added to the denominator. start: deviation of the first noise. Raises BadInput for settings that make no sense.
    """

    bins: int = 48
    tau: float = 0.5
    rate: float = 3e-4
    steps: int = 3000
    epochs: int = 10
    stop: float = 0.1
    floor: float = 1e-6
    start: float = 0.01

    def validate(self) -> None:
        Ball(self.tau)
        if min(self.bins, self.steps, self.epochs) < 1:
            raise BadInput(f"almguard's bins, steps and epochs are at least 1, got {self.bins, self.steps, self.epochs}")
        if not (0 < self.rate < torch.inf and 0 < self.floor < torch.inf and 0 <= self.start < torch.inf):
            raise BadInput(f"almguard needs rate, floor > 0 and start >= 0, got {self.rate, self.floor, self.start}")
        if not isfinite(self.stop):
            raise BadInput(f"almguard needs a finite stop, got {self.stop}")

    def score(self, safety: Tensor, utility: Tensor) -> Tensor:
        """g_safe / (g_use + floor), (bins,) float64. Raises BadInput for shapes that differ, negative or not finite."""
        if safety.ndim != 1 or safety.shape != utility.shape:
            raise BadInput(f"bin gradients have one shape (bins,), got {tuple(safety.shape)} and {tuple(utility.shape)}")
        both = torch.stack([safety, utility]).double()
        if not bool((both.isfinite() & both.ge(0)).all()):
            raise BadInput(f"bin gradients of shape {tuple(safety.shape)} are finite and at least 0; these are not")
        return both[0] / (both[1] + self.floor)

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """Scores (rows, bins) -> the best `bins` of each row, exactly, ties to the lower bin. Raises BadInput."""
        if x.ndim != 2 or x.shape[1] < self.bins:
            raise BadInput(f"almguard keeps {self.bins} bins by scores (rows, bins), got shape {tuple(x.shape)}")
        return select(x, Unstructured((0,)), self.bins)

    def measure(self, safety: Loss, utility: Utility, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        """(g_safe, g_use, skipped): both (bins,), averaged over the clips that have a transcript.

        Raises BadInput for clips that do not fit each other, losses that are not finite, and no clip with a transcript.
        """
        found, size = [], _bins(clips)
        for number, clip in enumerate(clips):
            x = clip.detach().clone().requires_grad_()
            use = utility(x, number)
            if use is not None:  # the loss of an empty transcript would be NaN
                found.append((bin_gradients(safety(x, number), x), bin_gradients(use, x)))
        if not found:
            raise BadInput(f"none of {len(clips)} clips of {size} bins has a transcript: no gradient of recognition")
        on, off = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
        return on, off, len(clips) - len(found)

    def train(self, safety: Loss, clips: Sequence[Tensor], mask: Mask, *, seed: int = 0) -> tuple[Tensor, tuple[Visit, ...]]:
        """(delta, log). delta: (1, bins, frames), carried from clip to clip. mask: (1, bins). The model is not changed.

        Raises BadInput for a mask or clips that do not fit and for losses or gradients that are not finite.
        """
        size, frames = _bins(clips), clips[0].shape[2]
        if mask.shape != (1, size) or any(clip.shape[2] != frames for clip in clips):
            raise BadInput(f"a mask (1, {size}) and clips of one length are needed, got mask {mask.shape}")
        bins, ball, log = Mask(mask.keep[:, :, None]), Ball(self.tau), []
        noise = torch.randn(1, size, frames, generator=generator(seed, "almguard")) * self.start
        # Differs: projected before the first step; the reference shows the model noise in all bins until then.
        delta = ball.project(noise, bins, features=None).requires_grad_()
        for epoch in range(self.epochs):
            for number, clip in enumerate(clips):
                adam, done = torch.optim.Adam([delta], lr=self.rate), 0
                while True:
                    loss = safety(clip.detach() + delta, number)
                    gradient = _gradient(loss, delta)
                    if loss.item() < self.stop or done == self.steps:
                        break
                    # Masked before Adam, so that its moments of other bins stay 0, and projected after.
                    delta.grad = torch.where(bins.keep, gradient, 0.0)
                    adam.step()
                    with torch.no_grad():
                        delta.copy_(ball.project(delta, bins, features=None))
                    done += 1
                log.append(Visit(epoch, number, done, loss.item()))
        return delta.detach(), tuple(log)

    def guard(self, safety: Loss, utility: Utility, clips: Sequence[Tensor], *, seed: int = 0) -> Guard:
        """All of it: gradients, bins, delta. clips: attacked features (1, bins, frames) of one length. Raises BadInput."""
        on, off, skipped = self.measure(safety, utility, clips)
        mask = self.keep(self.score(on, off)[None])
        delta, log = self.train(safety, clips, mask, seed=seed)
        return Guard(on, off, mask, delta, self.made_by(seed), skipped, log)


def _gradient(loss: Tensor, at: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise BadInput(f"a loss is a tensor of one finite number, got a {type(loss).__name__}")
    if loss.numel() != 1 or not bool(loss.isfinite().all()):
        raise BadInput(f"a loss is one finite number, got shape {tuple(loss.shape)}: {loss.detach().flatten()[:3].tolist()}")
    if not loss.requires_grad:
        raise BadInput(f"the loss does not depend on the features of shape {tuple(at.shape)}")
    (found,) = torch.autograd.grad(loss.sum(), at, allow_unused=True)
    if found is None or not bool(found.isfinite().all()):
        told = "missing" if found is None else "not finite"
        raise BadInput(f"the gradient by features of shape {tuple(at.shape)} is {told}")
    return found


def _bins(clips: Sequence[Tensor]) -> int:
    if not clips:
        raise BadInput("almguard needs at least one clip")
    for clip in clips:
        check(clip, clips[0].shape[1])
        if clip.shape[0] != 1:
            raise BadInput(f"a clip's features have shape (1, bins, frames), got {tuple(clip.shape)}")
    return clips[0].shape[1]
