"""The one training loop of all claims, and the two ways a trained model is measured.

A method of masked training is plugged in from outside, as a context around the loop; the loop knows no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.lab.models import seeded

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Context = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]


def train(
    model: nn.Module, data: tuple[Tensor, Tensor] | Draw, *, steps: int, batch: int = 64, lr: float = 0.1,
    optimizer: Literal["sgd", "adamw"] = "sgd", weight_decay: float = 0.0, momentum: float = 0.9, warmup: int = 0,
    final_lr: float = 0.0, clip: float | None = None, seed: int = 0, context: Context | None = None,
    on_step: Callable[[int, float], None] | None = None, loss_fn: Loss | None = None,
) -> float:  # fmt: skip
    """Train in place for `steps` optimiser steps and give the mean loss of the last tenth of them.

    `data` is (x, y), drawn in shuffled passes, or `draw(batch, generator) -> (x, y)`. The rate climbs linearly for
    `warmup` steps, then follows a half cosine from `lr` to `final_lr`. `context(model, optimizer)` is entered around
    the loop. `on_step(step, loss)` is called after every optimiser step, from 0. All chance comes from `seed`.
    Raises ValueError for a count or rate that is not positive, or a loss that is no longer finite.
    """
    if steps < 1 or batch < 1 or lr <= 0:
        raise ValueError(f"steps, batch and lr must be positive, not {steps}, {batch}, {lr}")
    made = _optimizer(model, optimizer, lr, weight_decay, momentum)
    score = cross_entropy if loss_fn is None else loss_fn
    draw = data if callable(data) else _passes(*data)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    was_training = model.training
    model.train()
    with seeded(seed), nullcontext() if context is None else context(model, made):
        for step in range(steps):
            for group in made.param_groups:
                group["lr"] = rate(step, steps, lr, warmup, final_lr)
            x, y = draw(batch, order)
            made.zero_grad(set_to_none=True)
            loss = score(model(x), y)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss is {losses[-1]} at step {step}: lower lr ({lr})")
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            if on_step is not None:
                on_step(step, losses[-1])
    model.train(was_training)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def rate(step: int, steps: int, lr: float, warmup: int = 0, final_lr: float = 0.0) -> float:
    """Learning rate at `step`: (step + 1) / warmup of `lr` in the warm-up, then a half cosine down to `final_lr`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * along)) / 2


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (..., classes) against class numbers (...)."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def char_windows(ids: Tensor, context: int) -> Draw:
    """Draw random windows of a text: x (batch, context) and y, the same one character later. `ids` is (length,)."""
    if len(ids) <= context:
        raise ValueError(f"a text of {len(ids)} characters has no window of {context} and its next character")

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - context, (batch, 1), generator=generator)
        window = ids[starts + torch.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    return draw


def char_rows(ids: Tensor, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """A text cut into rows one after the other, for measuring: x and y (rows, context), the ragged end left out."""
    rows = (len(ids) - 1) // context
    rows = rows if limit is None else min(rows, limit)
    used = rows * context
    return ids[:used].view(rows, context), ids[1 : used + 1].view(rows, context)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 500) -> float:
    """Share of rows (or characters) whose greatest logit is the right one; the model is measured in eval mode."""
    hits = sum(int((out.argmax(-1) == part).sum()) for out, part in _outputs(model, x, y, batch))
    return hits / y.numel()


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 500, loss_fn: Loss | None = None) -> float:
    """Mean loss over all of (x, y) in eval mode, in nats for the default cross entropy."""
    score = cross_entropy if loss_fn is None else loss_fn
    total = sum(float(score(out, part)) * len(part) for out, part in _outputs(model, x, y, batch))
    return total / len(y)


def _outputs(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    if not len(x):
        raise ValueError("there is nothing to measure on: no rows")
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(x), batch):
            yield model(x[first : first + batch]), y[first : first + batch]
    finally:
        model.train(was_training)


def _passes(x: Tensor, y: Tensor) -> Draw:
    """Every row once in a shuffled order, then again in another; a batch may reach over the border of two passes."""
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs and {len(y)} targets")
    left = torch.empty(0, dtype=torch.int64)

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal left
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(len(x), generator=generator)])
        chosen, left = left[:batch], left[batch:]
        return x[chosen], y[chosen]

    return draw


def _optimizer(model: nn.Module, name: str, lr: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    known: dict[str, dict[str, Any]] = {"sgd": {"momentum": momentum}, "adamw": {"betas": (momentum, 0.95)}}
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(known)}")
    kind: Any = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    wanted = [p for p in model.parameters() if p.requires_grad]
    return kind(wanted, lr=lr, weight_decay=weight_decay, **known[name])
