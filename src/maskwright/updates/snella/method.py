"""SNELL and SNELLA: sparse updates made by a kernel, sparsified inside layers and between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, final

from torch import nn

from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.updates import Tuning
from maskwright.updates.branch import branched, linears
from maskwright.updates.snella.allocate import Importance
from maskwright.updates.snella.kernel import GATES, KERNELS, KernelUpdate
from maskwright.updates.snella.run import SnellaRun


@final
@dataclass(frozen=True)
class Snella(Tuning):
    """W + S, S = gate(K) on the largest |K| of each layer, K a kernel over P and Q (arXiv 2510.24037; SNELL 2411.01800).

    allocate=True (SNELLA): once an epoch the kept entries, from `first` x all down to `density` x all along a cubic, are
    shared out over the layers by their importance. False (SNELL): every layer keeps `density`.
    P and Q have rank x (inputs + outputs) entries, as LoRA; weight decay acts on them and not on S.
    `train` names parameters that are trained whole (a head). zero: S is 0 at the start; without, it is not.
    Differs: the update lies in the weight, so there is no dropout on its input and no drop-path on its output; exactly
    `count` entries are kept, where the code keeps those above an interpolated quantile.
    Raises BadInput for settings that make no sense.
    """

    where: tuple[str, ...] = ()
    rank: int = 32
    heads: int = 2
    kernel: str = "mix"
    gate: str = "abs"
    scale: float = 0.1
    density: float = 0.2
    allocate: bool = True
    first: float = 0.99
    epochs: int = 100
    warm: int = 0
    last: int = 0
    beta1: float = 0.85
    beta2: float = 0.85
    train: tuple[str, ...] = ()
    zero: bool = False
    recompute: bool = True

    def validate(self) -> None:
        if self.rank < 1 or self.heads < 1 or self.rank % self.heads:
            raise BadInput(f"snella needs a rank that its heads divide, got rank {self.rank}, heads {self.heads}")
        if self.kernel not in KERNELS or self.gate not in GATES:
            raise BadInput(f"snella knows kernels {KERNELS} and gates {tuple(GATES)}, got {self.kernel!r}, {self.gate!r}")
        if not 0 < self.density <= 1 or (self.allocate and not self.density <= self.first <= 1):
            raise BadInput(f"snella needs 0 < density <= first <= 1, got density {self.density}, first {self.first}")
        if self.allocate and (min(self.warm, self.last) < 0 or self.epochs <= self.warm + self.last):
            raise BadInput(f"snella needs epochs > warm + last >= 0, got {self.epochs}, {self.warm}, {self.last}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1 and isfinite(self.scale) and self.scale > 0):
            raise BadInput(f"snella needs betas in (0, 1), scale > 0: got {self.beta1}, {self.beta2}, {self.scale}")
        if self.zero and (self.gate != "binary" or self.kernel == "mix" or (self.kernel == "distance" and self.heads % 2)):
            # The other gates multiply the gradient by |K| = 0, so such a start would never be left.
            raise BadInput(
                'snella starts at zero with gate "binary", and kernel "lora" or "distance" of an even number of heads'
            )

    @contextmanager
    def attach(self, model: nn.Module, *, seed: int = 0) -> Iterator[SnellaRun]:
        """Hang the updates on Linear weights; SNELLA: `observe()` after each backward, `epoch(e)` before epoch e."""
        sites = linears(model, self.where)
        options: Any = {name: getattr(self, name) for name in ("rank", "heads", "kernel", "gate", "scale", "zero")}
        sizes = {name: site.weight.numel() for name, site in sites.items()}
        layers = {
            name: KernelUpdate(site.shape, **options, count=whole(self.density, sizes[name]), seed=seed, name=name)
            for name, site in sites.items()
        }
        with branched(model, sites, layers, train=self.train, recompute=self.recompute) as held:
            run = SnellaRun(self, seed, held, layers, sizes, Importance(self.beta1, self.beta2))
            run.epoch(0)
            yield run
