"""Training under masks: a context manager that hangs gates on a model and a mask-aware step on its optimiser.

The user's loop stays as it is. The clock is the optimiser's steps: forwards, accumulation and skipped
GradScaler steps do not move it. After every step dropped weights and their moments are exactly 0 under a hard
gate; under a straight-through gate the dense weights live on and only what forward sees is masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskwright import __version__
from maskwright.core.errors import BadInput
from maskwright.core.gate import Gate, Gated, Hard, gated, ste
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.weights.sites import WeightSite, refuse_bad_values, sites


@dataclass(frozen=True)
class MaskedTraining(ABC):
    """What a training method decides: its gate, the first mask, and when and how the mask moves.

    where: patterns of parameter names; empty = the place's default sites.
    """

    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            object.__setattr__(self, "where", (self.where,))
        self.validate()

    def validate(self) -> None:
        """Raise BadInput for settings that make no sense."""
        return None

    @property
    @abstractmethod
    def gate(self) -> Gate:
        """What forward and backward see of a masked weight."""

    @abstractmethod
    def start(self, found: Mapping[str, WeightSite]) -> dict[str, Mask]:
        """The masks before the first step, for all sites at once (a budget may compare them)."""

    @abstractmethod
    def update(self, site: WeightSite, old: Mask, step: int) -> Mask | None:
        """The mask after optimiser step `step` (1, 2, ...), or None to leave it alone."""

    def wants_dense_grad(self, step: int) -> bool:
        """Whether `update` at this step reads `site.stat("dense_grad")`. Its backward is then straight-through."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, as stored in mask files."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


@dataclass(eq=False)
class Run:
    """A masked training run: live masks, the step, and a log of how much the masks move.

    moved[t]: entries whose keep bit changed at step t + 1, over all sites (SR-STE's SAD, unnormalised).
    """

    method: MaskedTraining
    seed: int
    found: dict[str, WeightSite]
    slots: dict[str, Gated]
    step: int = 0
    moved: list[int] = field(default_factory=list)
    ever: dict[str, Tensor] = field(default_factory=dict)

    @property
    def masks(self) -> MaskSet:
        """The masks as they are now, with how they were made."""
        slug = type(self.method).__module__.split(".")[-2]
        made = {
            "method": slug,
            "version": __version__,
            "settings": self.method.settings(),
            "seed": self.seed,
            "step": self.step,
        }
        return MaskSet({name: Mask(slot.keep.clone().cpu(), slot.pattern) for name, slot in self.slots.items()}, made)

    @property
    def itop(self) -> float:
        """Share of positions that were kept at any time (ITOP, arXiv 2102.02887)."""
        return sum(int(e.sum()) for e in self.ever.values()) / sum(e.numel() for e in self.ever.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs beside the model's and the optimiser's own state (tensors and plain values)."""
        return {
            "settings": self.method.settings(),
            "seed": self.seed,
            "step": self.step,
            "moved": list(self.moved),
            "keep": {name: slot.keep.clone() for name, slot in self.slots.items()},
            "ever": {name: kept.clone() for name, kept in self.ever.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises BadInput when the settings (the total of steps among them) differ."""
        mine = {"settings": self.method.settings(), "seed": self.seed}
        for key, value in mine.items():
            if state[key] != value:
                raise BadInput(f"this run has {key} {value}, the saved one {state[key]}")
        if set(state["keep"]) != set(self.slots):
            raise BadInput("the saved run masks other sites than this one")
        self.step, self.moved = int(state["step"]), list(state["moved"])
        for name, slot in self.slots.items():
            slot.mask = Mask(state["keep"][name].to(slot.keep.device), slot.pattern)
            self.ever[name] = state["ever"][name].clone()
        self._arm()

    def _arm(self) -> None:
        # The gate of the coming step: straight-through where its update wants the dense gradient (trap: under a
        # hard gate the gradient of dropped weights is 0 everywhere, and growth would be blind).
        gate = self.method.gate
        coming = ste() if isinstance(gate, Hard) and self.method.wants_dense_grad(self.step + 1) else gate
        for slot in self.slots.values():
            slot.gate = coming

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Fix up gradients: keep the dense ones where wanted, mask them (hard), add the pull (ste)."""
        dense: dict[str, Tensor] = {}
        wanted = self.method.wants_dense_grad(self.step + 1)
        for name, slot in self.slots.items():
            weight = self.found[name].parameter
            if weight.grad is None:
                if wanted:
                    raise BadInput(f"{name}: no gradient reached this weight, and growth needs one")
                continue
            if wanted:
                if not bool(torch.isfinite(weight.grad).all()):
                    raise BadInput(f"{name}: its gradient of shape {tuple(weight.shape)} is not finite")
                dense[name] = weight.grad.clone()
            if isinstance(self.method.gate, Hard):
                weight.grad.masked_fill_(~slot.keep, 0)
            elif (pull := self.method.gate.pull(weight, slot.keep)) is not None:
                weight.grad.add_(pull)
        return dense

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, dense: Mapping[str, Tensor]) -> None:
        """Move the masks if it is time, then put dropped weights and their moments to exactly 0 (hard gates)."""
        self.step += 1
        moved = 0
        for name, slot in self.slots.items():
            site = self.found[name]
            stats = {"dense_grad": dense[name]} if name in dense else {}
            new = self.method.update(replace(site, stats=stats), slot.mask, self.step)
            if new is not None:
                moved += int((new.keep != slot.keep).sum())
                slot.mask = new
                self.ever[name] |= new.keep
            if isinstance(self.method.gate, Hard):
                self._clear(optimizer, site.parameter, ~slot.keep)
        self.moved.append(moved)
        self._arm()

    @staticmethod
    def _clear(optimizer: torch.optim.Optimizer, weight: nn.Parameter, dropped: Tensor) -> None:
        weight.masked_fill_(dropped, 0)
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(dropped, 0)


@contextmanager
def training(model: nn.Module, optimizer: torch.optim.Optimizer, method: MaskedTraining, *, seed: int = 0) -> Iterator[Run]:
    """Train `model` under `method`; the loop inside stays the user's own. Yields the Run.

    On leaving, gates and hooks are gone; weights of a hard gate hold their zeros, those of a straight-through
    gate are still dense: `bake(model, run.masks)` writes the zeros. Averaged copies (EMA) made inside are masked
    by `bake(copy, run.masks)` too. Gradient clipping by the user acts before SR-STE's pull is added.
    Raises BadInput when a site's weight is not in the optimiser, or is not finite.
    """
    found = {name: replace(site, seed=seed) for name, site in sites(model, method.where).items()}
    refuse_bad_values(found)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, site in found.items():
        if id(site.parameter) not in known:
            raise BadInput(f"{name}: the optimiser does not hold this weight")
    first = method.start(found)
    with ExitStack() as stack:
        slots = {
            name: stack.enter_context(gated(list(site.owners), first[name], method.gate)) for name, site in found.items()
        }
        run = Run(method, seed, found, slots, ever={name: slot.keep.clone() for name, slot in slots.items()})
        if isinstance(method.gate, Hard):
            with torch.no_grad():
                for name, slot in slots.items():
                    Run._clear(optimizer, found[name].parameter, ~slot.keep)
        run._arm()
        held: dict[str, Tensor] = {}

        def before(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            held.clear()
            held.update(run.before_step(opt))

        def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            run.after_step(opt, held)
            held.clear()

        stack.callback(optimizer.register_step_pre_hook(before).remove)
        stack.callback(optimizer.register_step_post_hook(after).remove)
        yield run
