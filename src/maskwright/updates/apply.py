"""`add`: put sparse differences on a model and take them off again to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType, TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.kernels import scatter
from maskwright.updates.base import Check, Layer, is_base, quick_ids
from maskwright.updates.deltas import Deltas, odd, wide

Term = Deltas | tuple[Deltas, float] | tuple[Deltas, MaskSet, float]
Pair = tuple[Tensor, Tensor]  # indices, values
Old = list[tuple[Tensor, Tensor | None, Tensor]]  # a tensor, where it was changed (None: all of it), what was there
# By model what is on it, the last at the end: the parts of an `Added` and not itself, which would keep the model alive.
_ON: WeakKeyDictionary[nn.Module, list[tuple[tuple[Deltas, ...], Old]]] = WeakKeyDictionary()


@dataclass(eq=False)
class Added:
    """What `add` changed. `undo()` (or leaving a `with`) puts the old values back, bit for bit."""

    model: nn.Module
    terms: tuple[Deltas, ...]
    old: Old
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
        if on and on[-1][0] is not self.terms:
            raise BadInput("another delta was added after this one: take that off first")
        _put_back(self.old)
        self.live, self.old = False, []
        on[-1:] = []


@torch.no_grad()
def add(model: nn.Module, *terms: Term, check: Check = "quick") -> Added:
    """model += sum of the terms: Deltas, or (Deltas, coefficient), or (Deltas, masks, coefficient).

    Sums are made in float32 and rounded once to the parameter's dtype, so the order of the terms in one call only moves the
    last bit. Tensors in a delta's `full` replace the model's. Used in a `with`, or by `undo()`, the old values come back
    bit for bit, however often. check: "quick" compares 1,024 entries of each tensor that the deltas have an id of with the
    base they were made for, "full" all of them, "none" neither. What lies on the model already is no obstacle: a tensor
    that it changed may be the base as it is now, or as it was before any of the earlier calls. The parameters' own memory
    is changed, so that what shares it sees the sum; where it is mapped from a file it becomes memory of this process at
    the same addresses, and no other thread may write to it meanwhile. Raises BadInput for another base, a delta that is
    already on or given twice, names or shapes that the model lacks, a tensor replaced twice, a coefficient that is not
    finite, and a sum that is not finite in the parameter's dtype; the model is then as it was.
    """
    parts = [_term(term) for term in terms]
    on = _ON.setdefault(model, [])
    keys = [deltas.key for deltas, *_ in parts] if on or len(parts) > 1 else []
    if {deltas.key for there, _ in on for deltas in there} & set(keys):
        raise BadInput("this delta is already on the model: undo() it first")
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    quick, layers = _quick_ids(parts, known) if check != "none" else {}, _layers(on)
    touched: dict[str, list[Pair]] = {}
    replaced: dict[str, Tensor] = {}
    for deltas, masks, factor in parts:
        for name, value in deltas.full.items():
            if name in replaced:
                raise BadInput(f"{name} would be replaced twice: use without_full() on one of the deltas")
            _fits(name, known, tuple(value.shape))
            replaced[name] = fitting(name, value, known[name].dtype)
        for name, delta in deltas.items():
            _fits(name, known, delta.shape)
            part = delta.only(masks[name]) if masks is not None and name in masks else delta
            touched.setdefault(name, []).append((part.indices, part.values * factor if factor != 1 else part.values))
        for name in deltas.base:
            same_base(name, known.get(name), deltas, check, quick, layers)
    both = set(touched) & set(replaced)
    if both:
        raise BadInput(f"{min(both)} would be both added to and replaced")
    # Under masks a term is a part of its delta, and another part may have another coefficient.
    if len({(key, id(masks)) for key, (_, masks, _) in zip(keys, parts, strict=False)}) < len(keys):
        raise BadInput("a delta is given twice, and would count twice: give it once, with the sum of the coefficients")
    targets = [known[name].detach() for name in touched]
    for name, target in zip(touched, targets, strict=True):
        if not target.is_contiguous():
            raise BadInput(f"{name}: the parameter is not contiguous in memory")
    old = _added(list(touched), targets, list(touched.values()))
    for name, value in replaced.items():
        target = known[name].detach()
        old.append((target, None, target.clone()))
        target.copy_(value)
    done = Added(model, tuple(deltas for deltas, *_ in parts), old)
    on.append((done.terms, old))
    return done


def _layers(on: Sequence[tuple[tuple[Deltas, ...], Old]]) -> dict[int, list[Layer]]:
    """What lies on each tensor, by its address: two names may be one tensor."""
    found: dict[int, list[Layer]] = {}
    for _, old in on:
        for target, where, values in old:
            found.setdefault(target.data_ptr(), []).append((where, values))
    return found


def _added(names: Sequence[str], targets: Sequence[Tensor], pieces: Sequence[Sequence[Pair]]) -> Old:
    totals = [each[0] if len(each) == 1 else _total(target, each) for target, each in zip(targets, pieces, strict=True)]
    where, values = [indices for indices, _ in totals], [values for _, values in totals]
    before = scatter.add(targets, where, values)
    old: Old = list(zip(targets, where, before, strict=True))
    for dtype in dict.fromkeys(target.dtype for target in targets):
        mine = [i for i, target in enumerate(targets) if target.dtype == dtype]
        if _bound([before[i] for i in mine]) + _bound([values[i] for i in mine]) <= torch.finfo(dtype).max:
            continue  # so the weights need not be read again
        for i in mine:
            if beyond := odd(targets[i].view(-1)[where[i].to(targets[i].device)]):
                _put_back(old)
                raise BadInput(f"{names[i]}: {beyond} sums are NaN or infinite in {_said(dtype)}")
    return old


def _bound(pieces: Sequence[Tensor]) -> float:
    """A magnitude that none of the entries exceeds; NaN where one is."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for piece in pieces:
        if len(piece):
            alike.setdefault((piece.dtype, piece.device), []).append(piece)
    ends = [torch.aminmax(wide(torch.cat(same))) for same in alike.values()]
    return sum(max(-float(low), float(high)) for low, high in ends)


