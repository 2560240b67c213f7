"""`make docs`: the README's table of rooms and the docs pages that follow from cards, READMEs and results."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskwright.core.method import CardError
from maskwright.report.page import put
from maskwright.report.table import Row, markdown, paper, results_root, room_row, rooms_markdown, rows, settings

_BEGIN, _END = "<!-- rooms:begin -->", "<!-- rooms:end -->"
_HEAD = """# Rooms

One room a paper. A room is a folder with a card, a README, a method, a claim check and its tests; nothing registers it.
`maskwright show WORDS` finds the room a few words point at.

**claim** is the verdict of the last full check over seeds: *holds*, *does not hold*, *undecided*, or *stale* when
the code has moved on since. **twin fails** says that the check also refuses a deliberately broken twin of the method.
Baselines stand in other rooms' claims and have none of their own.

To write a room, start from another and follow
"A method in five files" in the repository's `CONTRIBUTING.md`: `maskwright cp sr_ste weights/new_name`.
"""


def between(text: str, body: str, begin: str = _BEGIN, end: str = _END) -> str:
    """Text with everything between the two marker lines replaced. Raises ValueError when a marker is missing."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs exactly one {begin} before one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def room_page(row: Row) -> str:
    """One room's page: its README, then its card and the last result."""
    card = row.card
    readme = card.path / "README.md"
    text = readme.read_text(encoding="utf-8").strip() if readme.exists() else f"# {card.title}\n\n{card.claim}"
    facts = [("paper", f"{paper(card)}, {card.year}"), ("room", f"`src/maskwright/{card.place}/{card.slug}/`")]
    facts += [("pattern", card.pattern), ("when", card.when), ("claim", card.claim), ("verdict", row.verdict_text)]
    if row.twin_text:
        facts.append(("broken twin fails", row.twin_text))
    if row.seconds_text:
        facts.append(("check took", row.seconds_text))
    parts = [text, "## Card", markdown(("", ""), facts)]
    found = settings(card)
    # The contract makes a README list its settings; a tree without one still gets the table.
    if found and "## Settings" not in text:
        body = [(f"`{s.name}`", f"`{s.type}`", f"`{s.default}`" if s.default else "") for s in found]
        parts += ["## Settings", markdown(("field", "type", "default"), body)]
    effects = row.result.get("effects")
    if isinstance(effects, list) and effects and all(isinstance(e, dict) for e in effects):
        parts += ["## Last full check", markdown(*_effects(effects))]
        if spread := row.result.get("spread"):
            parts += [markdown(*_arms(spread, {str(e.get("figure")) for e in effects}))]
    return "\n\n".join(parts) + "\n"


def _effects(effects: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """The effects as the lab wrote them: a column for every key with a plain value, in the order of appearance."""
    keys = list(dict.fromkeys(k for e in effects for k, v in e.items() if isinstance(v, str | int | float | None)))
    shown = [
        [f"{v:.4g}" if isinstance(v := e.get(k), float) else "" if v is None else str(v) for k in keys] for e in effects
    ]
    return [key.replace("_", " ") for key in keys], shown


def _cell(told: Mapping[str, float | None] | None) -> str:
    """Mean and spread; empty for a figure that the arm does not give, or that was not finite on some seed."""
    if told is None or told["mean"] is None or told["sd"] is None:
        return ""
    return f"{told['mean']:.4g} ± {told['sd']:.2g}"


def _arms(spread: dict, figures: set[str]) -> tuple[list[str], list[list[str]]]:
    """Every arm's mean and standard deviation over seeds, for the figures that some effect reads."""
    shown = sorted({name for told in spread.values() for name in told} & figures)
    cells = [[arm, *(_cell(told.get(n)) for n in shown)] for arm, told in spread.items()]
    return ["arm", *shown], cells


def pages(root: Path, every: Sequence[Row] | None = None) -> dict[Path, str]:
    """Every generated file of a checkout and the text it should hold. Writes nothing.

    Raises ValueError when the README lacks its markers.
    """
    every = [room_row(row.card, root / "results") for row in rows()] if every is None else every
    out: dict[Path, str] = {}
    readme = root / "README.md"
    if readme.exists():
        out[readme] = between(readme.read_text(encoding="utf-8"), rooms_markdown(every))
    out[root / "docs/rooms.md"] = f"{_HEAD}\n{rooms_markdown(every, 'rooms/{slug}.md')}\n"
    for row in every:
        out[root / f"docs/rooms/{row.card.slug}.md"] = room_page(row)
    return out


def facts_only(table: str) -> list[str]:
    """The rows of a rooms table without the columns that change with every run: what the README test compares."""
    return ["|".join(line.split(" | ")[:4]) for line in table.splitlines() if re.match(r"\|? ?\[`", line.lstrip("| "))]


def main() -> int:
    """Write every generated file of this checkout; prints the ones that changed. Exit code 3 when a card is wrong."""
    root = results_root().parent
    try:
        wanted = pages(root)
    except (CardError, ValueError) as error:
        print(f"maskwright: {error}", file=sys.stderr)
        return 3
    folder = root / "docs/rooms"
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            put(path, text)
            print(path.relative_to(root))
    for path in sorted(folder.glob("*.md")):
        if path not in wanted:
            path.unlink()
            print(f"{path.relative_to(root)} removed: its room is gone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
