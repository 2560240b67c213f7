"""Active-only norms, and products along the last dim: statistics and work from active places alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskwright.inputs.active_maps import FIRST, LAST, Maps, Space

Args = tuple[Any, ...]


def batch_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Statistics, running ones too, of the active places only; kept statistics are applied place by place."""
    if not kwargs.get("training", args[5] if len(args) > 5 else False):
        return maps.put(func(*args, **kwargs), FIRST)
    columns = maps.columns(x)
    if columns.shape[1] < 2:
        maps.refuse(f"{columns.shape[1]} active place in maps {tuple(x.shape)}: batch statistics need at least 2")
    return maps.from_columns(func(columns.unsqueeze(0), *args[1:], **kwargs)[0], x)


def layer_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    normed = len(kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1])
    if max(space) >= x.ndim - normed:
        maps.refuse(f"a norm over the places of a map {tuple(x.shape)} has no active-only form")
    return _rows(maps, func, args, kwargs, x, space)


def linear(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    if max(space) == x.ndim - 1:
        maps.refuse(f"a linear map over the places of a map {tuple(x.shape)} has no active-only form")
    return _rows(maps, func, args, kwargs, x, space)


def _rows(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    if x.ndim != 4 or space != LAST:
        return maps.put(func(*args, **kwargs), space)
    return maps.from_rows(func(maps.rows(x), *args[1:], **kwargs), x)


def group_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
    """Statistics of each sample and group from its active places."""
    told = dict(zip(("num_groups", "weight", "bias", "eps"), args[1:], strict=False)) | kwargs
    return _grouped(maps, x, told["num_groups"], told.get("weight"), told.get("bias"), told.get("eps", 1e-5))


def instance_norm(maps: Maps, func: Any, args: Args, kwargs: dict[str, Any], x: Tensor, space: Space) -> Any:
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
