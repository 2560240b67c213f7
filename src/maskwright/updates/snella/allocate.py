"""Competition between layers: scores from weight times gradient, and an exact share-out of the entries to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.updates.snella.kernel import KernelUpdate


def share_out(sizes: Mapping[str, int], scores: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` entries over layers of `sizes` in proportion to `scores`, no layer above its size, the sum exact.

    What a full layer leaves goes to the others in proportion to their scores. Without scores (all 0) the sizes stand
    in for them. Fractions are settled by the largest remainder, then the lower place in `sizes`.
    Raises BadInput for a total that does not fit, or a score that is negative or not finite.
    """
    if not 0 <= total <= sum(sizes.values()):
        raise BadInput(f"{len(sizes)} layers hold {sum(sizes.values())} entries; {total} cannot be kept")
    bad = next((name for name in sizes if not 0 <= scores[name] < float("inf")), None)
    if bad is not None:
        raise BadInput(f"{bad}: a layer's score is {scores[bad]}, not a finite number >= 0")
    given: dict[str, Fraction] = {}
    free, left = list(sizes), Fraction(total)
    while free:
        # Exact fractions: sums of floats would leave or miss an entry, on which the reference's loop can spin.
        weight = {name: Fraction(scores[name]) for name in free}
        if not sum(weight.values()):
            weight = {name: Fraction(sizes[name]) for name in free}
        unit = left / sum(weight.values())
        full = [name for name in free if unit * weight[name] >= sizes[name]]
        if not full:
            given |= {name: unit * weight[name] for name in free}
            break
        given |= {name: Fraction(sizes[name]) for name in full}
        left -= sum(sizes[name] for name in full)
        free = [name for name in free if name not in full]
    counts = {name: int(given[name]) for name in sizes}
    order = sorted(sizes, key=lambda name: counts[name] - given[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass
class Importance:
    """AdaLoRA's sensitivity of P and Q: Ibar and U are running means of I = |theta grad| and of |I - Ibar|.

    A layer's score is the mean of Ibar U over P plus that over Q.
    """

    beta1: float
    beta2: float
    mean: dict[str, list[Tensor]] = field(default_factory=dict)
    spread: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def observe(self, layers: Mapping[str, KernelUpdate]) -> None:
        """Take in the gradients as they are now. NaN counts as 0. Raises BadInput where there is no gradient."""
        for name, layer in layers.items():
            grads = [part.grad for part in (layer.P, layer.Q) if part.grad is not None]
            if len(grads) < 2:
                raise BadInput(f"{name}: no gradient to observe; call it between backward and zero_grad")
            now = [(part * grad).abs().nan_to_num_(0.0) for part, grad in zip((layer.P, layer.Q), grads, strict=True)]
            means = self.mean.setdefault(name, [torch.zeros_like(part) for part in now])
            spreads = self.spread.setdefault(name, [torch.zeros_like(part) for part in now])
            for value, mean, spread in zip(now, means, spreads, strict=True):
                mean.lerp_(value, 1 - self.beta1)
                spread.lerp_((value - mean).abs(), 1 - self.beta2)

    def scores(self, names: Mapping[str, object]) -> dict[str, float]:
        """Score by layer; all 0 before anything was observed."""
        if not self.mean:
            return dict.fromkeys(names, 0.0)
        pairs = {name: zip(self.mean[name], self.spread[name], strict=True) for name in names}
        return {name: sum(float((mean * spread).double().mean()) for mean, spread in both) for name, both in pairs.items()}
