"""LT-SFT (arXiv 2110.07560): composable sparse fine-tuning by a lottery ticket of the changes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import final

from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates.deltas import Deltas
from maskwright.updates.method import Tuning
from maskwright.updates.twophase import Attached, Train, TwoPhase, two_phase


@final
@dataclass(frozen=True)
class LtSft(Tuning):
    """Train all, select the entries that changed most over all tensors together, rewind, train those alone (2110.07560).

    What comes out is a sparse difference that is added to the base, subtracted from it, and summed with others: a task's
    and a language's make the task in that language. density: share of the maskable entries (the code's
    ft_params_proportion); count: their number, when not 0. where: maskable parameters (default all but norms' and
    `full`). full: patterns of parameters trained and stored whole (a task head). full_l1, sparse_l1: the pull to theta_0
    in each phase, divided by the number of the model's parameters. rounds: n_ft_iterations. chance: Rand-SFT.
    """

    density: float = 0.08
    count: int = 0
    where: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    full_l1: float = 0.0
    sparse_l1: float = 0.0
    rounds: int = 1
    eps: float = 1e-7
    chance: bool = False

    def validate(self) -> None:
        if not 0 <= self.density <= 1:
            raise BadInput(f"density lies in 0..1, got {self.density:g}")
        finite = all(0 <= value < inf for value in (self.eps, self.full_l1, self.sparse_l1))
        if self.count < 0 or self.rounds < 1 or not finite:
            raise BadInput("count, eps, full_l1 and sparse_l1 are finite and at least 0, rounds at least 1")

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attached:
        """Yields the run: `fit(train)`, or its steps by hand (`select`, `masks`, `deltas`)."""
        made = self.made_by(seed)
        run = TwoPhase(model, 0, self.where, self.full, self.chance, self.eps, seed, made)
        run.count = self.count or round(self.density * run.total)
        if run.count > run.total:
            raise BadInput(f"{run.count} entries were asked for, {run.total} of {len(run.maskable)} tensors are maskable")
        return two_phase(run)

    def fit(self, model: nn.Module, train: Train, *, seed: int = 0) -> Deltas:
        """Both phases in one call: `train(phase)` runs once for each. The model is left trained."""
        with self.attach(model, seed=seed) as run:
            return run.fit(train, self.rounds, (self.full_l1, self.sparse_l1))
