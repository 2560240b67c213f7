"""The catalogue of proximal operators: soft, hard, l_q, half, top-k, the bent ones (`bent.py`), and all of them for x >= 0.

What they share, and the conventions, stand in `thresholded.py`. They serve codes, weights, deltas and gradients alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import pi, sqrt
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.pattern import Pattern, Unstructured
from maskwright.core.select import select
from maskwright.inputs.bent import Cel0, Mcp, Scad
from maskwright.inputs.thresholded import Proximal, strength

_ANY = Unstructured()
_ROUNDS = 60  # of the fixed point of l_q, whose error at least halves in each


@final
@dataclass(frozen=True)
class L1(Proximal):
    """l1: lam |x|. Sizes above step * lam stay, all made smaller by it: the bias the others avoid."""

    lam: float = 0.5

    def __post_init__(self) -> None:
        strength(self.lam)

    def penalty(self, x: Tensor) -> Tensor:
        return self.lam * x.detach().abs()

    def shrink(self, u: Tensor, step: float) -> Tensor:
        return F.softshrink(u, step * self.lam)


@final
@dataclass(frozen=True)
class L0(Proximal):
    """l0: lam for each entry that is not 0. Sizes above sqrt(2 step lam) stay as they are."""

    lam: float = 0.5

    def __post_init__(self) -> None:
        strength(self.lam)

    def penalty(self, x: Tensor) -> Tensor:
        return self.lam * (x.detach() != 0).to(x.dtype)

    def shrink(self, u: Tensor, step: float) -> Tensor:
        return F.hardshrink(u, sqrt(2 * step * self.lam))


def _jumped(u: Tensor, threshold: float, above: Callable[[Tensor], Tensor]) -> Tensor:
    """0 up to the threshold, sign(u) * above(|u|) past it. `above` is asked for those only: elsewhere it has no value."""
    alive = u.abs() > threshold
    live = u[alive]
    return torch.zeros_like(u).masked_scatter(alive, torch.copysign(above(live.abs()), live))


@final
@dataclass(frozen=True)
class Lq(Proximal):
    """lam |x|^q with 0 < q < 1, by a fixed point; the value jumps at the threshold. q = 2/3 and 1/2 are the known ones."""

    lam: float = 0.5
    q: float = 2 / 3

    def __post_init__(self) -> None:
        strength(self.lam)
        if not 0 < self.q < 1:
            raise BadInput(f"l_q needs q between 0 and 1, got {self.q}")

    def penalty(self, x: Tensor) -> Tensor:
        return self.lam * x.detach().abs() ** self.q

    def shrink(self, u: Tensor, step: float) -> Tensor:
        if not self.lam:
            return u
        # In units of the value jumped to, beta = (2 w (1 - q))^(1 / (2 - q)), the equation is free of w: t + c t^(q-1) = y.
        beta, c = (2 * step * self.lam * (1 - self.q)) ** (1 / (2 - self.q)), self.q / (2 * (1 - self.q))

        def above(size: Tensor) -> Tensor:
            y = size / beta
            t = y
            for _ in range(_ROUNDS):
                last, t = t, y - c * t ** (self.q - 1)
                if torch.equal(last, t):
                    break
            return size - beta * c * t ** (self.q - 1)

        return _jumped(u, beta * (1 + c), above)


@final
@dataclass(frozen=True)
class LHalf(Proximal):
    """lam |x|^(1/2) in closed form (Xu et al. 2012): 0 up to |u| = 1.5 (step lam)^(2/3), 2/3 of |u| there and more above."""

    lam: float = 0.5

    def __post_init__(self) -> None:
        strength(self.lam)

    def penalty(self, x: Tensor) -> Tensor:
        return self.lam * x.detach().abs().sqrt()

    def shrink(self, u: Tensor, step: float) -> Tensor:
        if not self.lam:
            return u
        threshold = 1.5 * (step * self.lam) ** (2 / 3)

        def above(size: Tensor) -> Tensor:
            phi = ((size / threshold) ** -1.5 / sqrt(2)).acos()
            return torch.minimum(size, size * (2 / 3) * (1 + (2 * pi / 3 - 2 / 3 * phi).cos()))

        return _jumped(u, threshold, above)


@final
@dataclass(frozen=True)
class TopK(Proximal):
    """At most `count` units other than 0 in each group of `pattern`: the nearest such tensor. The step plays no part."""

    count: int | None = None
    pattern: Pattern = _ANY

    def __post_init__(self) -> None:
        if self.count is None and self.pattern.fixed is None:
            raise BadInput(f"{self.pattern} does not say how many units stay: give a count")
        if self.count is not None and self.count < 0:
            raise BadInput(f"top-k needs a count of 0 or more, got {self.count}")

    def penalty(self, x: Tensor) -> Tensor:
        over = (x.detach() != 0) & (self.shrink(x.detach(), 1.0) == 0)
        return torch.where(over, torch.inf, x.new_zeros(()))

    def shrink(self, u: Tensor, step: float) -> Tensor:
        size = u.detach().double().abs()
        # Squares: a unit of several entries is as near as their sum of squares. Over the largest, so that none overflows.
        score = (size / size.amax().clamp(min=1e-300)).square() if size.numel() else size
        return torch.where(select(score, self.pattern, self.count).keep, u, u.new_zeros(()))


@final
@dataclass(frozen=True)
class NonNegative(Proximal):
    """Another penalty with x >= 0 on top: what is below 0 falls to 0 first."""

    inner: Proximal

    def penalty(self, x: Tensor) -> Tensor:
        return torch.where(x.detach() < 0, torch.inf, self.inner.penalty(x))

    def shrink(self, u: Tensor, step: float) -> Tensor:
        return self.inner.shrink(u.clamp(min=0), step)


CATALOGUE: Mapping[str, Callable[..., Proximal]] = {
    "l1": L1,
    "l0": L0,
    "cel0": Cel0,
    "mcp": Mcp,
    "scad": Scad,
    "l_half": LHalf,
    "l_two_thirds": partial(Lq, q=2 / 3),
    "lq": Lq,
    "top_k": TopK,
}


def penalty(name: str, *, non_negative: bool = False, **settings: object) -> Proximal:
    """An operator by its name in CATALOGUE. Raises BadInput for an unknown name or setting, naming the known ones."""
    if name not in CATALOGUE:
        raise BadInput(f"no penalty {name!r}; known: {', '.join(CATALOGUE)}")
    try:
        made = CATALOGUE[name](**settings)
    except TypeError:
        raise BadInput(f"penalty {name} does not take {', '.join(settings)}") from None
    return NonNegative(made) if non_negative else made
