"""Merging models tuned from one base: delta -> sparsify -> rescale -> weight -> consensus -> scale -> add.

Tensor by tensor and chunk by chunk, so that neither a model nor a tensor need be in memory. Deltas are float32 (float64
for float64 tensors) whatever the models are stored in, and the result has the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import NamedTuple

import torch

from maskwright.core.errors import BadInput
from maskwright.kernels.merge import ENDED, Keep, Piece, Side, combine
from maskwright.updates.consensus import Elected
from maskwright.updates.cuts import Pair, Row, each
from maskwright.updates.fitting import agreeing, plain, same_shapes
from maskwright.updates.parts import MergeMethod, Place, Shape, TensorReport, Tensors
from maskwright.updates.pieces import BASE, Pieces
from maskwright.updates.sparsify import All, Band, Kept, Sparsify
from maskwright.updates.survivors import count, norms, sparse

CHUNK = 1 << 20  # entries: enough that starting the work of a chunk costs little beside it
SMALL = 256 << 20  # bytes of all models' versions of a tensor: up to so many it is one thread's work, and held by it
DENSE = ("*running_mean", "*running_var")  # a pruned variance may go negative: statistics are merged whole


class _Choice(NamedTuple):
    """What one model keeps of a tensor: the choice, the chunk of its row at which the tensor begins, the rescaling."""

    choice: Kept
    first: int
    factor: float

    def keep(self, chunk: int, pair: Pair) -> Keep:
        """What stays of one chunk of the tensor."""
        return self.choice.keep(self.first + chunk, lambda: pair)


class Merging:
    """One merge. `run` does the work of all tensors, `tensor` of one; in any order and with the same bits.

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
        agreeing(self.parts, self.weights, len(self.tuned))
        self.shapes = same_shapes(base, self.tuned)
        self.common = self.parts[0]
        self.names = [name for name, (dtype, _) in self.shapes.items() if dtype.is_floating_point]
        self._cut = {name: self._cut_up(shape) for name, (_, shape) in self.shapes.items()}
        self.leaning = 0.0
        self._whole: dict[int, Kept] = {}
        self._first: dict[str, int] = {}
        self.pieces = Pieces(base, self.tuned)

    # Reading

    def _cut_up(self, shape: Shape) -> list[tuple[int, int]]:
        """Where the pieces of a tensor begin and end; whole rows where rows compete."""
        length, width = prod(shape), _width(shape)
        by_row = any(part.sparsify.group == "row" for part in self.parts)
        step = max(1, CHUNK // width) * width if by_row and width else CHUNK
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def _row(self, model: int, names: Sequence[str]) -> Row:
        places = [(name, start, stop) for name in names for start, stop in self._cut[name]]
        what = names[0] if len(names) == 1 else f"all {len(names)} tensors"
        length = sum(stop - start for _, start, stop in places)
        starts = tuple(start for _, start, _ in places)
        wide = self.wide(model, names)
        return Row(
            plain(what), starts, length, lambda i, count: self.pieces.pair(model, *places[i], count), f"{model}:{what}", wide
        )

    def wide(self, model: int, names: Sequence[str]) -> bool:
        """Whether deltas of these tensors are float64."""
        return any(m.shapes()[name][0] == torch.float64 for name in names for m in (self.base, self.tuned[model]))

    # Plans

    def prepare(self, progress: Callable[[str], None] = lambda told: None) -> None:
        """What needs to see the whole model before its first tensor: global thresholds, the sign a tie elects."""
        names = [name for name in self.names if not _dense(name, self.shapes[name][1])]
        at = 0
        for name in names:
            self._first[name] = at
            at += len(self._cut[name])
        for model, part in enumerate(self.parts):
            if part.sparsify.group == "global":
                progress(f"threshold over all tensors of {self.tuned[model].what}")
                self._whole[model] = part.sparsify.plan(self._row(model, names), 0, self.seed, self.pool)
        if isinstance(self.common.consensus, Elected) and self.common.consensus.zero == "majority":
            progress("the sign of the sum of all signs")
            total = 0
            for name in self.names:
                choices = self._choices(name, self.pool)
                total += sum(each(self.pool, partial(self._signs, name, choices), range(len(self._cut[name]))))
            self.leaning = float((total > 0) - (total < 0))

    def _signs(self, name: str, choices: Sequence[_Choice], chunk: int) -> int:
        """The sum of the signs that the election of one chunk starts from."""
        base, tuned, sides = self._chunk(name, choices, chunk)
        parts = [delta.mul_(side.weight) for (delta, _), side in zip(sparse(base, tuned, sides), sides, strict=True)]
        return int(sum(parts[1:], parts[0]).sign_().sum(dtype=torch.float64))

    def _choices(self, name: str, pool: Executor | None) -> list[_Choice]:
        out: list[_Choice] = []
        shape = self.shapes[name][1]
        for model, part in enumerate(self.parts):
            sparsify: Sparsify = All() if _dense(name, shape) else part.sparsify
            if model in self._whole and name in self._first:
                choice, first = self._whole[model], self._first[name]
            else:
                row = self._row(model, [name])
                choice, first = sparsify.plan(row, _width(shape), self.seed, pool), 0
            made = _Choice(choice, first, 1.0)
            out.append(made._replace(factor=self._factor(model, name, made, sparsify, pool)))
        return out

    def _factor(self, model: int, name: str, choice: _Choice, sparsify: Sparsify, pool: Executor | None) -> float:
        part = self.parts[model]
        if part.rescale == "none" or isinstance(sparsify, All):
            return 1.0
        if part.rescale == "density":
            return 1.0 / sparsify.density  # type: ignore[attr-defined]
        pieces = self._cut[name]

        def both(i: int) -> tuple[float, float]:
            pair = self.pieces.pair(model, name, *pieces[i])
            return norms(*pair, choice.keep(i, pair))

        found = list(each(pool, both, range(len(pieces))))
        before, after = (sum(pair[side] for pair in found) for side in (0, 1))
        return before / after if after else 1.0

    # Work

    def _chunk(self, name: str, choices: Sequence[_Choice], chunk: int) -> tuple[Piece, list[Piece], list[Side]]:
        """Of one chunk: the base's piece, the models', and what is taken of each."""
        piece = self._cut[name][chunk]
        base = self.pieces.read(BASE, name, *piece)
        tuned = [self.pieces.read(model, name, *piece) for model in range(len(choices))]
        return base, tuned, [
            Side(choice.keep(chunk, (base, other)), choice.factor, weight)
            for choice, other, weight in zip(choices, tuned, self.weights, strict=True)
        ]  # fmt: skip

    def run(
        self, names: Iterable[str], place: Callable[[str, int, int], Place], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, TensorReport | None]]:
        """Merge tensors; each comes with its report as soon as it is whole, small ones side by side, then great ones.

        place(name, start, stop): where entries of the result go; asked from the pool's threads, in any order. dtype: of
        the result (default the base's). Tensors that hold no floats are passed on from the base. Raises BadInput naming
        the tensor when a delta is NaN or infinite, or a result does not fit.
        """
        names = list(names)
        small = [name for name in names if self.pieces.nbytes(name) <= SMALL]

        def work(name: str) -> tuple[str, TensorReport | None]:
            return name, self.tensor(name, partial(place, name), dtype, alone=True)

        yield from each(self.pool, work, small, ahead=64)
        for name in names:
            if self.pieces.nbytes(name) > SMALL:
                yield name, self.tensor(name, partial(place, name), dtype)

    def tensor(
        self, name: str, place: Callable[[int, int], Place], dtype: torch.dtype | None = None, *, alone: bool = False
    ) -> TensorReport | None:
        """Merge one tensor, as `run` says. alone: in this thread only."""
        own = self.shapes[name][0]
        if not own.is_floating_point:
            for start, stop in self._cut[name]:
                whole = self.pieces.read(BASE, name, start, stop).load()
                self.pieces.result(place(start, stop), len(whole), own).store(whole)
            return None
        pool = None if alone else self.pool
        again = any((isinstance(p.sparsify, Band) and p.sparsify.group == "tensor") or p.rescale == "l1" for p in self.parts)
        with self.pieces.holding(name) if again and pool is None else nullcontext():
            try:
                return self._merge(name, self._choices(name, pool), place, dtype or own, pool)
            except BadInput as error:
                raise BadInput(f"{plain(name)}: {error}" if str(error) == ENDED else str(error)) from None

    def _merge(
        self, name: str, choices: Sequence[_Choice], place: Callable[[int, int], Place], dtype: torch.dtype,
        pool: Executor | None,
    ) -> TensorReport:  # fmt: skip
        pieces = self._cut[name]
        rule = self.common.consensus.rule(self.weights, self.leaning, self.common.scale)
        report = TensorReport(prod(self.shapes[name][1]), [0] * len(choices))

        def work(chunk: int) -> TensorReport:
            base, tuned, sides = self._chunk(name, choices, chunk)
            out = self.pieces.result(place(*pieces[chunk]), base.length, dtype)
            odd, beyond = combine(base, tuned, sides, rule, out)
            if odd:
                raise BadInput(f"{plain(name)}: {odd} deltas are NaN or infinite")
            if beyond:
                raise BadInput(f"{plain(name)}: {beyond} merged entries do not fit {str(dtype).removeprefix('torch.')}")
            return count(sparse(base, tuned, sides)) if self.stats else TensorReport(0, [])

        for told in each(pool, work, range(len(pieces))):
            report.overlap += told.overlap
            report.conflict += told.conflict
            report.kept = [a + b for a, b in zip(report.kept, told.kept, strict=True)] if told.kept else report.kept
        return report


def _dense(name: str, shape: Shape) -> bool:
    return not shape or any(fnmatchcase(name, pattern) for pattern in DENSE)


def _width(shape: Shape) -> int:
    # A convolution's row is all that makes one output: its last dim alone has 3 entries, of which int(0.2 * 3) keeps none.
    return prod(shape[1:]) if len(shape) > 1 else prod(shape)
