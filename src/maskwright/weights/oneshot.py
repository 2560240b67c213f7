"""One-shot pruning: the shared base of the methods that turn a trained model into masks in one walk (`solve.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskwright.core.budget import BUDGETS, Budget, global_
from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import Block, Pattern, Unstructured, parse
from maskwright.core.score import Score
from maskwright.core.select import select
from maskwright.weights.sites import WeightSite, sites
from maskwright.weights.solve import SiteResult, Solved, maskset, solve
from maskwright.weights.walk import Batch

Within = Literal["tensor", "row", "global"]
Backup = dict[str, tuple[WeightSite, Tensor]]


@dataclass(frozen=True)
class OneShot(ABC):
    """Fields every one-shot method has.

    density: share kept. pattern: a Pattern stated on (outputs, inputs), or its text. within: which weights
    compete ("row", "tensor", "global" = all sites as one). budget: how density is shared between sites
    (uniform, erk, er, global, owl). where: patterns of parameter names; empty = the repeated blocks.
    """

    density: float = 0.5
    pattern: Pattern | str = "unstructured"
    within: Within = "row"
    budget: str = "uniform"
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise BadInput(f"density lies in [0, 1], got {self.density}")
        if self.within not in ("tensor", "row", "global"):
            raise BadInput(f"within is tensor, row or global, got {self.within!r}")
        if self.budget not in BUDGETS:
            raise BadInput(f"unknown budget {self.budget!r}; known: {', '.join(BUDGETS)}")
        if isinstance(self.where, str):
            object.__setattr__(self, "where", (self.where,))
        self.form(self.pattern)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics the method asks of the calibration walk; empty for data-free methods."""
        return frozenset()

    @property
    def allocation(self) -> Budget:
        """The budget; within="global" is one competition over all sites."""
        return global_ if self.within == "global" else BUDGETS[self.budget]

    @abstractmethod
    def rank(self, site: WeightSite) -> Tensor:
        """Scores of the site's shape, for budgets that compare sites; greater means keep."""

    @abstractmethod
    def solve(self, site: WeightSite, counts: Tensor) -> Solved:
        """Mask (and new weight) of one site; `counts` kept units in each group of `site.pattern`."""

    def form(self, pattern: Pattern | str) -> Pattern:
        """A pattern with `within` put in; N:M competes inside its own groups, whatever `within` says."""
        pattern = parse(pattern) if isinstance(pattern, str) else pattern
        if isinstance(pattern, Unstructured | Block) and not pattern.within and self.within == "row":
            return replace(pattern, within=(0,))
        return pattern

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, as stored in mask files and reports."""
        return {
            k: str(v) if isinstance(v, Pattern) else list(v) if isinstance(v, tuple) else v
            for k, v in asdict_shallow(self).items()
        }

    def masks(self, model: nn.Module, batches: Sequence[Batch] | None = None, *, seed: int = 0) -> MaskSet:
        """Masks for a model, which is left as it was. Old weights are held for a block or two, not for the model.

        batches: calibration inputs (tensors, tuples or mappings of model arguments) where the method `needs`
        statistics. Raises BadInput naming the site for NaN weights or activations, shapes the pattern does not
        fit, or missing calibration.
        """
        backup: Backup = {}
        try:
            return self._run(model, batches, seed, backup)
        finally:
            _put_back(backup, list(backup))

    def prune(self, model: nn.Module, batches: Sequence[Batch] | None = None, *, seed: int = 0) -> MaskSet:
        """As `masks`, but in place: zeros are written, and new weights where the method has them."""
        return self._run(model, batches, seed, None)

    def _run(self, model: nn.Module, batches: Sequence[Batch] | None, seed: int, backup: Backup | None) -> MaskSet:
        results: list[SiteResult] = []
        due: list[str] = []
        for block in solve(model, self, batches, seed=seed, backup=backup, sample_rows=0):
            if backup is not None:
                _put_back(backup, due)
            due = [r.name for r in block.sites] if block.settled else []
            results += [replace(r, value=None) for r in block.sites]
        return maskset(self, results, seed, list(sites(model, self.where)))


@torch.no_grad()
def _put_back(backup: Backup, names: Sequence[str]) -> None:
    for name in names:
        site, old = backup.pop(name)
        site.parameter.copy_(old)


@dataclass(frozen=True)
class ByScore(OneShot):
    """A one-shot method that is a score: the best units of each group stay."""

    @property
    @abstractmethod
    def score(self) -> Score:
        """The method's score."""

    @property
    def needs(self) -> frozenset[str]:
        return self.score.needs

    def rank(self, site: WeightSite) -> Tensor:
        return self.score(site)

    def solve(self, site: WeightSite, counts: Tensor) -> Solved:
        return Solved(select(self.score(site), site.pattern, counts))


def asdict_shallow(method: Any) -> dict[str, Any]:
    """A dataclass's fields by name, values as they are."""
    return {name: getattr(method, name) for name in method.__dataclass_fields__}
