"""Calls of a user's own function or network: whatever it raises becomes one line that names what was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskwright.core.errors import BadInput


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise BadInput, one line that begins with `what`, for any error inside; the error stays as its cause."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # a user's code may raise anything
        said = " ".join(str(error).split())[:300]
        raise BadInput(f"{what} raises {type(error).__name__}{': ' if said else ''}{said}") from error


def name_of(function: Any) -> str:
    """What to call a function in an error of one line."""
    return str(getattr(function, "__qualname__", type(function).__name__))
