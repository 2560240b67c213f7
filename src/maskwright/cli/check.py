"""`maskwright check`: run a room's claim and say per effect whether it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.core.method import Card
    from maskwright.lab.measure import Report, Scale

REFUTED = 4
_COLOURS = {"holds": "green", "undecided": "yellow", "does not hold": "red"}


def check(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG...", help="Rooms to check.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every room that has a claim.")] = False,
    scale: Annotated[str, typer.Option(help="smoke (seconds, judges nothing) or full (minutes).")] = "full",
    seeds: Annotated[str, typer.Option(help="Seeds instead of the claim's, such as 0,1,2.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Seeds to run side by side, each in a process of its own.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Run the method, its baselines and its broken twin over seeds, and judge every stated effect.

    A full check over all the claim's seeds writes results/<place>/<slug>.json; one that was stopped goes on where it
    was. Exit code 4 when a mechanism effect does not hold or, at full scale, the twin does not fail.
    """
    from rich.console import Console

    from maskwright.lab.record import to_json

    cards = _cards(slugs or [], every)
    asked = _scale(scale), _seeds(seeds), jobs
    out, err = Console(soft_wrap=as_json), Console(stderr=True, highlight=False)
    told: list[dict[str, Any]] = []
    bad = False
    for card in cards:
        report = _one(card, *asked, err)
        told.append(report if isinstance(report, dict) else report.as_dict())
        if isinstance(report, dict):
            out.print(f"{card.slug}: skipped: {report['reason']}", highlight=False) if not as_json else None
            continue
        bad = bad or not report.good
        if not as_json:
            _show(report, out)
    if as_json:
        typer.echo(to_json(told if every or len(told) > 1 else told[0]))
    if bad:
        raise typer.Exit(REFUTED)


def _one(card: Card, scale: Scale, seeds: tuple[int, ...] | None, jobs: int, err: Any) -> Report | dict[str, Any]:
    from maskwright.core.cache import cache_dir
    from maskwright.lab.measure import load_claim, run, write
    from maskwright.lab.sources import SourceMissing

    store = cache_dir() / "checks" if scale == "full" else None
    try:
        report = run(card, load_claim(card), scale, seeds=seeds, store=store, jobs=jobs, progress=err.print)
    except SourceMissing as error:
        return {"slug": card.slug, "place": card.place, "verdict": "skipped", "reason": str(error)}
    path = write(report, store)
    if path is not None:
        err.print(f"written: {path}")
    elif scale == "full":
        err.print("not written: the result file takes all the claim's seeds")
    return report


def _show(report: Report, out: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.card.slug}: {escape(report.card.claim)}", title_justify="left")
    for name in ("effect", "kind", "difference", "margin", "verdict"):
        table.add_column(name, justify="right" if name in ("difference", "margin") else "left")
    for outcome in report.effects:
        effect, word = outcome.effect, outcome.verdict
        told = f"[{_COLOURS[word]}]{word}[/]" + (f"\n{escape(outcome.note)}" if outcome.note else "")
        wide = "one seed" if len(report.seeds) == 1 else f"± {outcome.half_width:.3g}"
        table.add_row(escape(effect.name), effect.kind, f"{outcome.difference:.4g} {wide}", f"{effect.margin:.3g}", told)
    out.print(table)
    failed = [outcome.effect.name for outcome in report.twin if outcome.verdict == "does not hold"]
    twin = f"fails, as it must: {', '.join(failed)}" if failed else "does NOT fail: the check cannot tell it apart"
    if report.scale == "smoke":
        twin = "not judged at smoke scale"
    out.print(f"twin ({report.claim.twin}): {twin}", highlight=False, markup=False)
    took = f"{sum(report.seconds.values()):.1f} s"
    if report.elapsed is not None and report.jobs > 1:
        took += f", {report.elapsed:.1f} s by the clock with {report.jobs} seeds at a time"
    line = f"{report.verdict} · {len(report.seeds)} seed(s), {len(report.claim.arms)} arms, {took}"
    out.print(line, highlight=False, markup=False)


def _cards(slugs: list[str], every: bool) -> list[Card]:
    from maskwright.core.method import card, methods

    if every == bool(slugs):
        raise BadInput("name the rooms to check, or give --all")
    try:
        found = [card(slug) for slug in slugs] if slugs else methods()
    except KeyError as error:
        raise BadInput(error.args[0]) from None
    if every:
        return [room for room in found if (room.path / "claim.py").is_file()]
    without = [room.slug for room in found if not (room.path / "claim.py").is_file()]
    if without:
        raise BadInput(f"{', '.join(without)}: no claim of its own to check")
    return found


def _scale(text: str) -> Scale:
    if text == "smoke":
        return "smoke"
    if text == "full":
        return "full"
    raise BadInput(f"scale {text!r} is not smoke or full")


def _seeds(text: str) -> tuple[int, ...] | None:
    try:
        found = tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise BadInput(f"seeds {text!r} are not whole numbers with commas between") from None
    if found and (len(set(found)) < len(found) or min(found) < 0):
        raise BadInput(f"seeds {text!r} must be different and not negative")
    return found
