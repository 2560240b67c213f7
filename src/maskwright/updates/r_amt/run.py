"""A model under mask tuning: scores to train, the two-gradient backward, masks, merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet, base_hash
from maskwright.core.select import generator
from maskwright.updates.r_amt.dropout import distillation, gradient_dropout
from maskwright.updates.r_amt.gate import ScoreGate
from maskwright.weights import WeightSite

if TYPE_CHECKING:
    from maskwright.updates.r_amt.method import RAmt


@dataclass(frozen=True)
class Report:
    """How far a run has gone. kept: name -> (weights on, weights in all); flips: bits that changed, back and forth."""

    kept: Mapping[str, tuple[int, int]]
    flips: int

    @property
    def dropped(self) -> int:
        """Weights that are off, over all sites."""
        return sum(total - on for on, total in self.kept.values())

    @property
    def density(self) -> float:
        return sum(on for on, _ in self.kept.values()) / sum(total for _, total in self.kept.values())

    def __str__(self) -> str:
        rows = [f"{name}: {total - on} of {total} off" for name, (on, total) in self.kept.items()]
        return "\n".join([*rows, f"all: {self.dropped} off, density {self.density:.6g}, {self.flips} flips"])


@dataclass(eq=False)
class RAmtRun:
    """Between entering and leaving `RAmt.attach`. step: backward calls so far; set it when a run is resumed.

    While attached, the model's state_dict holds weights and scores, so it resumes a run by itself.
    """

    method: RAmt
    model: nn.Module
    seed: int
    found: Mapping[str, WeightSite]
    gates: Mapping[str, ScoreGate]
    step: int = 0
    merged: bool = False
    _base: str = ""
    _flips: int = 0
    _seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The scores, in model order."""
        return [gate.scores for gate in self.gates.values()]

    def penalty(self) -> Tensor:
        """norm_weight times the sum over tensors of |M|_2 (not squared). `backward` adds it by itself."""
        where = self.trainable[0].device
        return self.method.norm_weight * torch.stack([torch.linalg.vector_norm(s).to(where) for s in self.trainable]).sum()

    @contextmanager
    def original(self) -> Iterator[None]:
        """Inside, the model computes as it did before tuning, in eval mode and without gradients: the teacher."""
        if self.merged:
            raise BadInput("r_amt: the masks are merged, the original weights are gone")
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            self._open(True)
            with torch.no_grad():
                yield
        finally:
            self._open(False)
            for module, training in modes:
                module.training = training

    def kl_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """`distillation` at the method's temperature. logits, teacher: (..., classes)."""
        return distillation(logits, teacher, self.method.temperature)

    def backward(self, loss: Tensor, kl_loss: Tensor | None = None) -> None:
        """Add to the scores' gradients: of `loss` and the penalty, dropped where that of `kl_loss` speaks against it.

        Both losses come from one forward of the masked model (same masks, same dropout). The gradient of `kl_loss`
        is never applied. Other leaves (prompts, an adapter) get the plain gradient of `loss`. Draws are fresh for
        every call and site, and depend on the seed, the step and the site's name only. Raises BadInput without a
        `kl_loss` unless drop_lambda is 0, and for a gradient that is not finite (naming the site).
        """
        lam = self.method.drop_lambda
        if lam and (kl_loss is None or not kl_loss.requires_grad):
            raise BadInput(
                f"r_amt: drop_lambda {lam} needs a kl_loss of the masked model's logits (drop_lambda=0 needs none)"
            )
        self._count()
        held = [scores.grad for scores in self.trainable]
        try:
            for scores in self.trainable:
                scores.grad = None
            (loss + self.penalty()).backward(retain_graph=bool(lam))
            task = [torch.zeros_like(s) if s.grad is None else s.grad for s in self.trainable]
            old: list[Tensor] = [torch.zeros_like(gradient) for gradient in task]
            if lam and kl_loss is not None:
                old = list(torch.autograd.grad(kl_loss, self.trainable, materialize_grads=True, allow_unused=True))
        finally:
            for scores, gradient in zip(self.trainable, held, strict=True):
                scores.grad = gradient
        new = []
        for name, a, b in zip(self.gates, task, old, strict=True):
            try:
                new.append(gradient_dropout(a, b, lam, generator(self.seed, f"{name}#{self.step}")))
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None
        for scores, gradient in zip(self.trainable, new, strict=True):
            scores.grad = gradient if scores.grad is None else scores.grad + gradient
        self.step += 1

    def masks(self) -> MaskSet:
        """The weights that are on, exact, with the hash of the weights they were made for."""
        self._base = self._base or base_hash({name: site.value for name, site in self.found.items()})
        return MaskSet({n: Mask(g.keep.cpu()) for n, g in self.gates.items()}, self.method.made_by(self.seed), self._base)

    def report(self) -> Report:
        """Weights on by site, and the bits that changed so far (counted at every `backward` and here)."""
        self._count()
        return Report({n: (int(g.keep.sum()), g.keep.numel()) for n, g in self.gates.items()}, self._flips)

    @torch.no_grad()
    def merge(self) -> None:
        """Write exact zeros where the scores are off, in place. The original weights are gone then."""
        self.masks()  # takes the hash of the weights while they are the original ones
        for name, site in self.found.items():
            site.parameter.masked_fill_(~self.gates[name].keep, 0)
        self.merged = True

    def _open(self, on: bool) -> None:
        for gate in self.gates.values():
            gate.open = on

    def _count(self) -> None:
        for name, gate in self.gates.items():
            keep = gate.keep
            before = self._seen.get(name)
            self._flips += int((~keep if before is None else keep != before).sum())
            self._seen[name] = keep
