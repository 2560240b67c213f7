"""attach and bake: hang masks on a model for a while, or write their zeros for good."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from maskwright.core.errors import BadInput
from maskwright.core.gate import Gate, Gated, gated, hard
from maskwright.core.maskset import MaskSet
from maskwright.weights.sites import maskable, parameter


@contextmanager
def attach(model: nn.Module, masks: MaskSet, gate: Gate = hard) -> Iterator[dict[str, Gated]]:
    """Inside the context the model computes with masked weights; on leaving nothing is left behind.

    Yields the gates by name. Raises BadInput when the masks do not fit the model.
    """
    every = maskable(model)
    _fit(model, masks)
    with ExitStack() as stack:
        yield {name: stack.enter_context(gated(list(every[name].owners), mask, gate)) for name, mask in masks.items()}


@torch.no_grad()
def bake(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Write exact zeros where the masks drop, in place, and return the model (a plain module as before).

    Works under a gate too (an averaged copy of a model in training, say), whose mask then is the baked one.
    Raises BadInput when the masks do not fit.
    """
    for name, mask in masks.items():
        target = parameter(model, name)
        if tuple(target.shape) != mask.shape:
            raise BadInput(f"{name}: the mask has shape {mask.shape}, the parameter {tuple(target.shape)}")
    for name, mask in masks.items():
        target = parameter(model, name)
        target.masked_fill_(~mask.keep.to(target.device), 0)
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, attribute):
            chain = module.parametrizations[attribute]  # type: ignore[union-attr,index]
            for gate in (part for part in chain if isinstance(part, Gated)):  # type: ignore[union-attr]
                gate.mask = mask
    return model


def _fit(model: nn.Module, masks: MaskSet) -> None:
    every = maskable(model)
    masks.fits({name: site.parameter for name, site in every.items()})
    # A model that these masks already pruned has other bytes than its dense base, and needs no warning.
    obeyed = all(not bool((every[name].value[~mask.keep] != 0).any()) for name, mask in masks.items())
    if not obeyed and not masks.same_base({name: site.parameter for name, site in every.items()}):
        warnings.warn("these masks were made for other weights than this model's", stacklevel=4)
