"""Two pre-trained models beside the gated one, adapted by zeroth-order steps: MiniLM on verbs, the lab's ViT on new digits.

Reported, never gated. Nothing here knows the lab: claim.py brings the models and their data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Effect
from maskwright.updates.sparse_mezo import SparseMezo

DENSITY, BATCH, UNIT = 0.25, 16, 1e-5
Rows = tuple[Tensor, Tensor]
Draw = Callable[[int, torch.Generator], Tensor]
Arm = Callable[[int, str], dict[str, float]]
Make = Callable[[int], "World"]  # from a seed


@dataclass(frozen=True)
class World:
    """A model as it came, and rows to adapt it by, to choose a rate by, and to report.

    `order()` gives a new `draw(batch, generator)` of row numbers; none: drawn with repetition.
    """

    model: nn.Module
    train: Rows
    val: Rows
    test: Rows
    steps: int
    order: Callable[[], Draw] | None = None

    def draw(self) -> Callable[[int, torch.Generator], Rows]:
        """Batches of a run, from the first."""
        x, y = self.train
        numbers = self.order() if self.order else lambda batch, rng: torch.randint(len(y), (batch,), generator=rng)

        def batches(batch: int, rng: torch.Generator) -> Rows:
            chosen = numbers(batch, rng)
            return x[chosen], y[chosen]

        return batches


class TopLayers(nn.Module):
    """The last `count` layers of a BertModel under a frozen head of label vectors: (n, length, width) states -> logits.

    The layers below are frozen, so `states` gives what they say once for a text, and a step runs the rest only.
    """

    head: Tensor

    def __init__(self, encoder: Any, head: Tensor, scale: float, count: int) -> None:
        super().__init__()
        self.encoder, self.scale = copy.deepcopy(encoder).requires_grad_(False), scale
        self.encoder.embeddings = _Given()
        self.encoder.encoder.layer = self.encoder.encoder.layer[-count:].requires_grad_(True)
        self.register_buffer("head", head.detach().clone())

    @staticmethod
    @torch.no_grad()
    def states(encoder: Any, ids: Tensor, count: int) -> Tensor:
        """Token ids (n, length), 0 = padding -> the last `count` layers' input (n, length, width), zeros at padding."""
        real = ids != 0
        out = [
            encoder(input_ids=rows, attention_mask=keep.long(), output_hidden_states=True).hidden_states[-count - 1]
            for rows, keep in zip(ids.split(64), real.split(64), strict=True)
        ]
        return torch.cat(out) * real.unsqueeze(-1)

    def forward(self, states: Tensor) -> Tensor:
        real = (states != 0).any(-1)
        width = int(real.sum(1).max())  # padding stands at the end: cut it
        states, real = states[:, :width], real[:, :width]
        hidden = self.encoder(inputs_embeds=states, attention_mask=real.long()).last_hidden_state
        mean = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        return self.scale * F.normalize(mean, dim=-1) @ self.head.T


class _Given(nn.Module):
    """In the place of an embedding: the states as they are."""

    def forward(self, inputs_embeds: Tensor, **other: Any) -> Tensor:
        return inputs_embeds


def _small(seed: int) -> World:
    """For smoke runs: a linear map of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, rows = nn.Linear(8, 4), (torch.rand(16, 8), torch.arange(16) % 4)
    return World(model, rows, rows, rows, steps=2)


def search(at: Callable[[int], float], start: int, *, reach: int, moves: int) -> int:
    """The octave of least loss: from `start` to the best of those within `reach`, until that is the middle one."""
    best = start
    for _ in range(moves):
        now = min(range(best - reach, best + reach + 1), key=at)
        if now == best:
            break
        best = now
    return best


@torch.no_grad()
def measured(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Mean cross entropy in nats (infinite where it is not finite) and accuracy, in eval mode."""
    logits = torch.cat([model.eval()(part) for part in rows[0].split(64)])
    loss = float(F.cross_entropy(logits, rows[1]))
    right = float((logits.argmax(-1) == rows[1]).float().mean())
    return {"loss": loss if math.isfinite(loss) else math.inf, "accuracy": right}


def adapted(world: World, mask: str, octave: int, seed: int) -> nn.Module:
    """A copy of the model after a run at rate UNIT * 2^octave. Runs of a seed see the same batches and directions."""
    model, rng, draw = copy.deepcopy(world.model), torch.Generator().manual_seed(seed), world.draw()
    method = SparseMezo(density=DENSITY, lr=UNIT * 2.0**octave, mask=mask)  # type: ignore[arg-type]
    with method.attach(model, seed=seed) as run:
        for _ in range(world.steps):
            x, y = draw(BATCH, rng)
            run.step(lambda x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
    return model


def arms(prefix: str, make: Make, start: Mapping[str, int]) -> dict[str, Arm]:
    """An arm for the model as it came and one for each mask of `start` (where its search begins, octaves above UNIT)."""

    def before(seed: int, scale: str) -> dict[str, float]:
        world = make(seed) if scale == "full" else _small(seed)
        return measured(world.model, world.test)

    def of(mask: str) -> Arm:
        def arm(seed: int, scale: str) -> dict[str, float]:
            world, found = make(seed) if scale == "full" else _small(seed), {}

            def at(octave: int) -> float:
                if octave not in found:
                    model = adapted(world, mask, octave, seed)
                    found[octave] = measured(model, world.val)["loss"], measured(model, world.test)
                return found[octave][0]

            best = search(at, start[mask], reach=1, moves=3 if scale == "full" else 1)  # 3 to 5 rates
            inside = best - 1 in found and best + 1 in found
            return {**found[best][1], "octave": best, "rates": len(found), "inside": float(inside)}

        return arm

    return {f"{prefix}_before": before, **{f"{prefix}_{mask}": of(mask) for mask in start}}


def effects(prefix: str, about: str, masks: Iterable[str]) -> tuple[Effect, ...]:
    """What is reported of a world: small weights trained against the model as it came and against each other mask."""
    small = f"{prefix}_small"
    rows = [("lowers the loss", "before", "loss"), ("raises the accuracy", "before", "accuracy")]
    rows += [(f"before {mask}, each at its own rate", mask, "loss") for mask in masks if mask != "small"]
    return tuple(
        Effect(f"{about}: small {what}", small, f"{prefix}_{other}", figure, "quality", higher=figure == "accuracy")
        for what, other, figure in rows
    )
