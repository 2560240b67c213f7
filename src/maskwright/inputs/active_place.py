"""Functions that work place by place: they run as they are, and what they made of the zeros is put back to 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maskwright.inputs.active_maps import Maps, Space

# 0 at 0: nothing to put back.
_ZERO = frozenset(
    "relu relu6 hardtanh leaky_relu gelu silu mish elu selu celu tanh prelu hardswish dropout dropout2d mul neg abs sign "
    "square sqrt clone contiguous detach to float double half bfloat16 type_as requires_grad alias expand_as chunk split "
    "tensor_split narrow zeros_like".split()
)
_SUMS = frozenset("add sub cat concat concatenate maximum minimum".split())  # 0 where all of their tensors are
_ALONG = {"softmax": 1, "log_softmax": 1, "normalize": 2, "max": 1, "min": 1, "argmax": 1, "argmin": 1}  # where dim stands
_TURNED = (torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.mH)


def tagged(maps: Maps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Space] | None:
    """The first map that goes into a function, also in a list of tensors, and its space."""
    for part in (*args, *kwargs.values()) if kwargs else args:
        for x in part if isinstance(part, (list, tuple)) else (part,):
            space = maps.space(x)
            if space is not None:
                return x, space
    return None


def dims_of(dims: Any, ndim: int) -> tuple[int, ...]:
    """Dims as a tuple of whole numbers from 0."""
    return tuple(int(dim) % ndim for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))


def by_place(maps: Maps, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Run it; each tensor that comes out is a map of the same places. Raises BadInput naming the layer where it is not."""
    name = str(getattr(func, "__name__", func))
    if name in _ALONG:
        at = _ALONG[name]
        dim = kwargs.get("dim", args[at] if len(args) > at else None)
        if not isinstance(dim, Tensor) and (dim is None or any(d in space for d in dims_of(dim, x.ndim))):
            maps.refuse(f"{name} over the places of a map {tuple(x.shape)} has no active-only form")
    if name == "__get__" and getattr(func, "__self__", None) in _TURNED:
        maps.refuse(f"a map {tuple(x.shape)} turned over has no active-only form")
    inside = name.endswith("_") and not name.endswith("__")
    base = name[:-1] if inside else name
    clean = base in _ZERO or (base in _SUMS and all(maps.space(part) is not None for part in _parts(args)))
    clean |= base in ("div", "true_divide", "__getitem__") and len(args) > 1 and not isinstance(args[1], Tensor)
    out = func(*args, **kwargs)
    if name.startswith("new_"):
        return out
    if isinstance(out, (list, tuple)) and not isinstance(out, torch.Size):
        made = [_one(maps, name, part, x, space, clean, inside) for part in out]
        return type(out)(made)  # type: ignore[call-arg]
    return _one(maps, name, out, x, space, clean, inside)


def _parts(args: tuple[Any, ...]) -> Iterator[Any]:
    for part in args[:2]:
        if isinstance(part, (list, tuple)):
            yield from part
        elif not isinstance(part, int) or len(args) < 2 or not isinstance(args[0], (list, tuple)):  # the dim of a cat
            yield part


def _one(maps: Maps, name: str, out: Any, x: Tensor, space: Space, clean: bool, inside: bool) -> Any:
    if not isinstance(out, Tensor):
        return out
    size = (x.shape[space[0]], x.shape[space[1]])
    if out.ndim != x.ndim or out.shape[0] != maps.batch or (out.shape[space[0]], out.shape[space[1]]) != size:
        maps.refuse(f"{name} of a map {tuple(x.shape)} gives {tuple(out.shape)}: no active-only form")
    if clean:
        return maps.tag(out, space)
    if inside:  # in place: whoever holds the tensor sees the same
        return maps.tag(out.masked_fill_(~maps.over(out, space), 0), space)
    return maps.put(out, space)
