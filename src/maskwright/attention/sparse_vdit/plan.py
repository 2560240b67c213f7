"""A search's outcome as a HeadPlan: every head's pattern by name, the grid and bands it holds for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from maskwright.attention.heads import HeadPlan, Rule
from maskwright.attention.sparse_vdit.patterns import PATTERNS, Bands, Grid, pairs
from maskwright.core.errors import BadInput


@dataclass(frozen=True)
class Patterns:
    """What a plan says: names[layer][head] on one grid."""

    names: tuple[tuple[str, ...], ...]
    grid: Grid
    bands: Bands

    @property
    def share(self) -> float:
        """Pairs computed against all pairs, over all heads."""
        every = [name for row in self.names for name in row]
        one = {name: pairs(name, self.grid, self.bands) for name in dict.fromkeys(every)}
        return sum(one[name] for name in every) / (len(every) * self.grid.tokens**2)

    @property
    def counts(self) -> dict[str, int]:
        """How many heads have each pattern."""
        return {name: sum(row.count(name) for row in self.names) for name in PATTERNS}


def plan_of(
    names: Sequence[Sequence[str]], grid: Grid, bands: Bands, *, table: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> HeadPlan:  # fmt: skip
    """A plan from names[layer][head]; `table` and `made_by` are kept beside it."""
    rules = tuple(tuple(Rule(name) for name in row) for row in names)
    heads = len(rules[0]) if rules else 0
    told = {**asdict(grid), **asdict(bands)}
    plan = HeadPlan("sparse_vdit", len(rules), heads, heads, rules, told, table or {}, made_by or {})
    read(plan)
    return plan


@lru_cache(maxsize=64)
def read(plan: HeadPlan) -> Patterns:
    """What a plan says. Raises BadInput for another method's plan, an unknown pattern, or a grid that is none."""
    if plan.method != "sparse_vdit":
        raise BadInput(f"sparse_vdit: the plan was made for {plan.method}")
    for layer, row in enumerate(plan.rules):
        for head, rule in enumerate(row):
            if rule.name not in PATTERNS:
                raise BadInput(
                    f"sparse_vdit: layer {layer}, head {head}: unknown pattern {rule.name!r}; known: {', '.join(PATTERNS)}"
                )
    names = {part: [field.name for field in fields(part)] for part in (Grid, Bands)}
    wrong = [name for name in (*names[Grid], *names[Bands]) if not isinstance(plan.grid.get(name), int)]
    if wrong:
        raise BadInput(f"sparse_vdit: a plan's grid tells {', '.join(wrong)} in whole numbers, got {dict(plan.grid)}")
    grid = Grid(**{name: plan.grid[name] for name in names[Grid]})
    bands = Bands(**{name: plan.grid[name] for name in names[Bands]})
    return Patterns(tuple(tuple(rule.name for rule in row) for row in plan.rules), grid, bands)
