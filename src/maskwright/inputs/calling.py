"""Calls of a user's own function or network: whatever it raises becomes one line, and a try leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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


@contextmanager
def trying(net: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode is as before after it."""
    modes = {each: each.training for each in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes.items():
            each.training = training


def name_of(function: Any) -> str:
    """What to call a function in an error of one line."""
    return str(getattr(function, "__qualname__", type(function).__name__))
