"""A guard for pruned models in training: after every optimiser step the zeros must still be zeros.

Momentum, weight decay, averaged copies and dense merges bring dropped weights back without a word, which is what
users of pruned models report most (wanda#10, Pruner-Zero#4, unsloth#1370): here the step that does it is the one
that fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import Pattern, Unstructured, parse
from maskwright.core.select import select
from maskwright.updates.branch import linears


def zero_masks(model: nn.Module, where: str | Iterable[str] = (), pattern: str | Pattern = "unstructured") -> MaskSet:
    """Masks read off the weights: an entry is dropped where it is exactly 0. Sites as in `linears`.

    With an N:M pattern the n largest |w| of each group are kept, so that a kept weight that happens to be 0 does not
    break it; refused where more than n are not 0. Masks that were saved are better: a kept weight may be 0 by chance.
    Raises BadInput naming the first site where the pattern does not hold.
    """
    kind = parse(pattern) if isinstance(pattern, str) else pattern
    found = {}
    for name, site in linears(model, where).items():
        value = site.weight.detach()
        at = _localised(kind, site.transposed)
        if at.fixed is None:
            mask = Mask(value != 0, at)
        else:
            mask = select(value.abs(), at)
            broken = int((at.fold(value != 0).sum(1) > at.fixed).sum())
            if broken:
                raise BadInput(f"{name}: {at.spec()} does not hold: {broken} groups have more than {at.fixed} non-zeros")
        try:
            found[name] = mask.check()
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
    return MaskSet(found, {"method": "zeros", "pattern": kind.spec()})


def _localised(pattern: Pattern, transposed: bool) -> Pattern:
    if not transposed or pattern == Unstructured():
        return pattern
    from maskwright.core.pattern import NM

    if isinstance(pattern, NM):
        return NM(pattern.n, pattern.m, -2 if pattern.dim % 2 else -1)
    raise BadInput(f"{pattern.spec()} is not read off a transposed weight (Conv1D); give masks")


@dataclass(eq=False)
class Guard:
    """Counts the optimiser steps it has let through (1, 2, ...)."""

    model: nn.Module
    masks: MaskSet
    step: int = 0

    @torch.no_grad()
    def check(self) -> None:
        """Raise BadInput naming the first site with a dropped weight that is not 0, the step and how many broke.

        What forward sees is checked: under `Lora` with masks, the masked sum.
        """
        for name, mask in self.masks.items():
            value = _seen(self.model, name)
            alive = (value != 0) & ~mask.keep.to(value.device)  # NaN != 0 is true
            broken = int(alive.sum())
            if broken:
                first = tuple(alive.nonzero()[0].tolist())
                dropped = mask.keep.numel() - mask.count
                told = (
                    f"{broken} of {dropped} dropped weights are not 0 (the first, at {first}, is {float(value[first]):.3g})"
                )
                at = mask.pattern
                if at.fixed is not None:
                    groups = int((at.fold(value != 0).sum(1) > at.fixed).sum())
                    told += f"; {at.spec()} is broken in {groups} groups"
                raise BadInput(f"{name}: after step {self.step}, {told}")


def _seen(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(path), attribute).detach()  # type: ignore[no-any-return]
    except AttributeError:
        raise BadInput(f"no parameter named {name}") from None


@contextmanager
def guard(optimizer: torch.optim.Optimizer, model: nn.Module, masks: MaskSet) -> Iterator[Guard]:
    """Check the masks' zeros on entering (step 0) and after every step of `optimizer`, and on leaving nothing stays.

    The BadInput comes out of `optimizer.step()`. Raises BadInput too when the masks do not fit the model, or a
    pattern of theirs does not hold.
    """
    masks.check()
    for name, mask in masks.items():
        if tuple(_seen(model, name).shape) != mask.shape:
            raise BadInput(f"{name}: the mask has shape {mask.shape}, the parameter {tuple(_seen(model, name).shape)}")
    watch = Guard(model, masks)
    watch.check()

    def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        watch.step += 1
        watch.check()

    handle = optimizer.register_step_post_hook(after)
    try:
        yield watch
    finally:
        handle.remove()
