"""Penalties that are l1 at 0 and bend flat: CEL0, MCP, SCAD. Small entries fall to 0, large ones lose nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.inputs.thresholded import Proximal, strength


def _firm_penalty(x: Tensor, lam: float | Tensor, bend: float | Tensor) -> Tensor:
    size = x.detach().abs()
    small = lam * size - size * size / (2 * bend)
    return torch.where(size < bend * lam, small, size.new_ones(()) * (bend * lam * lam / 2))


def _firm(u: Tensor, lam: float | Tensor, bend: float | Tensor, step: float) -> Tensor:
    """lam |x| bent flat at bend * lam: 0 up to step * lam, then a line of slope 1 / (1 - step / bend) up to identity.

    From step = bend on the line is a jump. Both forms for numbers and for one (lam, bend) a column.
    """
    size = u.abs()
    if not isinstance(bend, Tensor):
        if step >= bend:
            return F.hardshrink(u, float(lam) * sqrt(step * bend))
        return torch.copysign(torch.minimum(size, (size - step * lam).clamp(min=0) / (1 - step / bend)), u)
    line = torch.minimum(size, (size - step * lam).clamp(min=0) / (1 - step / bend).clamp(min=1e-30))
    jump = torch.where(size > lam * (step * bend).sqrt(), size, size.new_zeros(()))
    return torch.copysign(torch.where(bend > step, line, jump), u)


@final
@dataclass(frozen=True, eq=False)
class Cel0(Proximal):
    """The continuous exact relaxation of l0 for columns of length `norm` (Soubies, Blanc-Feraud, Aubert 2015).

    penalty = lam - norm^2 / 2 (|x| - sqrt(2 lam) / norm)^2 up to |x| = sqrt(2 lam) / norm, lam above: the same best
    solutions as l0 for 1/2 |y - D x|^2, fewer local ones. `norm`: a number, or one a column (last dim of the entries).
    """

    lam: float = 0.5
    norm: float | Tensor = 1.0

    def __post_init__(self) -> None:
        strength(self.lam)
        norms = torch.as_tensor(self.norm)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise BadInput(f"CEL0 needs column norms above 0, got {float(norms.min())}..{float(norms.max())}")

    def penalty(self, x: Tensor) -> Tensor:
        return _firm_penalty(x, sqrt(2 * self.lam) * self.norm, 1 / self.norm**2)

    def shrink(self, u: Tensor, step: float) -> Tensor:
        return _firm(u, sqrt(2 * self.lam) * self.norm, 1 / self.norm**2, step)


@final
@dataclass(frozen=True)
class Mcp(Proximal):
    """The minimax concave penalty: l1 at 0, flat from |x| = bend * lam on (firm thresholding)."""

    lam: float = 0.5
    bend: float = 3.0

    def __post_init__(self) -> None:
        strength(self.lam)
        if not (isfinite(self.bend) and self.bend > 0):
            raise BadInput(f"MCP needs a bend above 0, got {self.bend}")

    def penalty(self, x: Tensor) -> Tensor:
        return _firm_penalty(x, self.lam, self.bend)

    def shrink(self, u: Tensor, step: float) -> Tensor:
        return _firm(u, self.lam, self.bend, step)


@final
@dataclass(frozen=True)
class Scad(Proximal):
    """Smoothly clipped absolute deviation (Fan and Li 2001): l1 up to lam, flat from |x| = bend * lam on."""

    lam: float = 0.5
    bend: float = 3.7

    def __post_init__(self) -> None:
        strength(self.lam)
        if not (isfinite(self.bend) and self.bend > 2):
            raise BadInput(f"SCAD needs a bend above 2, got {self.bend}")

    def penalty(self, x: Tensor) -> Tensor:
        size, lam, bend = x.detach().abs(), self.lam, self.bend
        curve = (2 * bend * lam * size - size * size - lam * lam) / (2 * (bend - 1))
        flat = torch.where(size > bend * lam, size.new_tensor(lam * lam * (bend + 1) / 2), curve)
        return torch.where(size > lam, flat, lam * size)

    def shrink(self, u: Tensor, step: float) -> Tensor:
        size, lam, bend = u.abs(), self.lam, self.bend
        soft = F.softshrink(u, step * lam)
        if step < bend - 1:
            line = torch.copysign(((bend - 1) * size - bend * lam * step) / (bend - 1 - step), u)
            return torch.where(size > bend * lam, u, torch.where(size > (1 + step) * lam, line, soft))
        # The middle is concave now: the best of the soft value and u itself, or of 0 and u.
        jump = lam * ((bend + 1 + step) / 2 if step < bend + 1 else sqrt(step * (bend + 1)))
        return torch.where(size > jump, u, soft if step < bend + 1 else torch.zeros_like(u))
