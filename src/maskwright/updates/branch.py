"""The additive branch: a Linear layer computes with W + dW while W is frozen; `merge` writes the sum into W.

dW lies in torch's parametrization slot behind the weight (core's `gated`), so the Parameter object, the module order
and the state_dict are what they were on leaving, and attached and merged models compute the very same sum.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from maskwright.core.errors import BadInput
from maskwright.core.gate import Gated, gated
from maskwright.core.mask import Mask
from maskwright.updates.untouched import untouched


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One Linear (or transformers Conv1D) weight: its full name, its module, and the path of the block it lies in.

    `transposed`: the weight is stored (inputs, outputs). `block` is "" outside the repeated blocks.
    """

    name: str
    module: nn.Module
    transposed: bool = False
    block: str = ""

    @property
    def weight(self) -> Tensor:
        """What forward sees of the weight now, (outputs, inputs) or as stored when transposed."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs), however the weight is stored."""
        first, last = self.weight.shape
        return (last, first) if self.transposed else (first, last)


class Branch(nn.Module, ABC):
    """The update of one weight. A final subclass holds the trainable parameters and says what dW is."""

    @abstractmethod
    def delta(self) -> Tensor:
        """dW as (outputs, inputs), differentiable in the branch's parameters."""


class _Sum:
    """What stands where core's gates stand: keep * (W + dW), in the weight's own dtype; W alone once merged."""

    def __init__(self, branch: Branch, transposed: bool, whole: bool) -> None:
        self.branch, self.transposed, self.whole, self.merged = branch, transposed, whole, False

    def apply(self, weight: Tensor, keep: Tensor) -> Tensor:
        if self.merged:
            return weight
        delta = self.branch.delta()
        total = (weight + (delta.T if self.transposed else delta)).to(weight.dtype)
        return total if self.whole else torch.where(keep, total, torch.zeros((), dtype=total.dtype, device=total.device))


@dataclass(eq=False)
class Branched:
    """Branches on a model, between entering and leaving `branched`. `trainable` is what the user's optimizer gets."""

    sites: dict[str, LinearSite]
    branches: dict[str, Branch]
    trainable: list[nn.Parameter]
    slots: dict[str, Gated] = field(default_factory=dict)
    open: bool = True
    merged: bool = False

    @torch.no_grad()
    def merge(self) -> None:
        """Write keep * (W + dW) into every weight, in place; a second call changes nothing.

        Raises BadInput outside the context, or naming the first site whose sum is not finite (nothing is written).
        """
        if self.merged:
            return
        if not self.open:
            raise BadInput("merge: the context of these branches was left; merge inside it")
        for name, site in self.sites.items():
            if not bool(torch.isfinite(site.weight).all()):
                raise BadInput(f"{name}: W + dW of shape {tuple(site.weight.shape)} is not finite, so nothing is merged")
        for site, slot in zip(self.sites.values(), self.slots.values(), strict=True):
            total, gate = site.weight, slot.gate
            site.module.parametrizations.weight.original.copy_(total)  # type: ignore[union-attr,operator]
            gate.merged = True  # type: ignore[union-attr]
        self.merged = True


def linears(model: nn.Module, where: str | Iterable[str] = ()) -> dict[str, LinearSite]:
    """The Linear weights that `where` names, in model order, by full parameter name ("blocks.0.mlp.0.weight").

    A pattern matches a run of dotted segments, `*` any characters; `re:` starts a regular expression searched in the
    name. Without patterns: those inside numbered blocks; with none there, all but the last (the head).
    Raises BadInput when a pattern matches no Linear weight, or there is none at all.
    """
    every = {}
    for path, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' own, (inputs, outputs)
        if isinstance(module, nn.Linear) or transposed:
            name = f"{path}.weight" if path else "weight"
            block = re.match(r"(?:.*?\.)??\d+(?=\.)", path)  # the first number that is not the layer's own
            every[name] = LinearSite(name, module, transposed, block[0] if block else "")
    wanted = [where] if isinstance(where, str) else list(where)
    if not every:
        raise BadInput(f"{type(model).__name__} holds no Linear weight")
    if not wanted:
        inside = {name: site for name, site in every.items() if site.block}
        return inside or dict(list(every.items())[: max(1, len(every) - 1)])
    for pattern in wanted:
        if not any(named(name, pattern) for name in every):
            raise BadInput(f"where {pattern!r} matches no Linear weight; names look like {', '.join(list(every)[:3])}")
    return {name: site for name, site in every.items() if any(named(name, pattern) for pattern in wanted)}


