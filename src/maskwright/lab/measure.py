"""Run a room's claim: every arm for every seed, then a verdict per effect and for the twin."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from maskwright.core.method import Card, Claim
from maskwright.lab import record
from maskwright.lab.parallel import seeds_apart
from maskwright.lab.pieces import Progress, Scale, load_claim, one_seed
from maskwright.lab.sources import require
from maskwright.lab.verdict import Outcome, Word, judge, verdict, worst

__all__ = ["Report", "Scale", "code_hash", "load_claim", "prepare", "run", "verdict", "write"]

code_hash = record.code_hash


@dataclass(frozen=True)
class Report:
    """A check that came to its end. `figures[arm][seed]` are the arms' figures, `seconds[arm]` the sum over seeds.

    `twin` holds the mechanism effects of the method with its broken twin in its seat, and `twin_fails` says whether
    at least one of them does not hold. `jobs` seeds ran side by side; `elapsed` is the clock's time from the first arm
    to the last in seconds, None where something was read back.
    """

    card: Card
    claim: Claim
    scale: Scale
    seeds: tuple[int, ...]
    figures: dict[str, dict[int, dict[str, float]]]
    seconds: dict[str, float]
    effects: tuple[Outcome, ...]
    twin: tuple[Outcome, ...]
    jobs: int = 1
    elapsed: float | None = None

    @property
    def verdict(self) -> Word:
        """The worst over the mechanism effects."""
        return worst(outcome.verdict for outcome in self.effects if outcome.effect.kind == "mechanism")

    @property
    def twin_fails(self) -> bool:
        """True when at least one mechanism effect does not hold for the twin; undecided is not enough."""
        return any(outcome.verdict == "does not hold" for outcome in self.twin)

    @property
    def good(self) -> bool:
        """What the exit code says: no mechanism effect is refuted, and at full scale the twin fails.

        A smoke run shows that the arms run; its figures are too small to judge by.
        """
        return self.scale == "smoke" or (self.verdict != "does not hold" and self.twin_fails)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, as it stands in the result file."""
        return {
            "slug": self.card.slug,
            "place": self.card.place,
            "title": self.card.title,
            "arxiv": self.card.arxiv,
            "claim": self.card.claim,
            "verdict": self.verdict,
            "twin_fails": self.twin_fails,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "seconds": round(sum(self.seconds.values()), 1),
            "elapsed": None if self.elapsed is None else round(self.elapsed, 1),
            "jobs": self.jobs,
            "method": self.claim.method,
            "twin": self.claim.twin,
            "effects": [_told(outcome) for outcome in self.effects],
            "twin_effects": [_told(outcome) for outcome in self.twin],
            "spread": {arm: _spread(list(rows.values())) for arm, rows in self.figures.items()},
            "figures": self.figures,
            "seconds_by_arm": {arm: round(value, 2) for arm, value in self.seconds.items()},
            "paper": self.claim.paper,
            "versions": record.versions(),
            "machine": record.machine(self.jobs),
            "code_hash": code_hash(self.card),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }


def prepare(claim: Claim, seeds: Sequence[int], progress: Progress = lambda line: None) -> None:
    """Fetch and make what a full run needs, outside its time: `Claim.needs`, where `lab:NAME` is a lab model.

    Raises SourceMissing when something cannot be had.
    """
    for need in claim.needs:
        kind, _, name = need.partition(":")
        if kind != "lab":
            require(need)
            continue
        from maskwright.lab.made import made

        for seed in seeds:
            progress(f"lab model {name}, seed {seed}")
            made(name, seed)


def run(
    card: Card,
    claim: Claim,
    scale: Scale = "full",
    *,
    seeds: Sequence[int] | None = None,
    store: Path | None = None,
    jobs: int = 1,
    progress: Progress = lambda line: None,
) -> Report:
    """Run all arms over seeds (default: the claim's; at smoke its first) and judge.

    With `store`, each (arm, seed) is saved there as it ends, under a hash of the code, the arm, the seed and the
    scale: a check that was stopped goes on where it was. `jobs` above 1 runs so many seeds side by side, each in a
    process of its own, which reads the room's claim anew. Raises ValueError for a claim whose parts do not fit.
    """
    _fits(claim)
    chosen = tuple(seeds) if seeds is not None else claim.seeds if scale == "full" else claim.seeds[:1]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be different and at least one, not {list(chosen)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    if scale == "full":
        prepare(claim, chosen, progress)
    numbers, total = count(1), len(chosen) * len(claim.arms)
    jobs, start = min(jobs, len(chosen)), time.perf_counter()

    def say(line: str) -> None:
        progress(f"{card.slug}: {next(numbers)}/{total} {line}")

    if jobs == 1:
        found = {seed: one_seed(card, claim, seed, scale, store, say) for seed in chosen}
    else:
        found = seeds_apart(card, chosen, scale, store, jobs, say)
    elapsed = time.perf_counter() - start
    figures = {arm: {seed: found[seed][arm].figures for seed in chosen} for arm in claim.arms}
    seconds = {arm: sum(found[seed][arm].seconds for seed in chosen) for arm in claim.arms}
    rows = {arm: [figures[arm][seed] for seed in chosen] for arm in claim.arms}
    effects = tuple(judge(effect, rows[effect.better], rows[effect.worse]) for effect in claim.effects)
    whole = not any(piece.read_back for row in found.values() for piece in row.values())
    return Report(
        card, claim, scale, chosen, figures, seconds, effects, _twin(claim, rows), jobs, elapsed if whole else None
    )


def write(report: Report, store: Path | None = None) -> Path | None:
    """Write the result file of a full run over all the claim's seeds, then drop the pieces it was made of.

    Gives the path, or None (nothing written) for a smoke run or one over fewer seeds.
    """
    if report.scale != "full" or not set(report.claim.seeds) <= set(report.seeds):
        return None
    path = record.write_result(report.card, report.as_dict())
    if store is not None:
        for piece in (store / report.card.slug).glob("*-full-*.json"):
            piece.unlink(missing_ok=True)
    return path


def _twin(claim: Claim, rows: dict[str, list[dict[str, float]]]) -> tuple[Outcome, ...]:
    """The method's mechanism effects with the twin in its seat.

    Left out: effects that do not mention the method, and "method beats twin", which would set the twin against itself
    and so never hold.
    """
    swapped = []
    for effect in claim.effects:
        if effect.kind == "mechanism" and claim.method in (effect.better, effect.worse):
            better, worse = (claim.twin if arm == claim.method else arm for arm in (effect.better, effect.worse))
            if better == worse:
                continue
            swapped.append(judge(replace(effect, better=better, worse=worse), rows[better], rows[worse]))
    return tuple(swapped)


def _fits(claim: Claim) -> None:
    named = {claim.method, claim.twin, *(arm for effect in claim.effects for arm in (effect.better, effect.worse))}
    unknown = sorted(named - set(claim.arms))
    if unknown:
        raise ValueError(f"the claim names {', '.join(unknown)} but its arms are {', '.join(claim.arms)}")
    seated = [e for e in claim.effects if e.kind == "mechanism" and claim.method in (e.better, e.worse)]
    if not seated:
        raise ValueError(f"the claim has no mechanism effect of its method {claim.method!r}")


def _told(outcome: Outcome) -> dict[str, Any]:
    told = asdict(outcome)
    return {**told.pop("effect"), **told}


def _spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each figure."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
        found[name] = {"mean": mean, "sd": spread}
    return found
