"""A thresholded score per weight, in the slot where core's gates live: scores train, weights stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Thresholded(torch.autograd.Function):
    """Forward w where its score is above the threshold, exactly 0 elsewhere (where, not a product: 0 * inf is NaN).

    Backward is straight through the step: dL/dM = w dL/dw' for every entry, dropped ones too, in the scores' dtype.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        keep = scores > threshold
        ctx.save_for_backward(weight, keep)
        ctx.dtype = scores.dtype
        return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, keep = ctx.saved_tensors
        to_weight, to_scores, _ = ctx.needs_input_grad
        return (
            torch.where(keep, grads[0], 0) if to_weight else None,
            weight.to(ctx.dtype) * grads[0].to(ctx.dtype) if to_scores else None,
            None,
        )


@dataclass(eq=False)
class ScoreGate:
    """Scores of a weight's shape and their threshold; stands where core's gates stand (`core.gate.gated`).

    `open`: let every weight through, for the teacher's forward.
    """

    scores: nn.Parameter
    threshold: float
    open: bool = False

    @staticmethod
    def of(weight: Tensor, init: float, threshold: float) -> ScoreGate:
        """All scores `init`, in float32 for half-precision weights too: bfloat16 would lose steps of 8e-5 on 0.01."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return ScoreGate(nn.Parameter(torch.full_like(weight, init, dtype=dtype)), threshold)

    @property
    def keep(self) -> Tensor:
        """Strictly above the threshold: a score that lies on it is off."""
        return self.scores.detach() > self.threshold

    def apply(self, weight: Tensor, keep: Tensor) -> Tensor:
        """What forward sees. `keep` is the slot's own mask, all True."""
        return weight if self.open else _Thresholded.apply(weight, self.scores, self.threshold)
