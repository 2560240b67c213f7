"""SR-STE: N:M masks trained from scratch with a sparse-refined straight-through estimator."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import final

from maskwright.core.errors import BadInput
from maskwright.core.gate import Gate, ste
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import NM
from maskwright.core.score import magnitude
from maskwright.core.select import select
from maskwright.weights import MaskedTraining, WeightSite


@final
@dataclass(frozen=True)
class SrSte(MaskedTraining):
    """Forward keep * w; gradient g(keep * w) + decay * (1 - keep) * w for every weight (arXiv 2102.04010, eq. 9).

    keep: the n largest |w| of every m consecutive inputs, chosen anew after every `update_every`-th step.
    decay = 0 is the plain straight-through estimator; decay < 0 is the paper's negative control.
    Differs: the pull is added once per optimiser step, after clipping, whatever the accumulation.
    """

    n: int = 2
    m: int = 4
    decay: float = 2e-4
    update_every: int = 1

    def validate(self) -> None:
        NM(self.n, self.m)
        if not isfinite(self.decay):
            raise BadInput(f"sr_ste needs a finite decay, got {self.decay}")
        if self.update_every < 1:
            raise BadInput(f"sr_ste needs update_every >= 1, got {self.update_every}")

    @property
    def gate(self) -> Gate:
        return ste(self.decay)

    def start(self, found: Mapping[str, WeightSite]) -> dict[str, Mask]:
        return {name: self._largest(site) for name, site in found.items()}

    def update(self, site: WeightSite, old: Mask, step: int) -> Mask | None:
        return None if step % self.update_every else self._largest(site)

    def _largest(self, site: WeightSite) -> Mask:
        try:
            return select(magnitude(site), site.layout.localise(NM(self.n, self.m), site.shape))
        except BadInput as error:
            raise BadInput(f"{site.name}: {error}") from None


def sad(a: MaskSet, b: MaskSet) -> int:
    """Sparse architecture divergence: entries kept by exactly one of the two (a swap in a group counts 2)."""
    return (a - b).count + (b - a).count
