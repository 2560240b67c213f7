"""Gates: what forward and backward see of a masked weight. They live in torch's parametrization slot, so
state_dict, device moves and undo are torch's own, and the Parameter object stays the same for a live optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Pattern
from maskwright.core.select import select


@dataclass(frozen=True)
class Hard:
    """Forward w where kept, exactly 0 elsewhere; the gradient of dropped weights is exactly 0."""

    def apply(self, weight: Tensor, keep: Tensor) -> Tensor:
        # where, not a product: 0 * inf and 0 * NaN would leak, and -0.0 would appear.
        return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass(frozen=True)
class Ste:
    """Forward as Hard; the gradient passes straight through to every weight, dropped ones too.

    `decay` (SR-STE's lambda) pulls dropped weights to 0: gradient += decay * (not keep) * w. It is added by the
    masked optimiser step, once per step, not in backward: accumulation and shared weights would add it again.
    """

    decay: float = 0.0

    def apply(self, weight: Tensor, keep: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, keep)

    def pull(self, weight: Tensor, keep: Tensor) -> Tensor | None:
        """The term to add to the gradient, or None."""
        return None if self.decay == 0 else torch.where(keep, 0.0, self.decay * weight.detach())


Gate = Hard | Ste
hard = Hard()


def ste(decay: float = 0.0) -> Ste:
    """A straight-through gate with SR-STE's decay."""
    return Ste(decay)


class Gated(nn.Module):
    """The parametrization: a mask and a gate in front of one parameter."""

    keep: Tensor

    def __init__(self, mask: Mask, gate: Gate) -> None:
        super().__init__()
        self.pattern, self.gate = mask.pattern, gate
        self.register_buffer("keep", mask.keep.clone(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.gate.apply(weight, self.keep)

    @property
    def mask(self) -> Mask:
        return Mask(self.keep, self.pattern)

    @mask.setter
    def mask(self, mask: Mask) -> None:
        if mask.keep.shape != self.keep.shape:
            raise BadInput(f"mask of shape {mask.shape} on a weight of shape {tuple(self.keep.shape)}")
        self.pattern = mask.pattern
        self.keep.copy_(mask.keep)


@contextmanager
def gated(owners: list[tuple[nn.Module, str]], mask: Mask, gate: Gate = hard) -> Iterator[Gated]:
    """Hang one gate on a parameter at every (module, attribute) that holds it; taken off again on leaving.

    The Parameter object, its values and its place in the module's order are what they were (tied places share
    one gate), and parametrizations of other makers stay. Raises BadInput where the mask has another shape.
    """
    weight: Tensor = getattr(*owners[0])
    if weight.shape != mask.keep.shape:
        raise BadInput(f"{owners[0][1]}: mask of shape {mask.shape} on a weight of shape {tuple(weight.shape)}")
    slot = Gated(mask, gate).to(weight.device)
    done: list[tuple[nn.Module, str]] = []
    order = [list(module._parameters) for module, _ in owners]
    try:
        for module, attribute in owners:
            # unsafe=True skips torch's trial forward; a gate never changes shape or dtype.
            parametrize.register_parametrization(module, attribute, slot, unsafe=True)
            done.append((module, attribute))
        yield slot
    finally:
        for (module, attribute), names in zip(reversed(done), reversed(order[: len(done)]), strict=True):
            _take_off(module, attribute, slot)
            # torch puts the parameter back at the end: state_dict and optimiser indices would be in another order.
            for name in [name for name in names if name in module._parameters]:
                module._parameters[name] = module._parameters.pop(name)


def _take_off(module: nn.Module, attribute: str, slot: Gated) -> None:
    chain: Any = module.parametrizations[attribute]  # type: ignore[index]
    if len(chain) == 1:
        # torch deletes the attribute's property from the class, and a deep copy made under the gate (an averaged
        # model, say) shares that class: this module leaves with a class of its own, so the copy stays whole.
        shared = type(module)
        rest = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, rest)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    else:
        del chain[next(index for index, part in enumerate(chain) if part is slot)]


class Learned(nn.Module):
    """A learned mask: logits of the score's shape, soft values in forward, hardened to an exact Mask at the end.

    `relax(logits) -> values in [0, 1]` (default: the logistic function). `straight=True` passes the hard 0/1
    mask forward and the soft gradient backward. What is saved is the logits and the hardened mask.
    """

    def __init__(
        self,
        init: Tensor,
        pattern: Pattern,
        counts: int | Tensor | None = None,
        relax: Callable[[Tensor], Tensor] = torch.sigmoid,
        straight: bool = False,
    ) -> None:
        super().__init__()
        pattern.fits(tuple(init.shape))
        self.logits = nn.Parameter(init.detach().clone())
        self.pattern, self.counts, self.relax, self.straight = pattern, counts, relax, straight

    def values(self) -> Tensor:
        """Values in [0, 1], differentiable in the logits."""
        soft = self.relax(self.logits)
        return soft + (self.harden().keep.to(soft.dtype) - soft).detach() if self.straight else soft

    def harden(self) -> Mask:
        """The exact mask of the best logits."""
        return select(self.logits.detach(), self.pattern, self.counts)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.values()
