"""A model under Sparse MeZO: two forwards and a few passes of noise a step, all in the weights' own memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.updates.noise import uniform_bits
from maskwright.updates.sparse_mezo.log import Log, Row
from maskwright.updates.sparse_mezo.sites import Site, fingerprint

if TYPE_CHECKING:
    from maskwright.updates.sparse_mezo.method import SparseMezo

Closure = Callable[[], Tensor | float]


@dataclass(frozen=True)
class Step:
    """What a step found: the mean `loss` of its forwards, the slope along each direction, the entries trained.

    A loss that was not finite makes `skipped` true: the weights were put back and nothing was updated.
    """

    loss: float
    gradients: tuple[float, ...]
    kept: int
    skipped: bool = False

    @property
    def gradient(self) -> float:
        """The projected gradient (the mean over directions where there are several)."""
        return sum(self.gradients) / len(self.gradients)


class Run:
    """Made by `SparseMezo.attach`. `log` holds every step so far."""

    def __init__(self, method: SparseMezo, model: nn.Module, found: list[Site], seed: int) -> None:
        self.method, self.model, self.seed, self.sites = method, model, seed, found
        self._inside = False
        self.trainable = [site.parameter for site in found]
        self.log = Log(method.made_by(seed), fingerprint(found))
        for site in found:
            site.settle(seed)

    def masks(self) -> MaskSet:
        """The entries that a step may touch, by the weights as they are now."""
        if not self._inside:  # in a closure the weights are perturbed: the step's masks stand
            self._refresh(self._seeds()[0])
        return MaskSet({site.name: site.mask() for site in self.sites}, self.method.made_by(self.seed))

    def merge(self) -> None:
        """Nothing to do: the weights themselves are trained."""

    def step(self, closure: Closure, lr: float | None = None) -> Step:
        """One step. `closure()` gives the loss of one batch (a number or a tensor of one entry), the same for each call.

        It is called twice for each direction, without gradients and in eval mode. `lr` takes the place of the
        method's rate. Raises BadInput, with the weights put back, for a loss that is no scalar and for a closure
        that changes a trained tensor; an error inside the closure passes through the same way.
        """
        rate = self.method.lr if lr is None else lr
        if not 0 <= rate < math.inf:
            raise BadInput(f"lr is at least 0 and finite, got {rate}")
        seeds, losses, slopes = self._seeds(), [], []
        self._refresh(seeds[0])
        with torch.no_grad(), self._evaluating():
            for at, seed in enumerate(seeds):
                try:
                    above, below = self._both(seed, closure)
                except BaseException:
                    # The round trip is over, and it is written down: it may have moved a last bit.
                    self.log.rows.append(Row(seeds[: at + 1], None, rate))
                    raise
                losses += [above, below]
                slopes.append((above - below) / (2 * self.method.eps))
                if len(seeds) > 1:
                    self._back(seed)
            skipped = not all(map(math.isfinite, (*losses, *slopes)))
            row = Row(seeds, None if skipped else tuple(slopes), rate)
            self._finish(row)
        self.log.rows.append(row)
        return Step(sum(losses) / len(losses), tuple(slopes), sum(site.kept for site in self.sites), skipped)

    @torch.no_grad()
    def again(self, row: Row) -> None:
        """The weights' side of a step that was taken before, rounding included; no forward."""
        self._refresh(row.seeds[0])
        eps, back = self.method.eps, () if self.method.n == 1 else (self.method.eps,)  # `_finish` brings one direction back
        for seed in () if self.method.snapshot else row.seeds:
            self._move(seed, (eps, -2 * eps, *back))
        if self.method.snapshot:
            self._each(Site.save)
        self._finish(row)
        self.log.rows.append(row)

    def _both(self, seed: int, closure: Closure) -> tuple[float, float]:
        """The losses at +eps and -eps; the weights stay at -eps. On an error they are back where they were."""
        eps, snapshot = self.method.eps, self.method.snapshot
        if snapshot:
            self._each(Site.save)
        self._move(seed, (eps,))
        there = False
        try:
            above = self._loss(closure)
            if snapshot:
                self._each(Site.restore)
            self._move(seed, (-eps if snapshot else -2 * eps,))
            there = True
            return above, self._loss(closure)
        except BaseException:
            if not there and not snapshot:
                self._move(seed, (-2 * eps,))
            self._back(seed)
            raise

    def _back(self, seed: int, then: Sequence[float] = (), decay: float = 0.0) -> None:
        """From -eps to the weights, and on by `then` with the same noise."""
        if self.method.snapshot:
            self._each(Site.restore)
        self._move(seed, then if self.method.snapshot else (self.method.eps, *then), decay)

    def _finish(self, row: Row) -> None:
        """The way back of a single direction, and the update: w -= lr * (mean of slope * mask * z + decay * mask * w)."""
        slopes, decay = row.gradients or (), -row.lr * self.method.weight_decay
        steps = [-row.lr * slope / self.method.n for slope in slopes]
        if self.method.n == 1:  # one pass: the noise is made once for both
            self._back(row.seeds[0], steps, decay if steps else 0.0)
            return
        for at, (seed, step) in enumerate(zip(row.seeds, steps, strict=False)):
            self._move(seed, (step,), 0.0 if at else decay)

    def _move(self, seed: int, scales: Sequence[float], decay: float = 0.0) -> None:
        for site in self.sites if scales else ():
            # MeZO's rule spares biases and norms: tensors of one dim.
            site.move(seed, scales, decay if site.parameter.ndim >= 2 else 0.0)

    def _each(self, action: Callable[[Site], None]) -> None:
        for site in self.sites:
            action(site)

    def _loss(self, closure: Closure) -> float:
        before = [site.parameter._version for site in self.sites]
        loss = closure()
        for site, version in zip(self.sites, before, strict=True):
            if site.parameter._version != version:
                raise BadInput(f"{site.name}: the closure changed the tensor; it may only compute the loss")
        if isinstance(loss, Tensor):
            if loss.numel() != 1 or loss.is_complex():
                raise BadInput(f"the closure gives one number as the loss, got a tensor of shape {tuple(loss.shape)}")
            return float(loss)
        if not isinstance(loss, numbers.Real):
            raise BadInput(f"the closure gives one number as the loss, got {type(loss).__name__}")
        return float(loss)

    def _seeds(self) -> tuple[int, ...]:
        """The coming step's seeds, from the run's seed and the step's number alone."""
        n, step = self.method.n, len(self.log)
        words = uniform_bits(self.seed, "sparse_mezo/steps", 2 * n * step, 2 * n * (step + 1)).tolist()
        return tuple(low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True))

    def _refresh(self, seed: int) -> None:
        if self.method.refresh == "step":
            for site in self.sites:
                if site.kind == "random":
                    site.settle(seed)
                else:
                    site.write(seed)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, module by module put back: dropout or batch statistics would break the central difference."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            for module in training:
                module.training = True
