"""`add`: put sparse differences on a model and take them off again to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet, tensor_hash
from maskwright.kernels import scatter
from maskwright.updates.deltas import Deltas, quick_id, quick_ids

Term = Deltas | tuple[Deltas, float] | tuple[Deltas, MaskSet, float]
Check = Literal["quick", "full", "none"]
Pair = tuple[Tensor, Tensor]  # indices, values
# By model what is on it, the last at the end: the terms of an `Added` and not itself, which would keep the model alive.
_ON: WeakKeyDictionary[nn.Module, list[tuple[Deltas, ...]]] = WeakKeyDictionary()


@dataclass(eq=False)
class Added:
    """What `add` changed. `undo()` (or leaving a `with`) puts the old values back, bit for bit."""

    model: nn.Module
    terms: tuple[Deltas, ...]
    old: list[tuple[Tensor, Tensor | None, Tensor]]
    live: bool = True

    def __enter__(self) -> Added:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the entries that were touched. Raises BadInput when something added later is still on."""
        if not self.live:
            return
        on = _ON.get(self.model, [])
        if on and on[-1] is not self.terms:
            raise BadInput("another delta was added after this one: take that off first")
        for target, where, values in reversed(self.old):  # two names may be one tensor
            if where is None:
                target.copy_(values)
            else:
                target.view(-1)[where] = values
        self.live, self.old = False, []
        on[-1:] = []


@torch.no_grad()
def add(model: nn.Module, *terms: Term, check: Check = "quick") -> Added:
    """model += sum of the terms: Deltas, or (Deltas, coefficient), or (Deltas, masks, coefficient).

    Sums are made in float32 and rounded once to the parameter's dtype, so the order of the terms in one call only moves the
    last bit. Tensors in a delta's `full` replace the model's. Used in a `with`, or by `undo()`, the old values come back
    bit for bit, however often. check: "quick" compares 1,024 entries of each touched tensor with the base the deltas were
    made for, "full" all of them, "none" neither. The parameters' own memory is changed, so that what shares it sees the sum;
    where it is mapped from a file it becomes memory of this process at the same addresses, and no other thread may write to
    it meanwhile. Raises BadInput for another base, a delta that is already on, names or shapes that the model lacks, a
    tensor replaced twice.
    """
    parts = [_term(term) for term in terms]
    on = _ON.setdefault(model, [])
    for deltas, *_ in parts:
        if any(deltas.key == one.key for terms_on in on for one in terms_on):
            raise BadInput("this delta is already on the model: undo() it first")
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    quick = _quick_ids(parts, known) if check != "none" and not on else {}
    touched: dict[str, list[tuple[Tensor, Tensor]]] = {}
    replaced: dict[str, Tensor] = {}
    for deltas, masks, factor in parts:
        for name, value in deltas.full.items():
            if name in replaced:
                raise BadInput(f"{name} would be replaced twice: use without_full() on one of the deltas")
            _fits(name, known, tuple(value.shape))
            replaced[name] = value
        for name, delta in deltas.items():
            _fits(name, known, delta.shape)
            if not on:  # with something on already, the model is no longer the base
                same_base(name, known[name], deltas, check, quick)
            part = delta.only(masks[name]) if masks is not None and name in masks else delta
            touched.setdefault(name, []).append((part.indices, part.values * factor if factor != 1 else part.values))
    both = set(touched) & set(replaced)
    if both:
        raise BadInput(f"{min(both)} would be both added to and replaced")
    targets = [known[name].detach() for name in touched]
    for name, target in zip(touched, targets, strict=True):
        if not target.is_contiguous():
            raise BadInput(f"{name}: the parameter is not contiguous in memory")
    old = _added(targets, list(touched.values()))
    for name, value in replaced.items():
        target = known[name].detach()
        old.append((target, None, target.clone()))
        target.copy_(value)
    done = Added(model, tuple(deltas for deltas, *_ in parts), old)
    on.append(done.terms)
    return done


def _added(targets: Sequence[Tensor], pieces: Sequence[Sequence[Pair]]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    totals = [each[0] if len(each) == 1 else _total(target, each) for target, each in zip(targets, pieces, strict=True)]
    where = [indices for indices, _ in totals]
    return list(zip(targets, where, scatter.add(targets, where, [values for _, values in totals]), strict=True))


def _total(target: Tensor, pieces: Sequence[Pair]) -> Pair:
    where, place = torch.cat([indices for indices, _ in pieces]).unique(return_inverse=True)
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(where), dtype=wide)
    total.index_add_(0, place, torch.cat([values.to(wide) for _, values in pieces]))
    return where, total


def _quick_ids(parts: Sequence[tuple[Deltas, MaskSet | None, float]], known: Mapping[str, Tensor]) -> dict[str, str]:
    asked = dict.fromkeys(name for deltas, *_ in parts for name in deltas.base)
    names = [name for name in asked if name in known and known[name].dtype.is_floating_point]
    return dict(zip(names, quick_ids([known[name] for name in names]), strict=True))


def _term(term: Term) -> tuple[Deltas, MaskSet | None, float]:
    parts = (term,) if isinstance(term, Deltas) else tuple(term)
    deltas, factor = parts[0], parts[-1] if len(parts) > 1 else 1.0
    masks = parts[1] if len(parts) == 3 else None
    if not isinstance(deltas, Deltas) or not isinstance(factor, int | float):
        raise BadInput("a term is Deltas, (Deltas, coefficient) or (Deltas, masks, coefficient)")
    if deltas.full and factor != 1:
        raise BadInput(f"{next(iter(deltas.full))} replaces the base's tensor and cannot be scaled: use without_full()")
    return deltas, masks, float(factor)  # type: ignore[return-value]


def _fits(name: str, known: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    if name not in known:
        raise BadInput(f"the model has no {name}, which the delta changes")
    if tuple(known[name].shape) != shape:
        raise BadInput(f"{name}: the delta has shape {shape}, the model {tuple(known[name].shape)}")
    if not known[name].dtype.is_floating_point:
        raise BadInput(f"{name}: {known[name].dtype} cannot take a delta")


def added(name: str, value: Tensor, terms: Sequence[tuple[Deltas, float]]) -> Tensor:
    """One tensor of a base with the terms' sum added (changed in place), or the tensor that replaces it."""
    whole = [deltas.full[name] for deltas, _ in terms if name in deltas.full]
    pieces = [(deltas[name].indices, deltas[name].values * factor) for deltas, factor in terms if name in deltas]
    if len(whole) > 1 or (whole and pieces):
        raise BadInput(f"{name} would be replaced and changed: use without_full() on one of the deltas")
    for shape in {tuple(w.shape) for w in whole} | {deltas[name].shape for deltas, _ in terms if name in deltas}:
        if shape != tuple(value.shape):
            raise BadInput(f"{name}: the delta has shape {shape}, the model {tuple(value.shape)}")
    if whole:
        return whole[0].to(value.dtype)
    if pieces:
        _added([value], [pieces])
    return value


def same_base(
    name: str, value: Tensor, deltas: Deltas, check: Check, quick: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise BadInput when the deltas were made for another tensor. quick: quick ids that are known already, by name."""
    if check == "none" or name not in deltas.base:
        return
    theirs = deltas.base[name]
    if (quick.get(name) or quick_id(value)) != theirs.quick or (check == "full" and tensor_hash(value) != theirs.full):
        raise BadInput(f"{name}: the delta was made for another base (--any-base, or check='none', adds it all the same)")
