"""What a proximal operator is: a penalty, and the threshold that it makes, as value and mask at once.

prox(u, step) = argmin_x 1/2 (x - u)^2 + step * penalty(x), entry by entry. What falls to 0 is what the mask drops. The step
is part of the threshold: at step 1 the operator is the papers' bare threshold. Where two x are equally good, the smaller
size is taken, so a value at the threshold is dropped. Papers that minimise (x - u)^2 without the 1/2 have twice our lam.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Thresholded:
    """What an operator makes of a tensor: `value`, and the `mask` of what is not 0."""

    value: Tensor
    mask: Mask


class Proximal(ABC):
    """A penalty with its operator. Final subclasses are frozen dataclasses that check their settings when made."""

    @abstractmethod
    def penalty(self, x: Tensor) -> Tensor:
        """The penalty of each entry, same shape. Detached: its slope at 0 is infinite for some; train through `prox`."""

    @abstractmethod
    def shrink(self, u: Tensor, step: float) -> Tensor:
        """The values alone, with nothing checked: for inner loops."""

    def prox(self, u: Tensor, step: float = 1.0) -> Thresholded:
        """Value and mask (True = not 0) of the shape and dtype of `u`; half precision is worked out in float32.

        Raises BadInput for a step that is not above 0, for entries that are not finite and for what holds no reals.
        """
        if not (isfinite(step) and step > 0):
            raise BadInput(f"a proximal operator needs a step above 0, got {step}")
        if not u.dtype.is_floating_point or not bool(torch.isfinite(u).all()):
            raise BadInput(f"a proximal operator takes finite real entries, got {u.dtype} of shape {tuple(u.shape)}")
        wide = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
        value = self.shrink(wide, step).to(u.dtype) + 0.0  # -0.0 becomes 0.0
        return Thresholded(value, Mask(value.detach() != 0))


def strength(lam: float) -> None:
    """Raise BadInput for a lam that is no strength of a penalty."""
    if not (isfinite(lam) and lam >= 0):
        raise BadInput(f"a penalty needs a finite lam of 0 or more, got {lam}")
