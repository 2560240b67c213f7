"""`maskwright report`: draw a run's page again from its JSON twin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskwright.core.errors import BadInput


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds report.json.")],
) -> None:
    """Draw report.html again from the report.json in a folder."""
    from maskwright.report.page import put, read, render

    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder")
    page = folder / "report.html"
    text = render(read(folder))
    try:
        put(page, text)
    except OSError as error:
        raise BadInput(f"{page}: {error.strerror or 'cannot be written'}") from None
    typer.echo(str(page))
