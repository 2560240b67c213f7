"""Merging models tuned from one base: delta -> sparsify -> rescale -> weight -> consensus -> scale -> add.

Tensor by tensor and chunk by chunk, so that neither a model nor a tensor need be in memory. Deltas are float32 (float64
for float64 tensors) whatever the models are stored in, and the result has the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from fnmatch import fnmatchcase
from functools import partial
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.updates.consensus import Elected
from maskwright.updates.cuts import Row, each, finite
from maskwright.updates.parts import MergeMethod, Parts, Shape, TensorReport, Tensors
from maskwright.updates.sparsify import All, Kept, Sparsify

CHUNK = 1 << 18  # entries: four float32 buffers of it stay in cache
DENSE = ("*running_mean", "*running_var")  # a pruned variance may go negative: statistics are merged whole


class _Choice(NamedTuple):
    """What one model keeps of a tensor: the choice, the chunk of its row at which the tensor begins, the rescaling."""

    kept: Kept
    first: int
    factor: float


class Merging:
    """One merge. `tensor(name, write)` does the work of one tensor, in any order and with the same bits.

    methods: one for all models or one each (their consensus and scale must agree). weights: one a model, default 1.
    stats: also count overlap and conflict (slower). Raises BadInput when the models do not fit the base.
    """

    def __init__(
        self, base: Tensors, tuned: Sequence[Tensors], methods: MergeMethod | Sequence[MergeMethod], *,
        weights: Sequence[float] | None = None, seed: int = 0, stats: bool = False, pool: Executor | None = None,
    ) -> None:  # fmt: skip
        self.base, self.tuned, self.seed, self.stats, self.pool = base, list(tuned), seed, stats, pool
        if not self.tuned:
            raise BadInput("nothing to merge: no model was given beside the base")
        given = [methods] * len(self.tuned) if isinstance(methods, MergeMethod) else list(methods)
        self.parts = [method.parts() for method in given]
        self.weights = [1.0] * len(self.tuned) if weights is None else [float(weight) for weight in weights]
        self._refuse()
        self.shapes = self._same_shapes()
        self.common = self.parts[0]
        self.names = [name for name, (dtype, _) in self.shapes.items() if dtype.is_floating_point]
        self._pieces = {name: self._cut_up(shape) for name, (_, shape) in self.shapes.items()}
        self.leaning = 0.0
        self._whole: dict[int, Kept] = {}
        self._first: dict[str, int] = {}

    def _refuse(self) -> None:
        number = len(self.tuned)
        for what, told in (("methods", self.parts), ("weights", self.weights)):
            if len(told) != number:
                raise BadInput(f"{number} models but {len(told)} {what}")
        if not all(map(isfinite, self.weights)):
            raise BadInput(f"weights are finite numbers, got {self.weights}")
        first = self.parts[0]
        if any(p.consensus != first.consensus or p.scale != first.scale for p in self.parts[1:]):
            raise BadInput("the models' methods must agree on consensus, normalise and scale")
        if first.consensus.normalise and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise BadInput(
                f"normalise divides by the sum of the weights: they must be >= 0 and not all 0, got {self.weights}"
            )

    def _same_shapes(self) -> dict[str, tuple[torch.dtype, Shape]]:
        mine = dict(self.base.shapes())
        for model in self.tuned:
            theirs = model.shapes()
            for what, odd in (
                ("lacks", [n for n in mine if n not in theirs]),
                ("adds", [n for n in theirs if n not in mine]),
            ):
                if odd:
                    raise BadInput(f"{model.what}: {what} {_some(odd)}; the base is {self.base.what}")
            wrong = [name for name in mine if theirs[name][1] != mine[name][1]]
            if wrong:
                told = f"{wrong[0]} has shape {theirs[wrong[0]][1]}, in the base {mine[wrong[0]][1]}"
                raise BadInput(f"{model.what}: {told} ({len(wrong)} of {len(mine)} tensors differ)")
            wrong = [name for name in mine if theirs[name][0].is_floating_point != mine[name][0].is_floating_point]
            if wrong:
                raise BadInput(f"{model.what}: {wrong[0]} is {theirs[wrong[0]][0]}, in the base {mine[wrong[0]][0]}")
        return mine

    # Reading

    def _cut_up(self, shape: Shape) -> list[tuple[int, int]]:
        """Where the pieces of a tensor begin and end; whole rows where rows compete."""
        length, width = prod(shape), _width(shape)
        by_row = any(part.sparsify.group == "row" for part in self.parts)
        step = max(1, CHUNK // width) * width if by_row and width else CHUNK
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def delta(self, model: int, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """tuned - base of a piece, float32 or float64, as a new tensor."""
        mine = self.base.read(name, start, stop) if base is None else base
        theirs = self.tuned[model].read(name, start, stop)
        wide = torch.float64 if torch.float64 in (mine.dtype, theirs.dtype) else torch.float32
        out = theirs.to(wide)
        return torch.sub(out, mine) if out is theirs else out.sub_(mine)

    def _row(self, model: int, names: Sequence[str]) -> Row:
        places = [(name, start, stop) for name in names for start, stop in self._pieces[name]]
        what = names[0] if len(names) == 1 else f"all {len(names)} tensors"
        length = sum(stop - start for _, start, stop in places)
        starts = tuple(start for _, start, _ in places)
        return Row(what, starts, length, lambda i: self.delta(model, *places[i]), f"{model}:{what}")

    # Plans

    def prepare(self, progress: Callable[[str], None] = lambda told: None) -> None:
        """What needs to see the whole model before its first tensor: global thresholds, the sign a tie elects."""
        names = [name for name in self.names if not _dense(name, self.shapes[name][1])]
        at = 0
        for name in names:
            self._first[name] = at
            at += len(self._pieces[name])
        for model, part in enumerate(self.parts):
            if part.sparsify.group == "global":
                progress(f"threshold over all tensors of {self.tuned[model].what}")
                self._whole[model] = part.sparsify.plan(self._row(model, names), 0, self.seed, self.pool)
        if isinstance(self.common.consensus, Elected) and self.common.consensus.zero == "majority":
            progress("the sign of the sum of all signs")
            total = 0
            for name in self.names:
                kept = self._kept(name)
                total += sum(each(self.pool, partial(self._signs, name, kept), range(len(self._pieces[name]))))
            self.leaning = float((total > 0) - (total < 0))

    def _signs(self, name: str, kept: Sequence[_Choice], chunk: int) -> int:
        parts = [part.mul_(w) for part, w in zip(self._deltas(name, kept, chunk)[1], self.weights, strict=True)]
        return int(Elected.total(parts).sign_().sum(dtype=torch.float64))

    def _kept(self, name: str) -> list[_Choice]:
        out: list[_Choice] = []
        shape = self.shapes[name][1]
        for model, part in enumerate(self.parts):
            sparsify: Sparsify = All() if _dense(name, shape) else part.sparsify
            if model in self._whole and name in self._first:
                kept, first = self._whole[model], self._first[name]
            else:
                row = self._row(model, [name])
                kept, first = sparsify.plan(row, _width(shape), self.seed, self.pool), 0
            out.append(_Choice(kept, first, self._factor(model, name, kept, first, part, sparsify)))
        return out

    def _factor(self, model: int, name: str, kept: Kept, first: int, part: Parts, sparsify: Sparsify) -> float:
        if part.rescale == "none" or isinstance(sparsify, All):
            return 1.0
        if part.rescale == "density":
            return 1.0 / sparsify.density  # type: ignore[attr-defined]
        pieces = self._pieces[name]

        def norms(i: int) -> tuple[float, float]:
            delta = self.delta(model, name, *pieces[i])
            before = float(delta.abs().sum(dtype=torch.float64))
            return before, float(kept.masked(delta, first + i).abs_().sum(dtype=torch.float64))

        found = list(each(self.pool, norms, range(len(pieces))))
        before, after = (sum(pair[side] for pair in found) for side in (0, 1))
        return before / after if after else 1.0

    # Work

    def _deltas(self, name: str, kept: Sequence[_Choice], chunk: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Of one chunk: the base, the sparse, rescaled deltas, and (with stats) what each model keeps."""
        start, stop = self._pieces[name][chunk]
        base = self.base.read(name, start, stop)
        deltas, keeps = [], []
        for model, (choice, first, factor) in enumerate(kept):
            delta = self.delta(model, name, start, stop, base)
            if self.stats:
                keeps.append(choice.keep(delta, first + chunk))
                delta = torch.where(keeps[-1], delta, 0.0)
            else:
                delta = choice.masked(delta, first + chunk)
            deltas.append(delta.mul_(factor) if factor != 1 else delta)
        return base, deltas, keeps

    def tensor(
        self, name: str, write: Callable[[int, Tensor], None], dtype: torch.dtype | None = None
    ) -> TensorReport | None:
        """Merge one tensor; `write(start, piece)` gets it in pieces, from the pool's threads and in any order.

        dtype: of the pieces (default the base's). Tensors that hold no floats are passed on from the base. Raises
        BadInput naming the tensor when a delta is NaN or infinite.
        """
        own, shape = self.shapes[name]
        pieces = self._pieces[name]
        if not own.is_floating_point:
            for start, stop in pieces:
                write(start, self.base.read(name, start, stop))
            return None
        kept = self._kept(name)
        report = TensorReport(prod(shape), [0] * len(kept))

        def work(chunk: int) -> TensorReport:
            base, deltas, keeps = self._deltas(name, kept, chunk)
            told = _count(deltas, keeps) if self.stats else TensorReport(0, [])
            out = self.common.consensus.combine(deltas, self.weights, self.leaning)
            if self.common.scale != 1:
                out.mul_(self.common.scale)
            finite(out, name)
            piece = out.add_(base).to(dtype or own)
            if piece.dtype == torch.float16 and not bool(torch.isfinite(piece).all()):  # beyond 65,504
                raise BadInput(f"{name}: {int((~torch.isfinite(piece)).sum())} merged entries do not fit float16")
            write(pieces[chunk][0], piece)
            return told

        for told in each(self.pool, work, range(len(pieces))):
            report.overlap += told.overlap
            report.conflict += told.conflict
            report.kept = [a + b for a, b in zip(report.kept, told.kept, strict=True)] if told.kept else report.kept
        return report


def _count(deltas: Sequence[Tensor], keeps: Sequence[Tensor]) -> TensorReport:
    number = torch.stack(list(keeps)).sum(0)
    up, down = (torch.stack([d > 0 if up else d < 0 for d in deltas]).any(0) for up in (True, False))
    return TensorReport(
        len(number), [int(keep.sum()) for keep in keeps], int((number > 1).sum()), int((up & down).sum())
    )  # fmt: skip


def _dense(name: str, shape: Shape) -> bool:
    return not shape or any(fnmatchcase(name, pattern) for pattern in DENSE)


def _width(shape: Shape) -> int:
    # A convolution's row is all that makes one output: its last dim alone has 3 entries, of which int(0.2 * 3) keeps none.
    return prod(shape[1:]) if len(shape) > 1 else prod(shape)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)} tensors)" if len(names) > 3 else "")
