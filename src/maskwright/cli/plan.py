"""What a prune run will do, before it does it: sites, exact sizes, and estimates of time, memory and disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskwright.weights.solve import counts_of

if TYPE_CHECKING:
    from maskwright.cli.job import Job


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does it."""

    sites: int
    site_parameters: int
    parameters: int
    kept: int
    blocks: int
    rows: tuple[tuple[str, int, int, int], ...]  # kind of site, how many, kept, total
    seconds: float
    memory: int
    disk: int


def plan_of(job: Job) -> Plan:
    """Sites, exact sizes, and estimates of time and memory from a quick measurement of this machine.

    Kept counts are exact where they follow from shapes alone; a budget that looks at the model decides them later.
    """
    sizes = {n: s.value.numel() for n, s in job.chosen.items()}
    counts = {} if job.looks else counts_of(job.method, job.chosen, job.densities, {})
    kinds: dict[str, list[int]] = {}
    for name, site in job.chosen.items():
        kept = job.densities[name] * sizes[name]
        if name in counts:
            kept = int(counts[name].sum()) * site.pattern.unit_size(site.shape)
        row = kinds.setdefault(".".join(name.split(".")[-3:-1]), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + round(kept), row[2] + sizes[name]
    total = sum(sizes.values())
    speed = _gflops()
    calibrate = len(job.batches or ()) * job.recipe.length * total * 2 * 2.6
    if "gram" in job.method.needs:
        calibrate *= 2
    every = sum(p.numel() for p in job.model.parameters())
    judge = 2 * len(job.tests) * job.recipe.length * every * 2 * 1.2
    model_bytes = every * 4
    hidden = len(job.batches or ()) * job.recipe.length * _width(job.model) * 4
    return Plan(
        len(sizes), total, every, sum(r[1] for r in kinds.values()),
        len({s.block for s in job.chosen.values()}),
        tuple((k, *v) for k, v in kinds.items()),  # type: ignore[misc]
        (calibrate + judge) / speed + 15, model_bytes + hidden + total + (700 << 20), model_bytes * 2 + total // 4,
    )  # fmt: skip


def _gflops() -> float:
    a = torch.randn(512, 576)
    b = torch.randn(576, 1536)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(a, b)
    return 5 * 2 * 512 * 576 * 1536 / (time.perf_counter() - start)


def _width(model: Any) -> int:
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)
