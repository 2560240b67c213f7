"""The rooms as a table: cards beside the results of their last full claim runs. Imports no torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from maskwright.core.method import PLACES, Card, methods
from maskwright.report.words import seconds as duration

STALE = "stale"


@dataclass(frozen=True)
class Row:
    """One room for people and for machines: its card and what the last full run found."""

    card: Card
    verdict: str | None = None
    twin_fails: bool | None = None
    seconds: float | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """What `maskwright list --json` prints for the room."""
        card = self.card
        return {
            "slug": card.slug,
            "place": card.place,
            "title": card.title,
            "year": card.year,
            "arxiv": card.arxiv,
            "baseline": card.baseline,
            "when": card.when,
            "path": str(card.path),
            "verdict": self.verdict,
            "twin_fails": self.twin_fails,
            "seconds": self.seconds,
        }

    @property
    def verdict_text(self) -> str:
        """The verdict for people: a baseline has none of its own, a room without a result says so."""
        return self.verdict or ("baseline" if self.card.baseline else "not run")

    @property
    def twin_text(self) -> str:
        return "" if self.twin_fails is None else ("yes" if self.twin_fails else "no")

    @property
    def seconds_text(self) -> str:
        """How long the check took by the clock; where that was not told, its arms' times together."""
        took, jobs = _number(self.result.get("elapsed")), self.result.get("jobs")
        if took is None:
            return "" if self.seconds is None else duration(self.seconds)
        return duration(took) + (f", {jobs} seeds at a time" if isinstance(jobs, int) and jobs > 1 else "")


@dataclass(frozen=True)
class Setting:
    """One field of a method's dataclass, read from its source."""

    name: str
    type: str
    default: str


def results_root() -> Path:
    """The folder `results/` of the checkout this package runs from; it may not exist (an installed wheel has none)."""
    return Path(__file__).resolve().parents[3] / "results"


def room_row(card: Card, results: Path | None = None, code_hash: Callable[[Card], str] | None = None) -> Row:
    """The card with its result: absent when it cannot be read, verdict "stale" when it was made by other code."""
    path = (results_root() if results is None else results) / card.place / f"{card.slug}.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Row(card)
    if not isinstance(result, dict):
        return Row(card)
    verdict, twin, took = (result.get(key) for key in ("verdict", "twin_fails", "seconds"))
    if result.get("code_hash") and result["code_hash"] != (code_hash or _code_hash())(card):
        verdict = STALE
    return Row(
        card,
        verdict if isinstance(verdict, str) else None,
        twin if isinstance(twin, bool) else None,
        _number(took),
        result,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _code_hash() -> Callable[[Card], str]:
    from maskwright.lab.record import code_hash

    return code_hash


def rows(cards: Iterable[Card] | None = None, results: Path | None = None) -> list[Row]:
    """Every room's row, in the order of places and slugs."""
    return [room_row(card, results) for card in (methods() if cards is None else cards)]


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a pipe or line break inside a cell cannot break it."""
    clean = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *body)]
    lines = ["| " + " | ".join(row) + " |" for row in clean]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def paper(card: Card) -> str:
    """The paper as a Markdown link, or its title alone where it has no arXiv id."""
    return f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title


def rooms_markdown(every: Sequence[Row] | None = None, link: str = "src/maskwright/{place}/{slug}/") -> str:
    """The rooms as Markdown, a table a place. `link` is the address of a room from where the table will stand."""
    every = rows() if every is None else every
    parts = []
    for place in PLACES:
        here = [row for row in every if row.card.place == place]
        if not here:
            continue
        body = [
            (
                f"[`{r.card.slug}`]({link.format(place=place, slug=r.card.slug)})",
                f"{paper(r.card)}, {r.card.year}",
                r.card.pattern,
                r.card.when,
                r.verdict_text,
                r.twin_text,
                r.seconds_text,
            )
            for r in sorted(here, key=lambda r: (r.card.baseline, r.card.slug))
        ]
        head = ("room", "paper", "pattern", "when", "claim", "twin fails", "check took")
        parts.append(f"**{place}**\n\n{markdown(head, body)}")
    return "\n\n".join(parts) or "No room yet."


def settings(card: Card) -> list[Setting]:
    """The fields of the room's dataclass with type and default, those of its bases first, read without importing it.

    A base is looked for in the room, then among the tools of its place. Empty when the entry is a function.
    """
    files = [card.path / "method.py", *sorted(card.path.parent.glob("*.py"))]
    found: dict[str, Setting] = {}
    for node in _lineage(card.entry, files):
        for part in node.body:
            # A base that a field hides keeps its place in the order, as dataclasses do.
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                kind, default = ast.unparse(part.annotation), ast.unparse(part.value) if part.value else ""
                if "ClassVar" not in kind:
                    found[part.target.id] = Setting(part.target.id, kind, default)
    return list(found.values())


def _lineage(name: str, files: Sequence[Path]) -> list[ast.ClassDef]:
    """The class called `name` and its bases as far as `files` define them, the deepest base first."""
    for path in files:
        for node in _classes(path):
            if node.name == name:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != name]
                return [c for base in reversed(bases) for c in _lineage(base, files)] + [node]
    return []


@cache
def _classes(path: Path) -> tuple[ast.ClassDef, ...]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ()
    return tuple(node for node in tree.body if isinstance(node, ast.ClassDef))
