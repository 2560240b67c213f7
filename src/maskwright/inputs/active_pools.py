"""Active-only pools and reductions: what is not active neither counts nor wins."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.inputs.active_maps import FIRST, Maps, Space
from maskwright.inputs.active_place import dims_of

Args = tuple[Any, ...]


def max_pool(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """The greatest of the active places in a window.

    Differs: the paper's code pools the zeros too, so that a window with negative values that crosses a border gives 0.
    """
    active = maps.over(x, FIRST)
    low = torch.where(active, x, -torch.inf)
    some = func(active.to(x.dtype), *args[1:], **kwargs) > 0
    return maps.put(torch.where(some, func(low, *args[1:], **kwargs), 0), FIRST)


def avg_pool(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """The mean of the active places in a window, padding counted as the layer counts it.

    Differs: the paper's code divides by the whole window.
    """
    active = maps.over(x, FIRST).to(x.dtype)
    share = func(active, *args[1:], **kwargs)
    whole = func(torch.ones_like(active[:1]), *args[1:], **kwargs)
    out = func(x, *args[1:], **kwargs) * torch.where(share > 0, whole / share, 0)
    return maps.put(out, FIRST)


def adaptive(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """To 1 x 1: over the active places of a sample. To a size that divides the map's: a plain pool."""
    asked = kwargs.get("output_size", args[1] if len(args) > 1 else None)
    sizes = (asked, asked) if not isinstance(asked, (tuple, list)) else tuple(asked)
    height, width = (have if want is None else int(want) for want, have in zip(sizes, x.shape[2:], strict=True))
    if kwargs.get("return_indices") or x.shape[2] % height or x.shape[3] % width:
        maps.refuse(f"an adaptive pool of a map {tuple(x.shape)} to {height} x {width} has no active-only form")
    peak = "max" in func.__name__
    if (height, width) == (1, 1):
        name, pool = ("amax", torch.amax) if peak else ("mean", torch.mean)
        return _over_space(maps, name, pool, x, FIRST, (2, 3), {"keepdim": True})
    window = (x.shape[2] // height, x.shape[3] // width)
    return (max_pool if peak else avg_pool)(maps, F.max_pool2d if peak else F.avg_pool2d, (x, window), {}, x, space)


def reduce(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    name = func.__name__
    at = 2 if name in ("norm", "vector_norm", "linalg_vector_norm") else 1
    dims = kwargs["dim"] if "dim" in kwargs else args[at] if len(args) > at else None
    over = tuple(range(x.ndim)) if dims is None else dims_of(dims, x.ndim)
    keep = kwargs.get("keepdim", args[at + 1] if len(args) > at + 1 else False)
    inside = [dim for dim in space if dim in over]
    if not inside and 0 not in over:
        gone = (lambda dim: 0) if keep else (lambda dim: sum(other < dim for other in over))
        return maps.put(func(*args, **kwargs), (space[0] - gone(space[0]), space[1] - gone(space[1])))
    if len(inside) != 2:
        maps.refuse(f"{name} over dims {over} of a map {tuple(x.shape)} takes one side of its places, or the batch")
    if name in ("mean", "amax", "amin", "all"):
        return _over_space(maps, name, func, x, space, over, {"keepdim": keep, **kwargs, "dim": over})
    if name in ("var", "std", "var_mean", "std_mean", "prod"):
        maps.refuse(f"{name} over the places of a map has no active-only form")
    return func(*args, **kwargs)  # zeros do not count in a sum, a norm, an any


def _over_space(
    maps: Maps, name: str, func: Any, x: Tensor, space: Space, over: tuple[int, ...], kwargs: dict[str, Any]
) -> Tensor:
    kwargs = {key: value for key, value in kwargs.items() if key not in ("dim", "input")}
    if name != "mean":
        neutral = {"amax": -torch.inf, "amin": torch.inf, "all": True}[name]
        return func(torch.where(maps.over(x, space), x, neutral), over, **kwargs)
    total, number = x.sum(over, **kwargs), maps.count(x, space)
    rest = prod(x.shape[dim] for dim in over if dim not in (0, *space))
    number = number.sum() if 0 in over else number.view(-1, *[1] * (total.ndim - 1))
    return total / (number * rest)
