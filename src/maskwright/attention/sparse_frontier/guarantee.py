"""How far attention may be thinned with a guarantee: fixed-sequence testing of the risk at every density.

Differs: the paper's own procedure is not reproduced from its code. Here the hypotheses "at this density more than the
tolerated share of answers is lost" are tested from the densest down, each at the full level, until one is not rejected
(fixed-sequence testing, arXiv 2110.01052, section 3): the chance that any accepted density loses more is at most
1 - confidence, without a correction for their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.core.errors import BadInput


@dataclass(frozen=True)
class Guarantee:
    """density: the lowest with a guarantee (1.0, dense itself, where none has). p[density]: each tested density's value.

    `losses[density]` is the greatest mean loss over the tasks.
    """

    density: float
    tolerance: float
    confidence: float
    p: Mapping[float, float]
    losses: Mapping[float, float]

    @property
    def compression(self) -> float:
        """1 / density."""
        return 1.0 / self.density


def p_value(losses: Tensor, tolerance: float) -> float:
    """How likely losses as small as these are when the true mean is above `tolerance`. losses (n,) in 0..1.

    Losses of only 0 and 1 take the exact binomial tail P(Bin(n, tolerance) <= sum), others Hoeffding's bound
    exp(-2 n (tolerance - mean)^2). Raises BadInput for none, or one outside 0..1.
    """
    x = losses.double()
    if not x.numel() or not bool(((x >= 0) & (x <= 1)).all()):
        raise BadInput(f"losses lie in 0..1 and are at least one, got shape {tuple(losses.shape)}")
    if bool(((x == 0) | (x == 1)).all()):
        from scipy.special import bdtr

        return float(bdtr(float(x.sum()), x.numel(), tolerance))
    short = max(0.0, tolerance - float(x.mean()))
    return math.exp(-2 * x.numel() * short**2)


def guarantee(
    dense: Mapping[str, Tensor], sparse: Mapping[float, Mapping[str, Tensor]], tolerance: float, confidence: float
) -> Guarantee:
    """The lowest density whose every task loses at most `tolerance`, with `confidence`.

    dense[task] and sparse[density][task] are scores (n,) in 0..1 of the same questions. A question's loss is what it
    scored less than dense, gains count as 0: so the bound holds for the net loss too. Of the tasks the greatest p
    counts, since the null is that some task loses more.
    """
    if not 0 < tolerance < 1 or not 0 < confidence < 1 or not dense:
        raise BadInput(f"tolerance and confidence lie between 0 and 1, got {tolerance} and {confidence}")
    found, p, losses = 1.0, {}, {}
    for density in sorted(sparse, reverse=True):
        lost = {task: (dense[task] - sparse[density][task]).clamp(min=0) for task in dense}
        p[density] = max(p_value(x, tolerance) for x in lost.values())
        losses[density] = max(float(x.double().mean()) for x in lost.values())
        if p[density] > 1 - confidence:
            break  # fixed sequence: nothing below is tested any more
        found = density
    return Guarantee(found, tolerance, confidence, p, losses)


def needed(tolerance: float, confidence: float) -> int:
    """Questions without a single loss that a guarantee takes at the least: (1 - tolerance)^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - tolerance))


def mean(scores: Sequence[Tensor]) -> float:
    """Mean over tasks of their mean scores: every task weighs the same."""
    return float(torch.stack([x.double().mean() for x in scores]).mean())
