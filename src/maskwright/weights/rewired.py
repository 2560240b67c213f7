"""Dynamic sparse training by drop and grow: the shared base of SET and RigL, which differ only in what grows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from maskwright.core.budget import BUDGETS, Units
from maskwright.core.errors import BadInput
from maskwright.core.gate import Gate, hard
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.rewire import rewire
from maskwright.core.schedule import Schedule, cosine, every
from maskwright.core.select import draw, generator
from maskwright.weights.sites import WeightSite
from maskwright.weights.train import MaskedTraining


@dataclass(frozen=True)
class Rewired(MaskedTraining):
    """A random mask of exact count that is rewired every `every` steps, at constant count per site.

    density: share kept over all sites. budget: how it is shared (by shape: erk, er, uniform). At steps 0 < t <
    stop x total that are multiples of `every`, a site of n kept weights drops its int(f n) smallest |w| and grows
    as many, f = fraction / 2 (1 + cos(pi t / (stop x total))). regrow: the just-dropped may come straight back
    (with their values, as in the reference codes); without it no more is dropped than can grow.
    """

    density: float = 0.1
    budget: str = "erk"
    every: int = 100
    fraction: float = 0.3
    total: int = 1000
    stop: float = 0.75
    regrow: bool = True

    def validate(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"density lies in (0, 1], got {self.density}")
        if self.budget not in BUDGETS or BUDGETS[self.budget].needs_scores or BUDGETS[self.budget].needs_facts:
            raise BadInput(f"a budget by shape is needed (erk, er, uniform), got {self.budget!r}")
        if self.every < 1 or self.total < 1 or not 0 <= self.fraction <= 1:
            raise BadInput(
                f"rewiring needs every >= 1, total >= 1 and fraction in [0, 1], "
                f"got {self.every}, {self.total} and {self.fraction}"
            )
        if not 0 < self.stop <= 1 or self.stop * self.total <= 0.5:
            raise BadInput(f"stop is a share of total in (0, 1] and at least one step, got {self.stop}")

    @property
    def gate(self) -> Gate:
        return hard

    @property
    def schedule(self) -> Schedule:
        """Optimiser step -> the share of kept weights to drop, or None."""
        end = round(self.stop * self.total)
        return every(self.every, cosine(self.fraction, 0.0, 0, end), stop=end)

    @abstractmethod
    def grow(self, site: WeightSite, step: int) -> Tensor:
        """Scores of the site's shape: the dropped weights with the greatest ones grow."""

    def start(self, found: Mapping[str, WeightSite]) -> dict[str, Mask]:
        units = {name: Units(1, site.value.numel(), site.shape) for name, site in found.items()}
        counts = BUDGETS[self.budget](units, self.density)
        empty = [name for name in found if not int(counts[name].sum())]
        if empty:
            raise BadInput(f"{empty[0]}: density {self.density:g} of shape {found[empty[0]].shape} keeps no unit")
        return {
            name: draw(Unstructured(), site.shape, counts[name], rng=generator(site.seed, name))
            for name, site in found.items()
        }

    def update(self, site: WeightSite, old: Mask, step: int) -> Mask | None:
        share = self.schedule(step)
        if share is None:
            return None
        if not self.regrow:
            share = min(share, (old.keep.numel() - old.count) / old.count)
        return rewire(old, site.value.abs(), self.grow(site, step), share, regrow=self.regrow)
