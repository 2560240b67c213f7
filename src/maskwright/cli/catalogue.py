"""`maskwright list`, `show` and `cp`: the rooms as a catalogue. Reads cards and READMEs only; never imports torch."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from maskwright.core.errors import BadInput
from maskwright.core.method import PLACES, methods
from maskwright.report.table import Row, room_row, rows, settings


def list_(
    place: Annotated[str | None, typer.Option(help=f"One of {', '.join(PLACES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list for machines.")] = False,
) -> None:
    """Every method with its paper and the verdict of its last full check."""
    if place is not None and place not in PLACES:
        raise typer.BadParameter(f"{place!r} is not a place; places are {', '.join(PLACES)}", param_hint="--place")
    found = rows(methods(place))
    if as_json:
        typer.echo(json.dumps([row.fields() for row in found], indent=2, ensure_ascii=False))
        return
    _table(found)


def show(
    words: Annotated[list[str], typer.Argument(help="Words that must all stand in the card or README headings.")],
) -> None:
    """The room a few words point at: its card, path, claim, settings and verdict."""
    from maskwright.report.search import search

    asked = " ".join(words)
    found, exact = search(asked, methods())
    if not found:
        raise BadInput(f"no room speaks of {asked!r}; `maskwright list` names them all")
    if exact or len(found) == 1:
        _card(room_row(found[0]))
        if len(found) > 1:
            typer.echo("\nalso in: " + ", ".join(card.slug for card in found[1:]))
        return
    width = max(len(f"{c.place}/{c.slug}") for c in found)
    for card in found:
        typer.echo(f"{card.place + '/' + card.slug:<{width}}  {card.title} ({card.year})")
    typer.echo(f"\n{len(found)} rooms; `maskwright show {found[0].slug}` prints the first")


def cp(
    source: Annotated[str, typer.Argument(help="The room to start from, such as sr_ste.")],
    target: Annotated[str, typer.Argument(help="The new room as PLACE/NAME, such as weights/new_name.")],
) -> None:
    """Start a new room as a renamed copy of another, and name the files to edit."""
    from maskwright.report.copying import copy_room

    folder, edit = copy_room(source, target, Path(__file__).resolve().parents[1])
    typer.echo(f"new room {folder}\nedit these files:")
    for name, what in edit:
        typer.echo(f"  {folder / name}  {what}")
    typer.echo("then: make test")


_COLOURS = {"holds": "green", "does not hold": "red"}


def _table(found: list[Row]) -> None:
    # Plain text: rich alone would cost a fifth of the start-up. Into a pipe nothing is cut or wrapped: one line a room.
    heads = ("room", "paper", "year", "when", "claim", "twin fails")
    found = sorted(found, key=lambda row: (PLACES.index(row.card.place), row.card.baseline, row.card.slug))
    rooms = [(f"{r.card.place}/{r.card.slug}", r.card.title, str(r.card.year), r.card.when) for r in found]
    lines = [(*room, row.verdict_text, row.twin_text) for room, row in zip(rooms, found, strict=True)]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    terminal = sys.stdout.isatty()
    if terminal:
        widths[1] = max(24, shutil.get_terminal_size().columns - sum(widths) + widths[1] - 2 * len(widths))
    paint = terminal and "NO_COLOR" not in os.environ
    for line in (heads, *lines):
        first, *more = textwrap.wrap(line[1], widths[1]) or [""]
        cells = [cell.ljust(width) for cell, width in zip((line[0], first, *line[2:]), widths, strict=True)]
        if paint and line[4] in _COLOURS:
            cells[4] = typer.style(cells[4], fg=_COLOURS[line[4]])
        typer.echo("  ".join(cells).rstrip())
        for rest in more:
            typer.echo(" " * (widths[0] + 2) + rest)


def _card(row: Row) -> None:
    card = row.card
    lines = [f"{card.title} ({card.year})", f"  room      {card.place}/{card.slug}", f"  path      {card.path}"]
    lines.append(f"  import    from {card.module} import {card.entry}")
    if card.arxiv:
        lines.append(f"  paper     https://arxiv.org/abs/{card.arxiv}")
    if card.repo:
        lines.append(f"  code      {card.repo}")
    lines += [f"  pattern   {card.pattern}", f"  when      {card.when}", f"  claim     {card.claim}"]
    result = ", ".join(filter(None, [row.verdict_text, _twin(row), row.seconds_text]))
    lines.append(f"  verdict   {result}")
    found = settings(card)
    if found:
        lines.append("  settings")
        lines += [f"    {s.name}: {s.type}" + (f" = {s.default}" if s.default else "") for s in found]
    typer.echo("\n".join(lines))


def _twin(row: Row) -> str:
    return "" if row.twin_fails is None else ("broken twin fails" if row.twin_fails else "BROKEN TWIN PASSES")
