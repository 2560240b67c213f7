"""What a resumable command does when it is stopped, or when the disk fails: one line that says how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from maskwright.core.errors import BadInput


@contextmanager
def resumable(state: Path) -> Iterator[None]:
    """Around the work of a run whose state lies in `state`: Ctrl-C ends it with code 130, an OSError is told as BadInput."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with --resume (state in {state})", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        raise BadInput(f"{state}: {error.strerror or error}; go on with --resume") from None
