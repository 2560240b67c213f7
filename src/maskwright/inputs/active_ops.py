"""The torch functions that mix places of a map, each with its active-only form. `run` is where every function goes.

Between any two functions the inactive places of a map are 0. What works place by place runs as it is
(`active_place.by_place`); a function below has a form of its own; what mixes places and has none is refused by its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskwright.inputs.active_maps import FIRST, LAST, Maps, Space
from maskwright.inputs.active_norms import batch_norm, group_norm, instance_norm, layer_norm, linear
from maskwright.inputs.active_place import by_place, tagged
from maskwright.inputs.active_pools import adaptive, avg_pool, max_pool, reduce

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
    **_named(batch_norm, "batch_norm"),
    **_named(layer_norm, "layer_norm rms_norm"),
    **_named(linear, "linear"),
    **_named(group_norm, "group_norm"),
    **_named(instance_norm, "instance_norm"),
    **_named(max_pool, "max_pool2d"),
    **_named(avg_pool, "avg_pool2d"),
    **_named(adaptive, "adaptive_avg_pool2d adaptive_max_pool2d"),
    **_named(reduce, "mean sum amax amin any all norm vector_norm linalg_vector_norm count_nonzero var std var_mean prod"),
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
