"""SFTM-CLIR (arXiv 2204.02292): a ranking difference learned in one language, and one of each language to put it on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import Deltas, Tuning, TwoPhase, add, two_phase
from maskwright.updates.deltas import BaseId, tensors_of
from maskwright.updates.sftm_clir.ranking import adapter_entries
from maskwright.updates.twophase import Attached, Train


@final
@dataclass(frozen=True)
class SftmClir(Tuning):
    """A sparse difference by two phases (LT-SFT): train all, keep what changed most, rewind, train that (2204.02292).

    One setting makes a language's module (masked LM, l1 0.1, no `full`), another the ranking module (binary cross
    entropy of one logit a pair, `full` its head, l1 0, trained `on` the source language's module). `compose` adds the
    ranking module and the target language's. density: share of the maskable entries; count: their number, when not 0.
    where: maskable parameters (default all but norms' and `full`); norms are refused, or sums of modules would break.
    full: patterns of parameters trained and stored whole. l1: the pull to the start, in both phases. eps: differences up
    to it are not stored. chance: entries drawn instead of ranked. Raises BadInput for settings that make no sense.
    """

    density: float = 0.0441
    count: int = 0
    where: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    l1: float = 0.0
    eps: float = 1e-7
    chance: bool = False

    def validate(self) -> None:
        if not 0 <= self.density <= 1:
            raise BadInput(f"density lies in 0..1, got {self.density:g}")
        if min(self.count, self.l1, self.eps) < 0:
            raise BadInput(f"count, l1 and eps are at least 0, got {self.count}, {self.l1:g}, {self.eps:g}")

    @classmethod
    def sized(cls, reduction: int, *, layers: int = 12, width: int = 768, **settings: Any) -> SftmClir:
        """As many entries as adapters of that reduction factor have (1 to 32 in the paper)."""
        return cls(count=adapter_entries(reduction, layers=layers, width=width), **settings)

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attached:
        """Yields the run of both phases, to be stepped by hand. Raises BadInput where a norm would be trained."""
        run = TwoPhase(model, 0, self.where, self.full, self.chance, self.eps, seed, self.made_by(seed))
        norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
        for name, weight in run.maskable.items():
            if id(weight) in norms:
                raise BadInput(f"{name} belongs to a norm, which stays frozen: sums of modules break otherwise")
        run.count = self.count or round(self.density * run.total)
        if run.count > run.total:
            raise BadInput(f"{run.count} entries were asked for, {run.total} of {len(run.maskable)} tensors are maskable")
        return two_phase(run)

    def fit(self, model: nn.Module, train: Train, *, on: Deltas | None = None, seed: int = 0, tokenizer: str = "") -> Deltas:
        """Train a module; `train(phase)` runs once a phase, and the model is left bit for bit as it was.

        on: the source language's module. Training starts from base + on, and what is stored is the difference from
        there, as a module of the base: `on` is replaced at inference. tokenizer: a name or hash that `compose` compares.
        """
        before = {name: value.clone() for name, value in tensors_of(model).items()}
        # Its own head is no part of a language; `add` refuses another base.
        added = None if on is None else add(model, on.without_full())
        try:
            with self.attach(model, seed=seed) as run:
                found = run.fit(train, l1=(self.l1, self.l1))
        finally:
            if added is not None:
                added.undo()
            with torch.no_grad():
                for name, value in tensors_of(model).items():
                    value.copy_(before[name])
        told = {"tokenizer": tokenizer} if tokenizer else {}
        told |= {} if on is None else {"on": dict(on.made_by)}  # type: ignore[dict-item]
        ids = {name: BaseId.of(before[name]) for name in found}
        return replace(found, base=ids, made_by={**found.made_by, **told})
