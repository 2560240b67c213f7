"""`maskwright lab`: make a model that several claims share, or list them."""

from __future__ import annotations

from typing import Annotated

import typer

from maskwright.core.errors import BadInput


def lab(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The model to make; none: list them.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of its weights and of its training.")] = 0,
) -> None:
    """Make one of the lab's own small models (minutes, once) and keep it in the cache."""
    from rich.console import Console
    from rich.table import Table

    from maskwright.lab.made import made, path_of, recipes, told_of
    from maskwright.lab.sources import SourceMissing

    known_ones = recipes()
    err = Console(stderr=True, highlight=False)
    if name is not None and name not in known_ones:
        raise BadInput(f"unknown lab model {name!r}; known: {', '.join(known_ones)}")
    table = Table("model", "what", "steps", f"seed {seed}")
    for known, recipe in known_ones.items():
        if name is not None and known != name:
            continue
        try:
            path = path_of(known, seed)
            if name is not None and not path.is_file():

                def progress(step: int, loss: float, steps: int = recipe.steps) -> None:
                    if (step + 1) % 100 == 0 or step + 1 == steps:
                        err.print(f"{name}: step {step + 1}/{steps}, loss {loss:.3f}")

                made(known, seed, progress=progress)
        except SourceMissing as error:
            raise BadInput(str(error)) from None
        state = "not made yet"
        if path.is_file():
            told = told_of(path)
            figures = ", ".join(f"{key} {value:.4g}" for key, value in told["figures"].items())
            state = f"{figures} ({told['seconds']:.0f} s)"
        table.add_row(known, recipe.about, str(recipe.steps), state)
    Console().print(table)
    if name is not None:
        typer.echo(path_of(name, seed))
