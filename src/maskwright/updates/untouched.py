"""What a model must be after a method was on it: flags, training modes and buffers as before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(
    model: nn.Module, train: Iterable[nn.Parameter] = (), merged: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Freeze every parameter but those of `train`; on leaving put back flags and modes, and the buffers unless merged()."""
    chosen = {id(parameter) for parameter in train}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        if not merged():
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
