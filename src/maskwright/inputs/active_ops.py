"""The torch functions that mix places of a map, each with its active-only form. `run` is where every function goes.

Between any two functions the inactive places of a map are 0. What works place by place runs as it is
(`active_place.by_place`); a function below has a form of its own; what mixes places and has none is refused by its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.inputs.active_maps import FIRST, LAST, Maps, Space
from maskwright.inputs.active_place import by_place, dims_of, tagged

Args = tuple[Any, ...]
Op = Callable[[Maps, Any, Args, dict[str, Any], Tensor, Space], Any]


def run(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """One torch function under a mask. One that no map goes into runs untouched."""
    found = tagged(maps, args, kwargs)
    if found is None:
        return func(*args, **kwargs)
    op = OPS.get(getattr(func, "__name__", ""))
    if op is None:
        return by_place(maps, func, args, kwargs, *found)
    if not args:  # the map came by keyword
        args = (kwargs.pop("input"),)
    return op(maps, func, args, kwargs, *found)


def _conv(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Submanifold convolution: zeros come in from inactive places, and only active ones go out.

    One by one, it is a product with the active columns alone. Larger ones run dense: gathering active patches with a border
    of their own was slower, forward and backward, up to patches of 8 x 8 places.
    """
    told = dict(zip(("weight", "bias", "stride", "padding", "dilation", "groups"), args[1:], strict=False)) | kwargs
    weight, pointwise = told["weight"], {"stride": (1, 1), "padding": (0, 0), "groups": 1}
    plain = all(
        told.get(key, value) in (value, value[0] if isinstance(value, tuple) else value) for key, value in pointwise.items()
    )
    if tuple(weight.shape[2:]) != (1, 1) or not plain:
        return maps.put(func(*args, **kwargs), FIRST)
    out = weight.flatten(1) @ maps.columns(x)
    return maps.from_columns(out if told.get("bias") is None else out + told["bias"].unsqueeze(1), x)