def _put_back(old: Old) -> None:
    for target, where, values in reversed(old):  # two names may be one tensor
        if where is None:
            target.copy_(values)
        else:
            target.view(-1)[where] = values


def fitting(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that replaces one of that dtype. Raises BadInput where an entry is not finite in it."""
    made = value.to(dtype)
    if beyond := odd(made):
        raise BadInput(f"{name}: {beyond} entries that replace the base's are NaN or infinite in {_said(dtype)}")
    return made


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _total(target: Tensor, pieces: Sequence[Pair]) -> Pair:
    where, place = torch.cat([indices for indices, _ in pieces]).unique(return_inverse=True)
    sums = torch.float64 if target.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(where), dtype=sums)
    total.index_add_(0, place, torch.cat([values.to(sums) for _, values in pieces]))
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
    if not isfinite(factor):
        raise BadInput(f"a coefficient is a finite number, got {factor}")
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
        return fitting(name, whole[0], value.dtype)
    if pieces:
        _fits(name, {name: value}, tuple(value.shape))
        _added([name], [value], [pieces])
    return value


def same_base(
    name: str, value: Tensor | None, deltas: Deltas, check: Check, quick: Mapping[str, str] = MappingProxyType({}),
    layers: Mapping[int, Sequence[Layer]] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Raise BadInput when the deltas were made for another tensor, or for one that the model lacks (None).

    quick: quick ids that are known already, by name. layers: what lies on tensors, by address.
    """
    if check == "none" or name not in deltas.base:
        return
    under = layers.get(value.data_ptr(), ()) if layers and value is not None else ()
    if value is None or not is_base(value, deltas.base[name], check, quick.get(name, ""), under):
        raise BadInput(f"{name}: the delta was made for another base (--any-base, or check='none', adds it all the same)")
