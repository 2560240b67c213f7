"""The loop of one forgetting task: attach, train on remain and forget batches, merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.updates.gs_lora.losses import Batch, Outputs
from maskwright.updates.gs_lora.method import GsLora
from maskwright.updates.gs_lora.run import GsLoraRun

Tell = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Forgotten:
    """What a task did: norms by group, |B A| by weight, the groups of norm up to 1 % of the largest, and the masks."""

    group_norms: dict[str, float]
    effects: dict[str, float]
    zero_groups: list[str]
    masks: MaskSet
    terms: dict[str, float]
    steps: int

    @property
    def zero_share(self) -> float:
        """Share of the groups that are zero."""
        return len(self.zero_groups) / len(self.group_norms)


def forget(
    model: nn.Module, method: GsLora, remain: Iterable[Batch], forget: Iterable[Batch], *, epochs: int = 100,
    lr: float = 1e-2, final_lr: float = 1e-5, prune: float = 0.0, centres: Mapping[int, Tensor] | None = None,
    outputs: Outputs | None = None, seed: int = 0, on_step: Tell | None = None,
) -> Forgotten:  # fmt: skip
    """Make `model` forget the classes of `forget` and keep those of `remain`; the update is merged into its weights.

    remain, forget: iterables of (x, classes), iterated anew each time (a DataLoader, a list). An epoch is one pass
    over `remain`; `forget` starts again when it is at its end. AdamW without weight decay (the lasso shrinks
    already), a cosine from lr to final_lr. prune: groups of norm up to this share of the largest become exactly 0
    before the merge. centres: `prototypes` of the model before the task, for ++. outputs: (model, x) -> (logits,
    embedding) where the prototypes are of embeddings.
    Differs: the last weights are merged (their running mean with ema_decay), not those of the best test score.
    Raises BadInput for an empty set, a class on both sides, or a loss that is no longer finite; the model is then as before.
    """
    if epochs < 1 or lr <= 0:
        raise BadInput(f"gs_lora needs epochs >= 1 and lr > 0, got {epochs}, {lr}")
    seen: tuple[set[int], set[int]] = (set(), set())
    steps = 0
    with method.attach(model, seed=seed) as run:
        optimizer = torch.optim.AdamW(run.trainable, lr=lr, weight_decay=0.0)
        mean: list[Tensor] = []
        bad = _again(forget)
        terms: dict[str, float] = {}
        model.train()
        for epoch in range(epochs):
            rate = final_lr + (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
            alpha = method.alpha if epoch >= method.alpha_epoch else 0.0
            first = steps
            for x_remain, y_remain in remain:
                x_forget, y_forget = next(bad)
                _apart(seen, y_remain, y_forget)
                steps += 1
                if not run.alive:
                    continue  # every group is at exactly 0: the model stays as it was
                for group in optimizer.param_groups:
                    group["lr"] = rate
                terms = _step(run, model, optimizer, (x_remain, y_remain), (x_forget, y_forget), alpha, centres, outputs)
                run.shrink(rate, alpha)
                if method.ema_decay and epoch >= method.ema_epoch:
                    mean = _averaged(mean, run.trainable, method.ema_decay)
                if on_step is not None:
                    on_step(steps, terms)
            if steps == first:
                raise BadInput("gs_lora: the remain set is empty; without it the model would be unlearned as a whole")
        with torch.no_grad():
            for parameter, value in zip(run.trainable, mean, strict=bool(mean)):
                parameter.copy_(value)
        if prune:
            run.prune_groups(prune)
        told = Forgotten(run.group_norms(), run.effects(), run.zero_groups(), run.masks(), terms, steps)
        run.merge()
    return told


def _step(
    run: GsLoraRun, model: nn.Module, optimizer: torch.optim.Optimizer, remain: Batch, forget: Batch, alpha: float,
    centres: Mapping[int, Tensor] | None, outputs: Outputs | None,
) -> dict[str, float]:  # fmt: skip
    optimizer.zero_grad()
    if outputs is None:
        pair = (model(remain[0]), model(forget[0]))
        both = None
    else:
        told = (outputs(model, remain[0]), outputs(model, forget[0]))
        pair, both = (told[0][0], told[1][0]), (told[0][1], told[1][1])
    loss, terms = run.loss((pair[0], remain[1]), (pair[1], forget[1]), alpha=alpha, centres=centres, outputs=both)
    if not bool(torch.isfinite(loss)):
        raise BadInput(f"gs_lora: the loss is {float(loss.detach())} (terms {terms}); a lower lr may help")
    loss.backward()
    optimizer.step()
    return terms


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BadInput("gs_lora: the forget set is empty")


def _apart(seen: tuple[set[int], set[int]], remain: Tensor, forget: Tensor) -> None:
    for classes, y in zip(seen, (remain, forget), strict=True):
        classes |= set(y.tolist())
    both = sorted(seen[0] & seen[1])
    if both:
        raise BadInput(f"gs_lora: class {both[0]} is in the remain and in the forget set")


def _averaged(mean: list[Tensor], values: list[nn.Parameter], decay: float) -> list[Tensor]:
    """The running mean, which starts at the first values it sees."""
    now = [value.detach() for value in values]
    return [old.lerp(new, 1 - decay) for old, new in zip(mean, now, strict=True)] if mean else [v.clone() for v in now]
