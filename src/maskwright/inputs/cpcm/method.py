"""CPCM (arXiv 2307.10316): agree with oneself where whole boxes of a scene have lost their features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.select import draw, generator
from maskwright.inputs.cpcm.streams import Batch, divergence
from maskwright.inputs.method import InputMethod
from maskwright.inputs.regions import Regions
from maskwright.inputs.samplers import count

Net = Callable[[Tensor, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Cpcm(InputMethod):
    """CE on the few labels of two views, plus agreement of the masked second view with both of them, on every point.

    density: share of the boxes whose points keep their features. grid: boxes on an axis. weight, consistency: lambda_m of
    the masked terms, lambda_c of the agreement of the two views. ramp: steps in which both weights grow as
    exp(-5 (1 - t)^2); without it training can collapse to one answer for all. probability: share of steps with a masked
    pass. points: hide points by chance, not boxes. exact: the divergence without the code's small numbers. reference: the
    code's borders of boxes. ignore: the label of an unlabelled point. Raises BadInput for settings that make no sense.
    """

    density: float = 0.25
    grid: int = 4
    weight: float = 5.0
    consistency: float = 0.0
    ramp: int = 500
    probability: float = 1.0
    points: bool = False
    exact: bool = False
    reference: bool = False
    ignore: int = -1

    def validate(self) -> None:
        Regions(self.density, self.grid)
        weights = (self.weight, self.consistency)
        if not all(math.isfinite(each) and each >= 0 for each in weights) or self.ramp < 0:
            raise BadInput(f"cpcm needs weights and ramp of at least 0, got {weights} and {self.ramp}")
        if not 0 <= self.probability <= 1:
            raise BadInput(f"cpcm needs probability in [0, 1], got {self.probability}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """The mask (n,) of one scene's points (n, 3): True where a point keeps its features. Raises BadInput as `boxes`."""
        return self.boxes(x, rng=rng)[0]

    def boxes(
        self, coords: Tensor, scene: Tensor | None = None, *, rng: torch.Generator | None = None
    ) -> tuple[Mask, Tensor]:
        """The mask (n,) and each point's box (n,), -1 where there is none; every scene has a draw of its own.

        Raises BadInput for coordinates that are not finite, and scenes too small for the grid.
        """
        rng = generator(0, "cpcm") if rng is None else rng
        if not self.points:
            return Regions(self.density, self.grid, self.reference)(coords, scene, rng=rng)
        scene = torch.zeros(len(coords), dtype=torch.int64) if scene is None else scene
        Regions(1.0, 1)(coords, scene, rng=generator(0))  # refuses what boxes would refuse, for the same reasons
        keep = torch.ones(len(coords), dtype=torch.bool)
        for number in scene.unique().tolist():
            rows = (scene == number).nonzero()[:, 0]
            shape, pattern = (1, len(rows)), Unstructured((0,))
            keep[rows] = draw(pattern, shape, count(self.density, pattern, shape), rng=rng).keep[0]
        return Mask(keep), torch.full((len(coords),), -1)

    def ramped(self, step: int) -> float:
        """The share of the weights at a step, counted from 0: exp(-5 (1 - t)^2), t = step / ramp, and 1 from `ramp` on."""
        return math.exp(-5 * (1 - step / self.ramp) ** 2) if step < self.ramp else 1.0

    def start(self, net: Net, *, seed: int = 0) -> Run:
        """The run around any point network, `net(coords, feats, scene) -> logits (n, classes)`."""
        return Run(self, net, seed)


@dataclass(frozen=True, eq=False)
class Terms:
    """The parts of one loss: `total` is supervised + the others by their ramped weights. `mask` is None without a pass."""

    supervised: Tensor
    consistency: Tensor
    own: Tensor
    corresponding: Tensor
    total: Tensor
    mask: Mask | None
    masked: Tensor | None


@final
class Run:
    """A training: `loss(batch)`, then the user's own backward and optimiser. `step` is all there is to save and set."""

    def __init__(self, method: Cpcm, net: Net, seed: int) -> None:
        self.method, self.net, self.seed, self.step = method, net, seed, 0

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one step. Raises BadInput for a batch that does not fit and logits that are not finite."""
        return self.terms(batch).total

    def terms(self, batch: Batch) -> Terms:
        """The loss of one step, by its parts. The masks of step i depend on the seed and i alone.

        The masked view has no supervised loss, and its targets no gradient. Where no point is in both views the second
        masked term is 0 (a mean over none). Batch norm sees the masked view too, as in the released code.
        """
        method, step = self.method, self.step
        one, two, pairs = batch.check(method.ignore).one, batch.two, batch.pairs
        rng = generator(self.seed, f"cpcm step {step}")
        masked = bool(torch.rand((), generator=rng) < method.probability)
        mask = method.boxes(two.coords, two.scene, rng=rng)[0] if masked else None  # refuses before the network runs
        first, second = (self._logits(each.coords, each.feats, each.scene) for each in (one, two))
        zero = first.new_zeros(())
        supervised = sum((self._supervised(z, s.labels) for z, s in ((first, one), (second, two))), zero)
        left, right = pairs.T
        agree = own = corresponding = zero
        if method.consistency and len(pairs):
            agree = divergence(first[left], second[right], exact=method.exact)
        third = None
        if mask is not None:
            # Differs: a new tensor; the released code writes the zeros into the caller's features. Every channel is hidden
            # by points too, where the code hides three.
            third = self._logits(two.coords, two.feats.masked_fill(~mask.keep[:, None], 0.0), two.scene)
            own = divergence(second.detach(), third, exact=method.exact)
            if len(pairs):
                corresponding = divergence(first.detach()[left], third[right], exact=method.exact)
        share = method.ramped(step)
        total = supervised + method.consistency * share * agree + method.weight * share * (own + corresponding)
        self.step += 1
        return Terms(supervised, agree, own, corresponding, total, mask, third)

    def _logits(self, coords: Tensor, feats: Tensor, scene: Tensor) -> Tensor:
        z = self.net(coords, feats, scene)
        if z.ndim != 2 or len(z) != len(coords) or not bool(z.isfinite().all()):
            raise BadInput(f"the network's logits {tuple(z.shape)} of {len(coords)} points are not (n, classes) and finite")
        return z

    def _supervised(self, z: Tensor, labels: Tensor) -> Tensor:
        chosen = labels[labels != self.method.ignore]
        if bool(((chosen < 0) | (chosen >= z.shape[1])).any()):
            raise BadInput(f"labels {chosen.unique().tolist()} do not fit logits of {z.shape[1]} classes")
        return F.cross_entropy(z, labels, ignore_index=self.method.ignore)
