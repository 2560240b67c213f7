"""A model under SNELL or SNELLA, between entering and leaving `Snella.attach`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from maskwright.core.budget import whole
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.schedule import cubic
from maskwright.updates.branch import Branched
from maskwright.updates.snella.allocate import Importance, share_out
from maskwright.updates.snella.kernel import KernelUpdate

if TYPE_CHECKING:
    from maskwright.updates.snella.method import Snella


@dataclass(eq=False)
class SnellaRun:
    """A model under SNELL or SNELLA. `trainable`: P, Q, the kernel's scalars, and what `train` names."""

    method: Snella
    seed: int
    branched: Branched
    layers: dict[str, KernelUpdate]
    sizes: dict[str, int]
    importance: Importance

    @property
    def trainable(self) -> list[nn.Parameter]:
        return self.branched.trainable

    def observe(self) -> None:
        """Take in the gradients of this step, after backward. Differs: the code reads them after the optimiser's step."""
        self.importance.observe(self.layers)

    def budget(self, epoch: int) -> int:
        """Kept entries over all layers in `epoch`: V(e) = V_T + (V_0 - V_T) (1 - (e - warm) / (epochs - last - warm))^3."""
        m, total = self.method, sum(self.sizes.values())
        ramp = cubic(whole(m.first, total), whole(m.density, total), m.warm, m.epochs - m.last)
        return int(ramp(epoch))  # type: ignore[arg-type]

    def epoch(self, epoch: int) -> dict[str, int]:
        """Share out the budget of `epoch` (0, 1, ..., epochs); gives the kept entries by layer. SNELL: nothing moves."""
        if self.method.allocate:
            scores = self.importance.scores(self.sizes)
            for name, count in share_out(self.sizes, scores, self.budget(epoch)).items():
                self.layers[name].count = count
        return {name: layer.count for name, layer in self.layers.items()}

    def masks(self) -> MaskSet:
        """The entries of each weight that the update holds now, exact."""
        found = {}
        for name, layer in self.layers.items():
            mask = layer.mask()
            found[name] = Mask(mask.keep.T.contiguous()) if self.branched.sites[name].transposed else mask
        return MaskSet(found, self.method.made_by(self.seed))

    def merge(self) -> None:
        """Write W + S into the weights; inference then costs nothing."""
        self.branched.merge()
