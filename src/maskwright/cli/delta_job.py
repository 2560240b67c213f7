"""What `maskwright delta` does between reading its words and writing: differences made, delta files read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from maskwright.cli.merge_tokenizers import same_tokenizer
from maskwright.cli.verify import chosen
from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.kernels.merge import difference, kept
from maskwright.models.folder import apart
from maskwright.models.streams import FileTensors
from maskwright.updates import Deltas, Merging
from maskwright.updates.base import BaseId, around
from maskwright.updates.cuts import Pair, Row, cuts
from maskwright.updates.deltas import Delta
from maskwright.updates.fitting import matching
from maskwright.updates.parts import Tensors
from maskwright.updates.task_arithmetic import TaskArithmetic

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def opened(tuned: Path, base: Path, out: Path, replace: bool, any_tokenizer: bool) -> tuple[FileTensors, FileTensors]:
    """Both models. Raises BadInput where `out` may not be written, or a token of one means another thing in the other."""
    new, old = FileTensors(tuned), FileTensors(base)
    separate(out, [path for each in (new, old) for path in (each.path, *(raw.path for raw in each.raws))])
    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent}: no such folder")
    if not any_tokenizer:
        same_tokenizer(base, tuned)
    return new, old


def made(new: FileTensors, old: FileTensors, *, density: float | None, where: Sequence[str], full: Sequence[str]) -> Deltas:
    """new - old. density: the share of entries to keep, the greatest over all tensors. where: patterns of the tensors to
    compare. full: patterns of those that are stored whole. Raises BadInput for a pattern that matches nothing.
    """
    whole = matching((name for name, (dtype, _) in new.shapes().items() if dtype.is_floating_point), full)
    for model in (new, old):
        model.leave_out(full)
    names = chosen(dict.fromkeys([*new.shapes(), *old.shapes()]), where)
    merging = _Differences(_Some(old, names), _Some(new, names))
    cut = merging.cut(density) if density is not None else None

    def known(name: str) -> BaseId:
        return BaseId.of(old.read(name, 0, old.length(name)).view(old.shape(name)))

    found, ids = {}, {}
    for name in merging.names:
        gap = merging.gap(name)
        stay = (gap != 0) if cut is None else (gap != 0) & cut(name, gap)
        if bool(stay.any()):
            at = stay.nonzero().flatten()
            found[name] = Delta(merging.shapes[name][1], at, gap[at])
            ids[name] = known(name)
    if whole and not found:
        left = {name: shape for name, (dtype, shape) in old.shapes().items() if dtype.is_floating_point}
        ids = {name: known(name) for name in around(left)}
    held = {name: new.read(name, 0, new.length(name)).view(new.shape(name)) for name in whole}
    told = {"method": "delta", "tuned": str(new.path), "base": str(old.path), "density": density}
    return Deltas(found, held, ids, told | ({"where": list(where)} if where else {}))


def scaled(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`."""
    path, _, told = text.rpartition(":")
    try:
        factor = float(told)
    except ValueError:
        return Path(text), 1.0
    if not path:
        return Path(text), 1.0
    if not isfinite(factor):
        raise BadInput(f"{text}: a scale is a finite number")
    return Path(path), factor


def loaded(given: Sequence[tuple[Path, float]]) -> list[tuple[Deltas, float]]:
    """The deltas of the files. Raises BadInput for one that is given twice, or that cannot be scaled and shall be."""
    terms: list[tuple[Deltas, float]] = []
    keys: dict[str, Path] = {}
    for path, factor in given:
        deltas = Deltas.load(path)
        if deltas.full and factor != 1:
            raise BadInput(f"{path}: {next(iter(deltas.full))} replaces the base's tensor and cannot be scaled")
        if len(given) > 1 and (first := keys.setdefault(deltas.key, path)) is not path:
            raise BadInput(
                f"{path}: the same delta as {first}, which would count twice; give it once with the sum of scales"
            )
        terms.append((deltas, factor))
    return terms


def separate(out: Path, read: Iterable[Path]) -> None:
    """Raise BadInput when writing `out` would change what is read, or lie within it."""
    for path in read:
        if out.resolve() == path.resolve():
            raise BadInput(f"{out} is read; choose another name to write")
        apart(out, path)


class _Some:
    """Some of a checkpoint's tensors."""

    def __init__(self, source: FileTensors, names: Collection[str]) -> None:
        self.what, self.place = source.what, source.place
        self._shapes = {name: source.shapes()[name] for name in names if name in source.shapes()}

    def shapes(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self._shapes


class _Differences:
    """tuned - base of each tensor, and the cut that keeps a share of all of them."""

    def __init__(self, base: Tensors, tuned: Tensors) -> None:
        self.merging = Merging(base, [tuned], TaskArithmetic())  # refuses what does not fit, by name
        self.names, self.shapes = self.merging.names, self.merging.shapes

    def gap(self, name: str) -> Tensor:
        return difference(*self.pair(name))

    def pair(self, name: str, count: int = 0) -> Pair:
        return self.merging.pieces.pair(0, name, 0, prod(self.shapes[name][1]), count)

    def cut(self, density: float) -> Callable[[str, Tensor], Tensor]:
        total, wide = sum(prod(self.shapes[name][1]) for name in self.names), self.merging.wide(0, self.names)
        row = Row("all tensors", (0,) * len(self.names), total, lambda i, count: self.pair(self.names[i], count), wide=wide)
        (found,) = cuts(row, (whole(density, total),))
        return lambda name, gap: kept(gap, found.keep(self.names.index(name)))
