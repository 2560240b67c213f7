"""What a command does when it is stopped, or when the disk fails: one line, which for a resumable one says how to go on."""

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
        raise _told(state, error, "; go on with --resume") from None


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around the work that writes `out` and cannot be resumed: an OSError is told as BadInput."""
    try:
        yield
    except OSError as error:
        raise _told(out, error) from None


def _told(path: Path, error: OSError, then: str = "") -> BadInput:
    return BadInput(f"{path}: {error.strerror or error}{then}")
