"""Pre-training of a learner on images: one loop whose every step is addressed by its number, so that it resumes exactly.

Order, crops and masks of step t come from (seed, t) alone. What a stopped run needs is therefore the learner, the
optimiser's moments and the number of steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.core.store import replacing
from maskwright.inputs.method import Learner

_LARGE = 1e6  # a weight that no training that goes well comes to
_MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[Tensor], Tensor]  # numbers of images (n,) -> (n, channels, height, width) uint8


@final
@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to `final` of the rate; no decay on tensors of one dim.

    warmup: share of the steps. crop: least share of an image's area that a random crop takes (1: whole images). flip:
    mirror half of them. clip: greatest gradient norm. Raises BadInput for numbers that make no sense.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    final: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 5.0
    crop: float = 0.67
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise BadInput(f"pre-training takes at least 1 step of 1 image, got {self.steps} of {self.batch}")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf and 0 < self.clip < math.inf):
            raise BadInput(f"lr and clip above 0, weight_decay at least 0: got {self.lr}, {self.clip}, {self.weight_decay}")
        if not (0 <= self.warmup < 1 and 0 <= self.final <= 1 and 0 < self.crop <= 1):
            raise BadInput(
                f"warmup in [0, 1), final in [0, 1], crop in (0, 1]: got {self.warmup}, {self.final}, {self.crop}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        along = (step - warm) / max(1, self.steps - warm)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * along)))


class Pretrain:
    """A learner, where its images come from, and how far it is. `for loss in run.steps(): ...` trains it.

    images: how many there are. read: gives those of some numbers, uint8; values are divided by 255. Raises BadInput when
    there is no image, and naming the step when a loss is not finite.
    """

    def __init__(self, learner: Learner, images: int, read: Read, recipe: Recipe) -> None:
        if images < 1:
            raise BadInput("there is no image to pre-train on")
        self.learner, self.images, self.read, self.recipe = learner, images, read, recipe
        self.batch = min(recipe.batch, images)
        self.losses: list[float] = []
        self._last = -1, torch.empty(0, dtype=torch.int64)
        named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        self.names = list(named)
        decayed = [p for p in named.values() if p.ndim >= 2]
        spared = [p for p in named.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def steps(self) -> Iterator[float]:
        """Take the steps that are left, one at a time; yields each loss."""
        while self.step < self.recipe.steps:
            yield self._advance()

    def _advance(self) -> float:
        step, recipe = self.step, self.recipe
        self.learner.train()
        rng = generator(recipe.seed, f"pretrain/step/{step}")
        images = crops(self.read(self.numbers(step)).float().div_(255), rng, recipe.crop, recipe.flip)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.learner.loss(images, rng)
        except BadInput as error:
            # What the learner refuses may be of its own making: images read from 8 bits are finite.
            if not (most := self._greatest()) < _LARGE:
                raise BadInput(f"step {step}: the learner's weights reach {most:g}; a smaller lr may help") from error
            raise
        if not bool(loss.isfinite()):
            raise BadInput(f"step {step}: the loss is {loss.item()}; a smaller lr may help")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.clip)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    @torch.no_grad()
    def _greatest(self) -> float:
        """The greatest |weight|, NaN where one is."""
        return float(torch.stack([p.abs().max() for p in self.learner.parameters() if p.numel()]).max())

    def numbers(self, step: int) -> Tensor:
        """The images of a step: passes over all of them, each in an order of its own. (batch,) int64."""
        at, chosen, missing = step * self.batch, list[Tensor](), self.batch
        while missing:
            turn, place = divmod(at, self.images)
            chosen.append(self._order(turn)[place : place + missing])
            at, missing = at + len(chosen[-1]), missing - len(chosen[-1])
        return torch.cat(chosen)

    def _order(self, turn: int) -> Tensor:
        """The order of a pass, made once: its steps follow each other."""
        if self._last[0] != turn:
            rng = generator(self.recipe.seed, f"pretrain/order/{turn}")
            self._last = turn, torch.randperm(self.images, generator=rng)
        return self._last[1]

    def save(self, path: Path | str) -> None:
        """Write the state as one safetensors file; it appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {f"learner/{name}": value.detach().clone() for name, value in self.learner.state_dict().items()}
        parameters = dict(self.learner.named_parameters())
        for name in self.names:
            for moment in _MOMENTS:
                held = self.optimizer.state.get(parameters[name], {}).get(moment)
                if held is not None:
                    tensors[f"{moment}/{name}"] = held.clone()
        told = {
            "format": "maskwright.pretraining",
            "recipe": json.dumps(asdict(self.recipe)),
            "losses": json.dumps(self.losses),
        }
        with replacing(Path(path)) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=told)

    def restore(self, path: Path | str) -> None:
        """Go on from a state that `save` wrote. Raises BadInput for another recipe, another learner or no such file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:
                told = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: no state to go on from ({' '.join(str(error).split())})") from None
        if told.get("format") != "maskwright.pretraining":
            raise BadInput(f"{path}: not the state of a pre-training")
        theirs, mine = json.loads(told["recipe"]), json.loads(json.dumps(asdict(self.recipe)))
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise BadInput(f"{path}: the stopped run has {key} {theirs.get(key)}, now {value}")
        state = {name[8:]: value for name, value in tensors.items() if name.startswith("learner/")}
        shapes = {name: tuple(value.shape) for name, value in self.learner.state_dict().items()}
        if shapes != {name: tuple(value.shape) for name, value in state.items()}:
            raise BadInput(f"{path}: the stopped run has another learner")
        self.learner.load_state_dict(state)
        self.losses = json.loads(told["losses"])
        parameters = dict(self.learner.named_parameters())
        for name in self.names:
            if f"exp_avg/{name}" in tensors:
                held = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}
                self.optimizer.state[parameters[name]] = {"step": torch.tensor(float(self.step)), **held}


def crops(images: Tensor, rng: torch.Generator, least: float, flip: bool) -> Tensor:
    """A random square-wise crop of each image, scaled back to its size, half of them mirrored. (n, c, h, w) -> the same.

    A crop takes a share of the area between `least` and 1, of the image's own proportions.
    """
    if least == 1 and not flip:
        return images
    count = len(images)
    side = (torch.rand(count, generator=rng) * (1 - least) + least).sqrt()
    x, y = ((torch.rand(count, generator=rng) * 2 - 1) * (1 - side) for _ in range(2))
    turn = 1 - 2 * (torch.rand(count, generator=rng) < 0.5).float() if flip else torch.ones(count)
    zero = torch.zeros(count)
    matrix = torch.stack([torch.stack([side * turn, zero, x], 1), torch.stack([zero, side, y], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
