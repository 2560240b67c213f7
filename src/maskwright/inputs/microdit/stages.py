"""Training in stages: most steps under the mask, then a short one that sees every token; resumable, with an average."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from maskwright.core.cache import write_atomic
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.microdit.edm import Denoiser

_FORMAT = "maskwright.microdit 1"


@final
@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps at one density. The rate climbs for `warmup` steps, then goes to `final` of lr on a cosine.

    clip: norm of the gradient at most. ema: decay of the average of the weights (0: none), kept from `ema_start` on.
    """

    steps: int
    density: float = 1.0
    lr: float = 8e-5
    warmup: int = 0
    final: float = 1.0
    clip: float = 0.25
    ema: float = 0.0
    ema_start: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or self.ema_start < 0 or not 0 < self.density <= 1:
            raise BadInput(f"a stage has at least 1 step and a density in (0, 1], got {self}")
        if not all(0 < value < math.inf for value in (self.lr, self.clip)) or not 0 <= self.ema < 1:
            raise BadInput(f"lr and clip are above 0 and ema lies in [0, 1), got {self}")
        if not 0 <= self.final <= 1:
            raise BadInput(f"final is the share of lr that is left at the end, in [0, 1], got {self.final}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * along)) / 2)


PAPER_256 = (
    Stage(250_000, 0.25, 2.4e-4, warmup=2500, final=0.33),
    Stage(30_000),
)
"""The paper's two stages at 256 pixels, batch 2048."""

PAPER_512 = (
    Stage(50_000, 0.25, warmup=500, clip=0.5, ema=0.99975, ema_start=25_000),
    Stage(5_000, clip=0.5, ema=0.9975, ema_start=1_000),
)
"""And at 512, from the weights of 256, with p_mean 0, p_std .6 and interpolation 2."""


@final
class Run:
    """Training of a denoiser through stages, one `step` at a time in the user's own loop over the data.

    AdamW, one for all stages. Step n draws its noise and its mask from generators of (seed, n): runs that differ in their
    masks see the same noise, and a run that was saved and loaded goes on as if it had not stopped. `average` is the
    averaged model (None before a stage with ema has come to its start).
    """

    def __init__(self, model: Denoiser, stages: Sequence[Stage], *, weight_decay: float = 0.1, seed: int = 0) -> None:
        if not stages:
            raise BadInput("training needs at least one stage")
        self.model, self.stages, self.seed, self.at = model, tuple(stages), seed, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.stages[0].lr, weight_decay=weight_decay, fused=True)
        self.average: Denoiser | None = None

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self) -> tuple[int, int]:
        """(number of the stage, step inside it) of the next step. Raises BadInput when the last one is over."""
        left = self.at
        for number, stage in enumerate(self.stages):
            if left < stage.steps:
                return number, left
            left -= stage.steps
        raise BadInput(f"all {self.total} steps are done")

    def step(self, x: Tensor, y: Tensor) -> float:
        """One optimiser step on clean images (batch, channels, height, width) and conditions; gives the loss before it.

        Raises BadInput for a loss that is not finite.
        """
        number, inside = self.stage()
        stage, trunk = self.stages[number], self.model.net.trunk
        self.model.train()
        trunk.density = stage.density
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(inside)
        mask = trunk.draw(len(x), self.model.net.tokens, generator(self.seed, f"mask {self.at}"))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(x, y, generator(self.seed, f"noise {self.at}"), mask=mask)
        if not bool(loss.isfinite()):
            raise BadInput(f"the loss is {float(loss)} at step {self.at}: lower lr ({stage.lr})")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), stage.clip)
        self.optimizer.step()
        self._follow(stage, inside)
        self.at += 1
        return float(loss.detach())

    @torch.no_grad()
    def _follow(self, stage: Stage, inside: int) -> None:
        """The average forgets by `ema` a step. A stage's starts as a copy, as a weight-0 average would."""
        if not stage.ema or inside < stage.ema_start:
            return
        if self.average is None or inside == stage.ema_start:
            self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
            return
        for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - stage.ema)

    def save(self, path: Path) -> None:
        """Write weights, average, optimiser and where the run stands as one .safetensors (nothing is pickled)."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        told = {"format": _FORMAT, "at": str(self.at), **self._told()}
        write_atomic(Path(path), save({name: value.detach().contiguous() for name, value in tensors.items()}, told))

    def load(self, path: Path) -> None:
        """Go on from a file of the same model, stages and seed. Raises BadInput naming what differs."""
        try:
            with safe_open(path, "pt") as file:
                told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: no training run can be read: {error}") from None
        for key, mine in {"format": _FORMAT, **self._told()}.items():
            if told.get(key) != mine:
                raise BadInput(f"{path}: its {key} is {told.get(key)}, this run's is {mine}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            parts.setdefault(head, {})[rest] = value
        try:
            self.model.load_state_dict(parts["model"])
            self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if parts["average"] else None
            if self.average is not None:
                self.average.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise BadInput(f"{path}: made with another model: {str(error).splitlines()[-1].strip()}") from None
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            kept = {key: parts["optimizer"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {key: value for key, value in kept.items() if value is not None}
        self.at = int(told["at"])

    def _told(self) -> dict[str, str]:
        stages = json.dumps([asdict(stage) for stage in self.stages])
        return {"stages": stages, "seed": str(self.seed)}
