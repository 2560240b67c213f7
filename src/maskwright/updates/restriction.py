"""`restrict`: an optimiser that moves only the entries a mask keeps; the loop stays the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask


@contextmanager
def restrict(
    optimizer: torch.optim.Optimizer, masks: Mapping[str, Mask], model: nn.Module | None = None, *, rest: bool = True
) -> Iterator[None]:
    """Inside, only kept entries of the masked parameters move; the others stay bit for bit what they are.

    Gradients are masked as they arrive, so that clipping by their norm sees what will be used. After each step dropped
    entries have their old values back (weight decay and momentum move them otherwise) and optimiser state of theirs is 0.
    masks: by parameter name; names are the model's, or those of an optimiser made from `model.named_parameters()`.
    rest: whether parameters without a mask move freely (a head); False freezes them. Raises BadInput for a mask whose
    parameter the optimiser does not hold, or of another shape, and where neither model nor optimiser tells names.
    """
    held = _named(optimizer, model)
    missing = [name for name in masks if name not in held]
    if missing:
        raise BadInput(f"{missing[0]}: masked, but the optimiser does not hold it ({len(missing)} of {len(masks)} sites)")
    dropped: dict[str, Tensor] = {}
    for name, weight in held.items():
        if name in masks:
            if masks[name].shape != tuple(weight.shape):
                raise BadInput(f"{name}: the mask has shape {masks[name].shape}, the parameter {tuple(weight.shape)}")
            dropped[name] = ~masks[name].keep.to(weight.device)
        elif not rest:
            dropped[name] = torch.ones_like(weight, dtype=torch.bool)
    before: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for name, lost in dropped.items():
            weight = held[name]
            if weight.grad is not None:
                weight.grad.masked_fill_(lost, 0)  # gradients that did not come through backward
            before[name] = weight[lost]

    @torch.no_grad()
    def end(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for name, lost in dropped.items():
            held[name][lost] = before.pop(name)
        _clear(optimizer, held, dropped)

    def arrive(lost: Tensor, weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.masked_fill_(lost, 0)

    with ExitStack() as stack:
        _clear(optimizer, held, dropped)
        for name, lost in dropped.items():
            if held[name].requires_grad:
                stack.callback(held[name].register_post_accumulate_grad_hook(partial(arrive, lost)).remove)
        stack.callback(optimizer.register_step_pre_hook(start).remove)
        stack.callback(optimizer.register_step_post_hook(end).remove)
        yield


@torch.no_grad()
def _clear(optimizer: torch.optim.Optimizer, held: Mapping[str, Tensor], dropped: Mapping[str, Tensor]) -> None:
    for name, lost in dropped.items():
        for value in optimizer.state.get(held[name], {}).values():
            if isinstance(value, Tensor) and value.shape == lost.shape:
                value.masked_fill_(lost, 0)


def _named(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, Tensor]:
    """Name -> parameter of those the optimiser holds."""
    if model is not None:
        mine = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        # Also the second name of a tied parameter: a mask may carry either.
        return {n: w for n, w in model.named_parameters(remove_duplicate=False) if id(w) in mine}
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise BadInput(
                "the optimiser knows no names: give the model too, restrict(optimizer, masks, model=...), "
                "or make the optimiser from model.named_parameters()"
            )
        found |= dict(zip(group["param_names"], group["params"], strict=True))
    return found