def named(name: str, pattern: str) -> bool:
    """Whether a pattern of `linears` matches a parameter's full name. Raises BadInput for a bad expression."""
    if not pattern.startswith("re:"):
        return fnmatchcase(f".{name}.", f"*.{pattern}.*")
    try:
        return re.search(pattern[3:], name) is not None
    except re.error as error:
        raise BadInput(f"where {pattern!r} is not a regular expression: {error}") from None


@contextmanager
def branched(
    model: nn.Module, sites: Mapping[str, LinearSite], branches: Mapping[str, Branch], *,
    masks: Mapping[str, Mask] | None = None, train: Iterable[str] = (), recompute: bool = False,
) -> Iterator[Branched]:  # fmt: skip
    """Hang a branch on every site; all of the model's own parameters are frozen but for those that `train` names.

    masks: sites by name whose W + dW is seen through a mask. recompute: layers with a branch keep nothing of dW for
    the backward pass and compute it again. On leaving without `merge`, parameters (those of `train` too), buffers,
    flags and modes are as before; after it, what was trained stays and the rest is as before.
    Raises BadInput for a site that has a branch already, is tied to another parameter, or does not fit its branch.
    """
    masks = masks or {}
    _refuse(model, sites, masks)
    extra = _extra(model, train, sites)
    own = [p for branch in branches.values() for p in branch.parameters()]
    run = Branched(dict(sites), dict(branches), [*own, *extra.values()])
    with _as_before(model, extra, run), ExitStack() as stack:
        for name, site in sites.items():
            weight = site.weight
            mask = masks[name] if name in masks else Mask(torch.ones(weight.shape, dtype=torch.bool))
            branch = branches[name].to(weight.device)
            if tuple(branch.delta().shape) != site.shape:
                raise BadInput(f"{name}: the branch gives {tuple(branch.delta().shape)}, the weight is {site.shape}")
            gate: Any = _Sum(branch, site.transposed, bool(mask.keep.all()))
            slot = stack.enter_context(gated([(site.module, "weight")], mask, gate))
            slot.branch = branch  # a submodule: its parameters follow device moves and are seen by DDP
            run.slots[name] = slot
            if recompute:
                stack.enter_context(_recomputed(site.module))
        try:
            yield run
        finally:
            run.open = False


def _refuse(model: nn.Module, sites: Mapping[str, LinearSite], masks: Mapping[str, Mask]) -> None:
    if not sites:
        raise BadInput(f"{type(model).__name__}: no Linear weight to put a branch on")
    unknown = [name for name in masks if name not in sites]
    if unknown:
        raise BadInput(f"{unknown[0]}: there is a mask but no branch here ({len(unknown)} such sites)")
    for name, site in sites.items():
        if parametrize.is_parametrized(site.module, "weight"):
            chain: Any = site.module.parametrizations["weight"]  # type: ignore[index]
            what = "a branch" if any(hasattr(part, "branch") for part in chain) else "a gate or another parametrization"
            raise BadInput(f"{name}: the weight has {what} already; leave that context first")
        if site.weight.is_meta or not site.weight.dtype.is_floating_point:
            what = "no data (meta device)" if site.weight.is_meta else f"dtype {site.weight.dtype}"
            raise BadInput(f"{name}: the weight of shape {tuple(site.weight.shape)} has {what}")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, site in sites.items():
        tied = [other for other in names.get(id(site.weight), []) if other != name]
        if tied:
            raise BadInput(f"{name}: tied to {tied[0]}, which the update would change too")


def _extra(model: nn.Module, train: Iterable[str], sites: Mapping[str, LinearSite]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for pattern in [train] if isinstance(train, str) else train:
        hit = {name: p for name, p in model.named_parameters() if named(name, pattern) and name not in sites}
        if not hit:
            raise BadInput(f"train {pattern!r} matches no parameter beside the sites")
        found |= hit
    return found


@contextmanager
def _as_before(model: nn.Module, extra: Mapping[str, nn.Parameter], run: Branched) -> Iterator[None]:
    held = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in extra.values()]
    try:
        with untouched(model, extra.values(), lambda: run.merged):
            yield
    finally:
        for parameter, value, grad in held:
            parameter.grad = grad
            if not run.merged:
                with torch.no_grad():
                    parameter.copy_(value)


class _Again:
    """A forward that saves its input alone and runs again in backward. An object: a deep copy calls its own layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    def __call__(self, *args: Any) -> Any:
        forward = self.before or type(self.module).forward.__get__(self.module)
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)


@contextmanager
def _recomputed(module: nn.Module) -> Iterator[None]:
    again = module.__dict__["forward"] = _Again(module)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if again.before is not None:
            module.__dict__["forward"] = again.before
