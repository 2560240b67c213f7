"""Points of a sweep: what a policy scored, and what it cost as counted on a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Record, State, use
from maskwright.attention.sparse_frontier.counts import Size, Unit, indexing, pareto, prefill_flops, token_flops
from maskwright.attention.sparse_frontier.guarantee import mean

Task = Callable[[Any, str], Tensor]  # (model, way) -> scores (questions,) in 0..1, the same questions at every call


@dataclass(frozen=True)
class Policy:
    """A method at a density: `make(density)`. `way` is how the tasks are asked ("prefill", "decode", "late").

    unit, window, block: what finding the kept keys costs (see `indexing`).
    """

    make: Callable[[float], AttentionMethod]
    way: str = "prefill"
    unit: Unit = "none"
    window: int = 256
    block: int = 16


@dataclass(frozen=True, eq=False)
class Point:
    """One policy at one density: scores[task] (questions,), and what the probe cost.

    kept, computed, allowed: pairs of the prefill over layers and heads; read, stored: bytes of keys and values read for
    one decoded token, and held then. flops: of the prefill and of that token, with what finding the keys cost.
    """

    policy: str
    density: float
    scores: Mapping[str, Tensor]
    kept: int
    computed: int
    allowed: int
    read: int
    stored: int
    flops: float

    @property
    def mean(self) -> float:
        return mean(list(self.scores.values()))

    @property
    def worst(self) -> float:
        """The mean score of the task it does worst at."""
        return min(float(x.double().mean()) for x in self.scores.values())


@dataclass(frozen=True, eq=False)
class Table:
    """All points of a sweep; `dense[way]` are the dense ones."""

    dense: Mapping[str, Point]
    points: Mapping[tuple[str, float], Point]
    policies: Mapping[str, Policy]

    def drops(self, policy: str, density: float) -> tuple[float, float]:
        """(mean, worst) drop of a task's score below dense."""
        point, dense = self.points[policy, density], self.dense[self.policies[policy].way]
        lost = [float((dense.scores[t].double() - point.scores[t].double()).mean()) for t in dense.scores]
        return sum(lost) / len(lost), max(lost)

    def front(self) -> list[Point]:
        """The points, dense ones too, that no other beats in mean score at as few FLOPs."""
        every = [*self.dense.values(), *self.points.values()]
        return [every[i] for i in pareto([(p.flops, p.mean) for p in every])]


@dataclass(frozen=True)
class Dense(AttentionMethod):
    """Everything the model itself allows."""

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return site.dense()


@torch.no_grad()
def point_of(
    model: Any, name: str, density: float, policy: Policy, tasks: Mapping[str, Task], probe: Tensor, impl: str
) -> Point:
    """Ask every task under the policy, and count its costs on the probe."""
    method = policy.make(density)
    with use(model, method, impl=impl) as run:
        scores = {}
        for task, ask in tasks.items():
            run.reset()
            scores[task] = ask(model, policy.way).double()
    with use(model, method, impl=impl, record=True) as run:
        cache = model(input_ids=probe[:, :-1], use_cache=True).past_key_values
        prompt, run.records = run.records, []
        model(input_ids=probe[:, -1:], past_key_values=cache, use_cache=True)
        token, stored = run.records, run.kv_bytes
    kept, read = _total(prompt, "kept"), _total(token, "kept")
    layer, keys = prompt[0], probe.shape[-1]
    heads, width = len(layer.kept), model.config.head_dim
    size = Size(_parameters(model), len(prompt), heads, width)
    cost = indexing(policy.unit, keys, width, heads, window=policy.window, block=policy.block)
    allowed = sum(r.allowed for r in prompt) * heads
    flops = prefill_flops(size, keys - 1, min(1.0, kept / allowed), 0.0 if policy.unit == "pages" else cost)
    flops += token_flops(size, keys, min(1.0, read / (keys * heads * len(token))), cost if policy.unit == "pages" else 0.0)
    return Point(
        name, density, scores, kept, _total(prompt, "computed"), allowed, sum(r.kv_read for r in token), stored, flops
    )


def _total(records: Sequence[Record], what: str) -> int:
    return int(sum(getattr(record, what).sum() for record in records))


def _parameters(model: Any) -> int:
    table = model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not table)