def _spread(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """To a map of another size."""
    return maps.put(func(*args, **kwargs), FIRST)


def _batch_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Statistics, running ones too, of the active places only."""
    columns = maps.columns(x)
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training and columns.shape[1] < 2:
        maps.refuse(f"{columns.shape[1]} active place in maps {tuple(x.shape)}: batch statistics need at least 2")
    return maps.from_columns(func(columns.unsqueeze(0), *args[1:], **kwargs)[0], x)


def _layer_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    normed = len(kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1])
    if max(space) >= x.ndim - normed:
        maps.refuse(f"a norm over the places of a map {tuple(x.shape)} has no active-only form")
    return _rows(maps, func, args, kwargs, x, space)


def _linear(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    if max(space) == x.ndim - 1:
        maps.refuse(f"a linear map over the places of a map {tuple(x.shape)} has no active-only form")
    return _rows(maps, func, args, kwargs, x, space)


def _rows(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    if x.ndim != 4 or space != LAST:
        return maps.put(func(*args, **kwargs), space)
    return maps.from_rows(func(maps.rows(x), *args[1:], **kwargs), x)


def _group_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Statistics of each sample and group from its active places."""
    told = dict(zip(("num_groups", "weight", "bias", "eps"), args[1:], strict=False)) | kwargs
    return _grouped(maps, x, told["num_groups"], told.get("weight"), told.get("bias"), told.get("eps", 1e-5))


def _instance_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    told = dict(zip(names, args[1:], strict=False)) | kwargs
    if not told.get("use_input_stats", True):
        return maps.put(func(*args, **kwargs), space)
    if told.get("running_mean") is not None:
        maps.refuse("an instance norm that keeps running statistics has no active-only form")
    return _grouped(maps, x, x.shape[1], told.get("weight"), told.get("bias"), told.get("eps", 1e-5))


def _grouped(maps: Maps, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    active, parts = maps.over(x, FIRST).unsqueeze(1), x.unflatten(1, (groups, -1))  # (batch, groups, channels, h, w)
    number = (maps.count(x, FIRST) * parts.shape[2]).view(-1, 1, 1, 1, 1)
    away = torch.where(active, parts - parts.sum((2, 3, 4), keepdim=True) / number, 0)
    out = (away * (away.square().sum((2, 3, 4), keepdim=True) / number + eps).rsqrt()).flatten(1, 2)
    out = out if weight is None else out * weight.view(-1, 1, 1)
    return maps.put(out if bias is None else out + bias.view(-1, 1, 1), FIRST)


def _max_pool(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """The greatest of the active places in a window.

    Differs: the paper's code pools the zeros too, so that a window with negative values that crosses a border gives 0.
    """
    active = maps.over(x, FIRST)
    low = torch.where(active, x, -torch.inf)
    some = func(active.to(x.dtype), *args[1:], **kwargs) > 0
    return maps.put(torch.where(some, func(low, *args[1:], **kwargs), 0), FIRST)


def _avg_pool(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """The mean of the active places in a window, padding counted as the layer counts it.

    Differs: the paper's code divides by the whole window.
    """
    active = maps.over(x, FIRST).to(x.dtype)
    share = func(active, *args[1:], **kwargs)
    whole = func(torch.ones_like(active[:1]), *args[1:], **kwargs)
    out = func(x, *args[1:], **kwargs) * torch.where(share > 0, whole / share, 0)
    return maps.put(out, FIRST)


def _adaptive(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
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
    return (_max_pool if peak else _avg_pool)(maps, F.max_pool2d if peak else F.avg_pool2d, (x, window), {}, x, space)


def _reduce(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
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


def _moved(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """A change of the order of dims: done to a tensor whose sides are all different, it says where each one went."""
    sides = torch.empty(tuple(range(2, 2 + x.ndim)), device="meta")
    went = list(func(sides, *args[1:], **kwargs).shape)
    if went[0] != 2:
        maps.refuse(f"{func.__name__} moves the batch away from dim 0 of a map {tuple(x.shape)}")
    return maps.tag(func(*args, **kwargs), (went.index(2 + space[0]), went.index(2 + space[1])))


def _reshaped(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Channels may be split and joined; places may not be joined with anything, unless there is only one."""
    out = func(*args, **kwargs)
    size = (x.shape[space[0]], x.shape[space[1]])
    if size == (1, 1):
        return out
    if out.ndim > 2 and out.shape[0] == x.shape[0]:
        if space == (x.ndim - 2, x.ndim - 1) and tuple(out.shape[-2:]) == size:
            return maps.tag(out, (out.ndim - 2, out.ndim - 1))
        if space == LAST and tuple(out.shape[1:3]) == size:
            return maps.tag(out, LAST)
    maps.refuse(f"{func.__name__} of a map {tuple(x.shape)} to {tuple(out.shape)} flattens its places: no active-only form")


def _interpolate(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
    if mode not in ("nearest", "nearest-exact"):
        maps.refuse(f"interpolation by {mode!r} mixes places: only 'nearest' has an active-only form")
    return maps.put(func(*args, **kwargs), FIRST)


def _pad(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Zeros around a map, as before a convolution without padding of its own; that one's output is checked."""
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    if mode != "constant" or value:
        maps.refuse(f"padding by mode {mode!r}, value {value} has no active-only form: only zeros have")
    return maps.tag(func(*args, **kwargs), space)


def _refused(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    maps.refuse(f"{func.__name__} mixes the places of a map {tuple(x.shape)} and has no active-only form")


def _named(op: Op, names: str) -> dict[str, Op]:
    return dict.fromkeys(names.split(), op)


OPS: dict[str, Op] = {
    **_named(_conv, "conv2d"),
    **_named(_spread, "conv_transpose2d pixel_shuffle pixel_unshuffle"),
    **_named(_batch_norm, "batch_norm"),
    **_named(_layer_norm, "layer_norm rms_norm"),
    **_named(_linear, "linear"),
    **_named(_group_norm, "group_norm"),
    **_named(_instance_norm, "instance_norm"),
    **_named(_max_pool, "max_pool2d"),
    **_named(_avg_pool, "avg_pool2d"),
    **_named(_adaptive, "adaptive_avg_pool2d adaptive_max_pool2d"),
    **_named(_reduce, "mean sum amax amin any all norm vector_norm linalg_vector_norm count_nonzero var std var_mean prod"),
    **_named(_moved, "permute transpose movedim moveaxis swapaxes swapdims"),
    **_named(_reshaped, "reshape view flatten unflatten squeeze unsqueeze"),
    **_named(_interpolate, "interpolate upsample"),
    **_named(_pad, "pad"),
    **_named(
        _refused,
        "matmul bmm baddbmm einsum tensordot __matmul__ __rmatmul__ scaled_dot_product_attention "
        "multi_head_attention_forward roll flip fliplr flipud rot90 cumsum cumprod cummax cummin sort argsort topk median "
        "grid_sample unfold fold unbind __setitem__ index_put_ scatter scatter_ gather bilinear T mT",
    ),
}  # fmt: skip
