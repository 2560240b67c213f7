"""A perturbation that lies only where a mask keeps: projected onto the mask, an eps ball and the value bounds.

What input protections and guards share: they choose where (pixels, mel bins), then descend a loss there. The perturbation
may have one row a sample, or one row for all of a class or all samples; the mask has as many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.apply import _ASK, Features, over


@final
@dataclass(frozen=True)
class Ball:
    """|delta| <= eps everywhere, and low <= x + delta <= high where the data are given.

    Raises BadInput for an eps that is not above 0 and finite, and for bounds in the wrong order.
    """

    eps: float = 8 / 255
    low: float = -inf
    high: float = inf

    def __post_init__(self) -> None:
        if not (isfinite(self.eps) and self.eps > 0) or not self.low < self.high:
            raise BadInput(
                f"a perturbation needs a finite eps above 0 and low < high, got {self.eps}, {self.low}, {self.high}"
            )

    def project(self, delta: Tensor, mask: Mask, x: Tensor | None = None, *, features: Features = _ASK) -> Tensor:
        """The nearest perturbation in the ball that is exactly 0 outside the mask. delta: (rows, ...), as `hide` has data.

        x: data of delta's shape, for which the bounds hold too. Raises BadInput for shapes that do not fit, NaN on kept
        entries, and data outside the bounds (no perturbation of 0 would be allowed).
        """
        keep = over(delta, mask.keep, features)
        least, most = torch.full_like(delta, -self.eps), torch.full_like(delta, self.eps)
        if x is not None:
            if x.shape != delta.shape:
                raise BadInput(f"data of shape {tuple(x.shape)} have a perturbation of shape {tuple(delta.shape)}")
            if not bool(((x >= self.low) & (x <= self.high)).all()):
                raise BadInput(f"data of shape {tuple(x.shape)} leave [{self.low:g}, {self.high:g}] or are NaN")
            least, most = least.maximum(self.low - x), most.minimum(self.high - x)
        inside = torch.where(keep, delta.maximum(least).minimum(most), delta.new_zeros(()))
        if bool(inside.isnan().any()):
            raise BadInput(f"a perturbation of shape {tuple(delta.shape)} is NaN where the mask keeps")
        return inside

    def descend(
        self, delta: Tensor, gradient: Tensor, mask: Mask, size: float, x: Tensor | None = None, *, features: Features = _ASK
    ) -> Tensor:
        """project(delta - size * sign(gradient)): one step of sign descent inside the mask; a negative size ascends.

        Where the gradient is exactly 0 nothing moves. Raises BadInput as `project` does.
        """
        if gradient.shape != delta.shape:
            raise BadInput(f"a gradient of shape {tuple(gradient.shape)} has a perturbation of shape {tuple(delta.shape)}")
        # torch.sign(NaN) is 0: by hand, so that a NaN is refused and not a silent stop.
        moved = torch.where(gradient.isnan(), gradient, delta - size * gradient.sign())
        return self.project(moved, mask, x, features=features)
