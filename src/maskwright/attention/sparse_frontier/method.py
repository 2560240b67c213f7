"""The Sparse Frontier: one sweep over tasks, policies and densities, and what may be concluded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from maskwright.attention.sparse_frontier.guarantee import Guarantee, guarantee
from maskwright.attention.sparse_frontier.table import Dense, Point, Policy, Table, Task, point_of
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class SparseFrontier:
    """Sparse-attention policies side by side on tasks of exact length (arXiv 2504.17768).

    `densities` are swept for every policy; a guarantee is for a loss of at most `tolerance` on every task with
    `confidence`. Raises BadInput for a density outside 0..1, for no density, and for settings out of 0..1.
    """

    densities: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)
    tolerance: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (
            not self.densities
            or not all(0 < d <= 1 for d in self.densities)
            or len(set(self.densities)) < len(self.densities)
        ):
            raise BadInput(f"densities are different and lie in (0, 1], got {self.densities}")
        if not (0 < self.tolerance < 1 and 0 < self.confidence < 1):
            raise BadInput(f"tolerance and confidence lie between 0 and 1, got {self.tolerance} and {self.confidence}")

    def run(
        self, model: Any, tasks: Mapping[str, Task], policies: Mapping[str, Policy], probe: Tensor, *,
        dense: Mapping[str, Point] | None = None, impl: str = "auto",
    ) -> Table:  # fmt: skip
        """Every policy at every density on every task, and dense once for each way of asking (or `dense`, of such a table).

        model: a Hugging Face causal language model. probe (1, length >= 2): the ids that costs are counted on, the last
        one as a decoded token. Raises BadInput where there is no task or no policy, before any work.
        """
        if not tasks or not policies or probe.shape[-1] < 2:
            raise BadInput(
                f"a sweep needs tasks, policies and 2 tokens, got {len(tasks)}, {len(policies)}, {probe.shape[-1]}"
            )
        ways = dict.fromkeys(policy.way for policy in policies.values())
        known = dict(dense or {})
        for way in [way for way in ways if way not in known]:
            known[way] = point_of(model, "dense", 1.0, Policy(lambda d: Dense(), way), tasks, probe, impl)
        found = {
            (name, density): point_of(model, name, density, policy, tasks, probe, impl)
            for name, policy in policies.items()
            for density in self.densities
        }
        return Table(known, found, policies)

    def guarantee(self, table: Table, policy: str) -> Guarantee:
        """The lowest density of the sweep at which `policy` is guaranteed to lose no more than the tolerance."""
        sparse = {density: point.scores for (name, density), point in table.points.items() if name == policy}
        return guarantee(table.dense[table.policies[policy].way].scores, sparse, self.tolerance, self.confidence)
