"""Offline search: every head's output under every pattern against the dense one, then one pattern a head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State, attend, use
from maskwright.attention.heads import HeadPlan
from maskwright.attention.method import Direction
from maskwright.attention.sparse_vdit.patterns import PATTERNS, USUAL, Bands, Grid, layer_plan, pairs
from maskwright.attention.sparse_vdit.plan import plan_of
from maskwright.core.errors import BadInput

Rule = Literal["argmin", "cheapest"]


@final
@dataclass(frozen=True)
class Probe(AttentionMethod):
    """Attends densely, so that no error is fed on, and adds up each head's squared error under each pattern."""

    grid: Grid
    bands: Bands
    error: dict[int, Tensor] = field(default_factory=dict)  # layer -> (heads, patterns + 1); last: the output's own size
    calls: dict[int, int] = field(default_factory=dict)
    direction: ClassVar[Direction] = "bidirectional"

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if (site.queries, site.keys) != (self.grid.tokens, self.grid.tokens) or site.group != 1:
            raise BadInput(
                f"sparse_vdit, layer {site.layer}: {site.queries} tokens, {site.heads} heads on {site.kv_heads} key heads: "
                f"needed are {self.grid.tokens} tokens of {self.grid} and a key head each"
            )
        dense = attend(site.q, site.k, site.v, site.dense(), scale=site.scale).double()
        found = []
        for name in PATTERNS[1:]:
            plan = layer_plan((name,), self.grid, self.bands).within(site.structure)
            out = attend(site.q, site.k, site.v, plan, scale=site.scale)
            found.append((out.double() - dense).square().mean((0, 2, 3)))
        row = torch.stack([torch.zeros_like(found[0]), *found, dense.square().mean((0, 2, 3))], -1).cpu()
        self.error[site.layer] = self.error.get(site.layer, 0) + row
        self.calls[site.layer] = self.calls.get(site.layer, 0) + 1
        return site.dense()


@dataclass(frozen=True, eq=False)
class Profile:
    """The table of a search. mse (layers, heads, patterns) and cost (patterns,) in the order of PATTERNS; size (layers,
    heads) is the mean square of the dense output."""

    mse: Tensor
    size: Tensor
    cost: tuple[float, ...]
    grid: Grid
    bands: Bands

    def choose(
        self, weight: float = 0.5, epsilon: float = inf, *, rule: Rule = "argmin", relative: bool = False
    ) -> HeadPlan:
        """One pattern a head: see `choose`. relative: errors are taken against the size of the head's dense output."""
        loss = self.mse / self.size[..., None].clamp(min=1e-30) if relative else self.mse
        if not bool(torch.isfinite(loss).all()):
            raise BadInput(f"sparse_vdit: the errors of some of {loss.shape[0]} x {loss.shape[1]} heads are not finite")
        chosen = [[choose(head.tolist(), self.cost, weight, epsilon, rule) for head in layer] for layer in loss]
        return plan_of(
            [[PATTERNS[i] for i in row] for row in chosen], self.grid, self.bands,
            table={"mse": self.mse.tolist(), "size": self.size.tolist(), "cost": list(self.cost), "of": PATTERNS},
            made_by={"weight": weight, "epsilon": None if epsilon == inf else epsilon, "rule": rule, "relative": relative},
        )  # fmt: skip


def choose(loss: list[float], cost: tuple[float, ...], weight: float, epsilon: float, rule: Rule = "argmin") -> int:
    """The pattern of one head, by number (0 is full).

    "argmin" (arXiv 2506.03065): the sparse pattern with the least loss + weight * cost, the cheaper one on a tie; full
    where its loss exceeds `epsilon`. "cheapest": the cheapest sparse pattern whose loss does not exceed `epsilon`,
    else full: a head whose best pattern fails may still get another.
    """
    sparse = range(1, len(loss))
    if rule == "argmin":
        best = min(sparse, key=lambda i: (loss[i] + weight * cost[i], cost[i]))
        return best if loss[best] <= epsilon else 0
    if rule != "cheapest":
        raise BadInput(f'sparse_vdit: rule is "argmin" or "cheapest", not {rule!r}')
    return min((i for i in sparse if loss[i] <= epsilon), key=lambda i: (cost[i], loss[i]), default=0)


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Any], grid: Grid, bands: Bands = USUAL) -> Profile:
    """Run the model densely over `batches` (tensors, tuples or dicts of its arguments) and fill the table.

    Cost is counted in pairs, not timed. Raises BadInput for no batch, for tokens that do not fit the grid, and for
    causal attention.
    """
    probe = Probe(grid, bands)
    with use(model, probe):
        for batch in batches:
            _call(model, batch)
    if not probe.calls:
        raise BadInput("sparse_vdit: the search needs at least one calibration batch")
    layers = range(max(probe.calls) + 1)
    table = torch.stack([probe.error[i] / probe.calls[i] for i in layers])
    cost = tuple(pairs(name, grid, bands) / grid.tokens**2 for name in PATTERNS)
    return Profile(table[..., :-1], table[..., -1], cost, grid, bands)


def search(
    model: nn.Module, batches: Iterable[Any], *, grid: Grid | None = None, bands: Bands = USUAL, weight: float = 0.5,
    epsilon: float = inf, rule: Rule = "argmin", relative: bool = False,
) -> HeadPlan:  # fmt: skip
    """`measure`, then `Profile.choose`. grid: the model's own `grid` (frames, height, width, words) by default."""
    return measure(model, batches, grid_of(model) if grid is None else grid, bands).choose(
        weight, epsilon, rule=rule, relative=relative
    )


def profile(model: nn.Module, batches: Iterable[Any], seed: int = 0) -> HeadPlan:
    """What `maskwright plan MODEL --method sparse_vdit` calls. Nothing is drawn; `seed` is there for other methods.

    Errors are relative and half of a head's output is the most that may be lost, so that one setting serves models
    of any scale.
    """
    return search(model, batches, relative=True, epsilon=0.5)


def grid_of(model: nn.Module) -> Grid:
    """The grid a video model names in its attribute `grid`. Raises BadInput where it has none."""
    told = getattr(model, "grid", None)
    if isinstance(told, Grid):
        return told
    if not isinstance(told, tuple) or len(told) != 4:
        raise BadInput(f"{type(model).__name__} names no grid (frames, height, width, words): give grid= to the search")
    return Grid(*told)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)
