"""What a prune run will do, before it does it: sites, exact sizes, and estimates of time, memory and disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

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
    """Sites, exact sizes, and estimates of time and memory from a quick measurement of this machine."""
    sizes = {n: s.value.numel() for n, s in job.chosen.items()}
    kinds: dict[str, list[int]] = {}
    for name, site in job.chosen.items():
        _, units = site.pattern.grid(site.shape)
        share = (site.pattern.fixed / units) if site.pattern.fixed is not None else _density(job, name)
        row = kinds.setdefault(".".join(name.split(".")[-3:-1]), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + round(share * sizes[name]), row[2] + sizes[name]
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
        (calibrate + judge) / speed + 15, model_bytes + hidden + (600 << 20), model_bytes * 2 + total // 4,
    )  # fmt: skip


def _density(job: Job, name: str) -> float:
    rule = next((r for r in job.rules if job.chosen[name].named(r.where)), None)
    return job.method.density if rule is None or rule.density is None else rule.density


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
