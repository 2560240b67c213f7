"""Sparse fine-tuning in two phases (LT-SFT, arXiv 2110.07560): train everything, see what moved most, rewind, train that.

The user's `train(phase)` makes its own optimiser and loop, once a phase:

    def train(phase):
        optimizer = torch.optim.AdamW(phase.trainable, lr=5e-5)
        with phase.restrict(optimizer):
            for x, y in data:
                (loss(model(x), y) + phase.penalty()).backward()
                optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import Unstructured
from maskwright.core.select import draw, generator
from maskwright.kernels.merge import kept as stays
from maskwright.kernels.merge import piece
from maskwright.updates.cuts import Pair, Row, cuts
from maskwright.updates.deltas import Deltas, delta
from maskwright.updates.restriction import restrict
from maskwright.updates.untouched import untouched

_CHUNK = 1 << 20
Train = Callable[["Phase"], None]


@dataclass(frozen=True, eq=False)
class Phase:
    """One phase of training. name: "full" (everything moves) or "sparse" (what was selected moves)."""

    name: Literal["full", "sparse"]
    run: TwoPhase
    l1: float

    @property
    def model(self) -> nn.Module:
        return self.run.model

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The maskable parameters and those trained whole (a head)."""
        return self.run.trainable

    @contextmanager
    def restrict(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Only what this phase may move moves."""
        if self.name == "full":
            yield
        else:
            with restrict(optimizer, self.run.masks(), self.run.model):
                yield

    def penalty(self) -> Tensor:
        """l1 * sum |theta - theta_0| / N over the maskable entries, N all of the model's; its gradient is 0 at theta_0."""
        if not self.l1:
            return torch.zeros(())
        run = self.run
        # Frozen entries of the sparse phase are at theta_0 and add nothing.
        apart = [(weight - run.start[name]).abs().sum() for name, weight in run.maskable.items()]
        return self.l1 / run.parameters * torch.stack(apart).sum()


@dataclass(eq=False)
class TwoPhase:
    """A model under two-phase sparse fine-tuning.

    count: entries to select over all maskable tensors together. where: patterns of maskable parameters (default all but
    norms' and `full`). full: patterns of parameters trained whole and stored whole. chance: draw the entries instead of
    ranking them (Rand-SFT). Raises BadInput for a count that does not fit, and patterns that match nothing.
    """

    model: nn.Module
    count: int
    where: Sequence[str] = ()
    full: Sequence[str] = ()
    chance: bool = False
    eps: float = 1e-7
    seed: int = 0
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        self.parameters = sum(weight.numel() for weight in named.values())
        norms = {id(p) for m in self.model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
        for pattern in (*self.where, *self.full):
            if not any(fnmatchcase(name, pattern) for name in named):
                raise BadInput(f"{pattern!r} matches no parameter; names look like {', '.join(list(named)[:3])}")
        self.whole = {name: w for name, w in named.items() if any(fnmatchcase(name, p) for p in self.full)}
        self.maskable = {
            name: weight for name, weight in named.items()
            if name not in self.whole and weight.dtype.is_floating_point
            and (any(fnmatchcase(name, p) for p in self.where) if self.where else id(weight) not in norms)
        }  # fmt: skip
        self.total = sum(weight.numel() for weight in self.maskable.values())
        if not 0 <= self.count <= self.total:
            raise BadInput(f"{self.count} entries were asked for, {self.total} of {len(self.maskable)} tensors are maskable")
        held = {**self.maskable, **self.whole}
        self.trainable = list(held.values())
        self.origin = {name: weight.detach().clone() for name, weight in held.items()}  # theta_0
        self.start = self.origin  # where the current round began
        self.kept = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in self.maskable.items()}

    def masks(self) -> MaskSet:
        """The entries selected so far."""
        return MaskSet({name: Mask(keep.clone()) for name, keep in self.kept.items()}, self.made_by)

    def merge(self) -> None:
        """Nothing to do: the model is trained in place."""

    def deltas(self) -> Deltas:
        """theta - theta_0 on the selected entries (differences up to eps dropped), and the tensors trained whole."""
        now = {**self.maskable, **self.whole}
        return delta(now, self.origin, masks=self.masks(), full=list(self.whole), eps=self.eps, made_by=self.made_by)

    @torch.no_grad()
    def select(self, number: int) -> None:
        """Add the `number` entries that moved most since the round began, ties to the lower index, then rewind everything.

        Differs: the code takes all entries at the threshold; where fewer moved, that is every entry. Here only moved ones.
        """
        if self.chance:
            self._draw(number)
        else:
            self._rank(number)
        self._rewind()

    @torch.no_grad()
    def _rewind(self) -> None:
        for name, value in self.start.items():
            (self.maskable if name in self.maskable else self.whole)[name].copy_(value)

    def _rank(self, number: int) -> None:
        pieces = [(n, a) for n, weight in self.maskable.items() for a in range(0, weight.numel(), _CHUNK)]

        def moved(i: int) -> Tensor:
            name, at = pieces[i]
            part = slice(at, at + _CHUNK)
            gap = (self.maskable[name].view(-1)[part].float() - self.start[name].view(-1)[part].float()).cpu()
            return gap.masked_fill_(self.kept[name].view(-1)[part], 0)

        def pair(i: int, count: int) -> Pair:
            gap = moved(i)[: count or None]
            return piece(torch.zeros_like(gap)), piece(gap)

        there = sum(int(moved(i).count_nonzero()) for i in range(len(pieces)))
        if there < number:
            warnings.warn(f"{number} entries were asked for but only {there} moved: these are selected", stacklevel=3)
        row = Row("the change in training", tuple(at for _, at in pieces), self.total, pair)
        (cut,) = cuts(row, (min(there, number),))
        for i, (name, at) in enumerate(pieces):
            self.kept[name].view(-1)[at : at + _CHUNK] |= stays(moved(i), cut.keep(i))

    def _draw(self, number: int) -> None:
        free = torch.cat([torch.where(keep.flatten(), -torch.inf, 0.0) for keep in self.kept.values()])
        rng = generator(self.seed, "two-phase")
        keep = draw(Unstructured(), (self.total,), number, rng=rng, score=free).keep
        for kept, part in zip(self.kept.values(), keep.split([k.numel() for k in self.kept.values()]), strict=True):
            kept.view(-1)[:] |= part

    def fit(self, train: Train, rounds: int = 1, l1: tuple[float, float] = (0.0, 0.0)) -> Deltas:
        """Both phases, `rounds` times: each adds its share of the entries. l1: of the full and the sparse phase.

        Leaves the model trained (theta_0 plus the deltas). Raises BadInput when rounds is not positive.
        """
        if rounds < 1:
            raise BadInput(f"rounds must be at least 1, got {rounds}")
        for turn in range(rounds):
            if not self.chance:
                train(Phase("full", self, l1[0]))
            self.select(self.count * (turn + 1) // rounds - self.count * turn // rounds)
            train(Phase("sparse", self, l1[1]))
            if turn + 1 < rounds:
                self.start = {name: weight.detach().clone() for name, weight in {**self.maskable, **self.whole}.items()}
        return self.deltas()


@contextmanager
def two_phase(run: TwoPhase) -> Iterator[TwoPhase]:
    """Freeze what is neither maskable nor trained whole while the context lasts; flags and modes are put back at the end."""
    with untouched(run.model, run.trainable, lambda: True):  # trained in place: buffers go along
        yield run


Attached = AbstractContextManager[TwoPhase]
