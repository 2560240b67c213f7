"""`maskwright report`: draw a run's page again from its JSON twin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskwright.core.errors import BadInput


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds report.json.")],
) -> None:
    """Draw report.html again from the report.json in a folder, of `prune`, `attend` or `pretrain`."""
    from types import ModuleType

    from maskwright.report import attention, page, pretraining

    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder")
    target = folder / "report.html"
    told = page.read_json(folder / "report.json")
    kind: ModuleType = next((each for each in (attention, pretraining) if each.is_one(told)), page)
    text = kind.render(kind.read(folder))
    try:
        page.put(target, text)
    except OSError as error:
        raise BadInput(f"{target}: {error.strerror or 'cannot be written'}") from None
    typer.echo(str(target))
