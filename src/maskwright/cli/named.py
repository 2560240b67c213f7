"""Modules that a user's own function makes, named on the command line as `package.module:function`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.inputs.calling import naming, trying


def made_by(name: str, what: str, *args: Any) -> nn.Module:
    """What the function gives for `args`; modules of the working folder are found too.

    Raises BadInput, beginning with `what`, for a function that is not there, raises or gives no torch module.
    """
    where, _, function_name = name.partition(":")
    sys.path.insert(0, here := str(Path.cwd()))
    try:
        with naming(f"{what} {name!r}"):
            function: Any = getattr(importlib.import_module(where), function_name)
    finally:
        sys.path.remove(here)
    call = f"{function_name}({', '.join(map(repr, args))})"
    with naming(f"{what} {name!r}, called as {call},"):
        made = function(*args)
    if not isinstance(made, nn.Module):
        raise BadInput(f"{what} {name!r}, called as {call}, gives a {type(made).__name__}, not a torch module")
    return made


def shown(net: nn.Module, images: Tensor, what: str) -> nn.Module:
    """The network, after it has seen some images in eval mode, its modes as before. Raises BadInput as `naming` does."""
    with trying(net), naming(f"{what} on images of shape {tuple(images.shape)}"):
        net(images)
    return net
