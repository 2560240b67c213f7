"""Modules that a user's own function makes, named on the command line as `package.module:function`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from maskwright.core.errors import BadInput


def made_by(name: str, what: str, *args: Any) -> nn.Module:
    """What the function gives for `args`; modules of the working folder are found too.

    Raises BadInput, beginning with `what`, for a function that is not there or gives no torch module.
    """
    where, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(where), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"{what} {name!r}: {' '.join(str(error).split())}") from None
    finally:
        sys.path.pop(0)
    made = function(*args)
    if not isinstance(made, nn.Module):
        raise BadInput(f"{what} {name!r}: gives a {type(made).__name__}, not a torch module")
    return made
