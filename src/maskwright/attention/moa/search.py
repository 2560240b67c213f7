"""MoA's search: profile at several lengths, a table of losses, an integer program, and the plan that answers best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskwright.attention import use
from maskwright.attention.heads import Choice, HeadPlan, Rule, pareto
from maskwright.attention.huggingface import hosts, shape_of
from maskwright.attention.moa.profile import Absolute, answer_loss, answered, profile
from maskwright.attention.moa.rules import Affine, band, candidates, losses
from maskwright.attention.moa.rules import density as density_of
from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.attention.moa.method import Moa

Calibration = Mapping[int, Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Table:
    """What every rule would lose and cost. loss (lengths, layers, kv_heads, rules), cost (lengths + 1, rules): the mean
    density's parts at each of `lengths` and at `extend`; heads: query heads of a layer."""

    lengths: tuple[int, ...]
    extend: int
    rules: tuple[Affine, ...]
    loss: np.ndarray
    cost: np.ndarray
    heads: int
    block: int
    sink: int

    def choose(
        self, density: float, *, at_most_rules: int | None = 2, points: int = 5, seconds: float = 10.0
    ) -> list[Choice]:
        """The front of choices whose mean density lies in 0.9 to 1 times `density` at every length. Raises BadInput where
        there is none, saying which bound cannot be met."""
        at, (_, layers, kv_heads, many) = (*self.lengths, self.extend), self.loss.shape
        for n, shares in zip(at, self.cost, strict=True):
            if shares.min() > density or shares.max() < 0.9 * density:
                raise BadInput(
                    f"moa: at length {n} the rules' densities go from {shares.min():.3f} to {shares.max():.3f}; no mean "
                    f"lies in {0.9 * density:.3f} to {density:.3f}"
                )
        found = pareto(
            self.loss.reshape(len(self.lengths), -1, many), self.cost[:, None].repeat(layers * kv_heads, 1),
            [(0.9 * density - 1e-9, density + 1e-9)] * len(at), points=points, at_most_rules=at_most_rules,
            layer_of=np.repeat(np.arange(layers), kv_heads).tolist(), seconds=seconds,
        )  # fmt: skip
        if not found:
            raise BadInput(
                f"moa: no choice of rules has a mean density in {0.9 * density:.3f} to {density:.3f} at all of {at}: "
                "a finer step, fewer lengths or a smaller block give more rules"
            )
        return found

    def plan(self, rules: Any) -> HeadPlan:
        """The plan in which key head i of all layers follows rule rules[i]."""
        _, layers, kv_heads, _ = self.loss.shape
        made = [Rule("affine", {"alpha": self.rules[r][0], "beta": self.rules[r][1]}) for r in rules]
        group = self.heads // kv_heads
        table = tuple(tuple(made[layer * kv_heads + h // group] for h in range(self.heads)) for layer in range(layers))
        return HeadPlan("moa", layers, self.heads, kv_heads, table, {"block": self.block, "sink": self.sink})


def weigh(
    method: type[Moa], model: Any, told: Mapping[int, Tensor], counts: Mapping[int, int], lengths: tuple[int, ...],
    *, extend: int | None = None, block: int = 64, sink: int = 1, step: int | None = None, betas: int = 9, batch: int = 4,
    absolute: Absolute = "after", say: Say = lambda line: None,
) -> Table:  # fmt: skip
    """Profile a model on its answers: told[n] (samples, n) ids, the last counts[n] of them the answer (see `search`)."""
    extend = extend or 2 * max(lengths)
    rules = candidates(lengths, extend, block, step or max(block, min(lengths) // 2), betas)  # 1024 at the paper's lengths
    found, heads = [], 0
    for n in lengths:
        say(f"profile {len(told[n])} samples of {n} tokens")
        blocks = profile(model, told[n], counts[n], block, method(density=1.0), batch=batch, absolute=absolute)
        heads = blocks.shape[1]
        hosted = hosts(model)
        groups = influence_of_groups(blocks, shape_of(hosted[0][1]).kv_heads if hosted else heads)
        found.append(losses(groups, [band(*rule, n, block) for rule in rules], sink))
    cost = [[density_of(band(*rule, n, block), n, block, sink) for rule in rules] for n in (*lengths, extend)]
    return Table(lengths, extend, tuple(rules), torch.stack(found).double().numpy(), np.array(cost), heads, block, sink)


def search(
    method: type[Moa], model: Any, calibration: Calibration, *, density: float, lengths: tuple[int, ...], seed: int,
    say: Say, unseen: int | None = None, at_most_rules: int | None = 2, points: int = 5, seconds: float = 10.0,
    batch: int = 4, **settings: Any,
) -> HeadPlan:  # fmt: skip
    """The plan of heads for a causal model at a mean density.

    calibration: for every length of `lengths` (and `unseen`) prompts (samples, p) int64 without padding, long documents
    that end in a question; the dense model itself answers them up to that length, and only its answer's loss counts (next
    token loss of plain text gives windows that are too local).
    extend: a length beyond the profiled ones whose density is bounded too, by default twice the longest. unseen: the
    length at which the front's plans are compared by answer loss, by default the longest. step: alpha's grid (tokens), by
    default half the shortest length; betas: places of beta; block: tokens (64); sink: blocks (1). Mean densities lie in
    0.9 to 1 times `density` at every length; a layer has at most `at_most_rules` rules. seed is noted: nothing here is
    drawn. seconds: for one integer program. batch: samples at a time. absolute: |influence| "after" or "before" its sums.
    Raises BadInput when prompts are missing, do not fit, or no choice of rules meets the bounds.
    """
    if not 0 < density <= 1 or not lengths or any(a >= b for a, b in pairwise(lengths)):
        raise BadInput(f"moa: density in (0, 1] and ascending lengths, got {density} and {lengths}")
    unseen = unseen or max(lengths)
    missing = [n for n in {*lengths, unseen} if n not in calibration]
    if missing:
        raise BadInput(f"moa: no prompts for lengths {sorted(missing)}; there are some for {sorted(calibration)}")
    told = {n: answered(model, calibration[n], n) for n in {*lengths, unseen}}
    counts = {n: n - calibration[n].shape[1] for n in told}
    table = weigh(method, model, told, counts, lengths, batch=batch, say=say, **settings)
    say(f"choose among {len(table.rules)} rules for {table.loss[0, ..., 0].size} key heads")
    choices = table.choose(density, at_most_rules=at_most_rules, points=points, seconds=seconds)
    plans = [table.plan(choice.rules) for choice in choices]
    measured = [measure(model, method(heads=plan), told[unseen], counts[unseen], batch) for plan in plans]
    best = min(range(len(plans)), key=lambda i: (measured[i], i))
    say(f"{len(plans)} plans on the front; the best has answer loss {measured[best]:.4f} at length {unseen}")
    made_by = {
        "density": density, "seed": seed, "unseen": unseen, "settings": {k: v for k, v in settings.items() if v is not None},
        "calibration": {str(n): {"samples": len(told[n]), "answer": counts[n]} for n in sorted(told)},
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
    }  # fmt: skip
    inspected = {
        "lengths": [*lengths, table.extend], "densities": choices[best].cost.tolist(), "chosen": best,
        "losses": [c.loss.tolist() for c in choices], "gaps": [c.gap for c in choices], "answer_losses": measured,
        "rules": [list(rule) for rule in table.rules], "costs": table.cost.tolist(), "influence": table.loss.tolist(),
    }  # fmt: skip
    plan = plans[best]
    return HeadPlan("moa", plan.layers, plan.heads, plan.kv_heads, plan.rules, plan.grid, inspected, made_by)


def influence_of_groups(blocks: Tensor, kv_heads: int) -> Tensor:
    """(layers, heads, n, n) signed -> (layers, kv_heads, n, n): the greatest |influence| among heads that share keys."""
    return blocks.abs().unflatten(1, (kv_heads, -1)).amax(2)


@torch.no_grad()
def measure(model: Any, method: Moa, ids: Tensor, count: int, batch: int = 4) -> float:
    """Mean loss of the last `count` tokens of ids (samples, length) under a method."""
    total = 0.0
    with use(model, method):
        for part in ids.split(batch):
            total += float(answer_loss(model, part, count)) * len(part)
    return total / len(ids)
