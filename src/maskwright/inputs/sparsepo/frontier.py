"""What the claim measures: pairs sampled from a reference, policies trained on them, reward against divergence, masks.

Nothing here knows the lab: claim.py brings the references.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.select import generator
from maskwright.inputs.pairs import Pairs
from maskwright.inputs.preference import IGNORE

Point = tuple[float, float]  # divergence in nats of a whole response, mean score
Attach = Callable[[nn.Module, nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class World:
    """A frozen reference, pairs sampled from it, other pairs to look at masks on, and prompts for new samples.

    worth: (vocabulary,) what a word adds to the score. pad: behind the `end` word, never sampled before it. length:
    of prompt and response.
    """

    reference: nn.Module
    pairs: Pairs
    looked_at: Pairs
    prompts: Tensor
    worth: Tensor
    pad: int
    end: int
    length: int


@torch.no_grad()
def sample(model: Any, prompts: Tensor, length: int, pad: int, end: int, rng: torch.Generator) -> Tensor:
    """Prompts (n, p) -> (n, length), drawn word by word."""
    ids, past, done = prompts, None, torch.zeros(len(prompts), dtype=torch.bool)
    while ids.shape[1] < length:
        out = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
        past = out.past_key_values
        said = out.logits[:, -1].index_fill(1, torch.tensor([pad]), -torch.inf)
        word = torch.multinomial(said.softmax(-1), 1, generator=rng)[:, 0]
        ids = torch.cat([ids, word.masked_fill(done, pad)[:, None]], 1)
        done |= word == end
    return ids


def pairs_of(model: Any, prompts: Tensor, worth: Tensor, length: int, pad: int, end: int, rng: torch.Generator) -> Pairs:
    """Two responses to each prompt: the one with the greater score is chosen; an equal pair is left out."""
    one, other = (sample(model, prompts, length, pad, end, rng) for _ in range(2))
    cut = prompts.shape[1]
    gap = worth[one[:, cut:]].sum(1) - worth[other[:, cut:]].sum(1)
    swap = (gap < 0)[:, None]
    ids = torch.cat([torch.where(swap, other, one)[gap != 0], torch.where(swap, one, other)[gap != 0]])
    labels = ids.masked_fill(ids == pad, IGNORE)
    labels[:, :cut] = IGNORE
    return Pairs(ids, (ids != pad).long(), labels)


def take(pairs: Pairs, rows: Tensor) -> Pairs:
    """Some of the pairs, by number."""
    both = torch.cat([rows, rows + len(pairs.ids) // 2])
    return Pairs(pairs.ids[both], pairs.attention[both], pairs.labels[both])


def train(
    world: World, attach: Attach, steps: Sequence[int], seed: int, *, lr: float, mask_lr: float, batch: int = 32,
    flip: bool = False,
) -> tuple[list[Point], dict[str, float]]:  # fmt: skip
    """Train a copy of the reference; its points after each number of `steps`, and what its mask looks like at the end.

    The rate climbs over the first tenth. flip: the mask network climbs where it should descend.
    Differs: SGD moves the policy, AdamW only the mask network. Adam moves weights that hear next to nothing of the
    preference as far as the others; at this size that says learned words outside their places, for many nats.
    """
    policy, rng = copy.deepcopy(world.reference).requires_grad_(True), generator(seed, "batches")
    points = []
    with attach(policy, world.reference) as run:
        masked: list[nn.Parameter] = getattr(run, "mask_parameters", [])
        for parameter in masked if flip else []:
            parameter.register_hook(torch.neg)
        optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(policy.parameters(), lr=lr, momentum=0.9)]
        optimizers += [torch.optim.AdamW(masked, lr=mask_lr, weight_decay=0.01)] if masked else []
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda at: min(1.0, 10 * (at + 1) / max(steps))) for o in optimizers
        ]
        total = len(world.pairs.ids) // 2
        for step in range(1, max(steps) + 1):
            loss, _ = run.loss(take(world.pairs, torch.randint(total, (min(batch, total),), generator=rng)))
            policy.zero_grad()
            for parameter in masked:
                parameter.grad = None
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if step in steps:
                points.append(point(world, policy, seed))
        return points, looks(world, run) if hasattr(run, "masks") else {}


@torch.no_grad()
def point(world: World, policy: Any, seed: int) -> Point:
    """Divergence and mean score of samples; each word's divergence over the whole vocabulary, so only prefixes are drawn."""
    ids = sample(policy, world.prompts, world.length, world.pad, world.end, generator(seed, "samples"))
    cut = world.prompts.shape[1]
    now, before = (model(input_ids=ids, use_cache=False).logits[:, cut - 1 : -1].log_softmax(-1)
                   for model in (policy, world.reference))  # fmt: skip
    kl = torch.where(ids[:, cut:] != world.pad, (now.exp() * (now - before)).sum(-1), 0.0)
    return float(kl.sum(1).mean()), float(world.worth[ids[:, cut:]].sum(1).mean())


def looks(world: World, run: Any) -> dict[str, float]:
    """Of the reward mask on pairs not trained on. auc: the chance that a token that carries the preference weighs more
    than one that does not (a tie counts half); zeros: share of weights that are exactly 0; means of either kind."""
    pairs, found = world.looked_at, run.masks(world.looked_at)
    values = torch.cat([found[f"{side}.reward"].values for side in ("chosen", "rejected")])
    carries = world.worth[pairs.ids[:, 1:]] != 0
    mine, other = values[pairs.response & carries], values[pairs.response & ~carries]
    # The rank sum, ties at their mean rank.
    order, counts = torch.cat([mine, other]).unique(return_inverse=True, return_counts=True)[1:]
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[order]
    auc = (rank[: len(mine)].sum() - len(mine) * (len(mine) + 1) / 2) / (len(mine) * len(other))
    sparse = run.sparsity(pairs)["reward"]
    return {
        "auc": float(auc),
        "zeros": sparse.zeros,
        "dead": sparse.dead,
        "on": float(mine.mean()),
        "off": float(other.mean()),
    }


def edge(points: Sequence[Point], base: Sequence[Point], grid: int = 10) -> float:
    """Mean lead in score of one curve over another at the same divergence, over the range that both reach."""
    top = min(max(kl for kl, _ in curve) for curve in (points, base))
    at = [top * (i + 1) / grid for i in range(grid)]
    return sum(_at(points, kl) - _at(base, kl) for kl in at) / grid


def _at(points: Sequence[Point], kl: float) -> float:
    """The curve's score at a divergence, straight between its points."""
    curve = sorted(points)
    for (left, low), (right, high) in pairwise(curve):
        if left <= kl <= right:
            return low + (high - low) * (kl - left) / (right - left) if right > left else max(low, high)
    return curve[-1][1]
