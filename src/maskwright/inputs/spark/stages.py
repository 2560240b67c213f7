"""Where a convnet's maps come out: the modules that end a resolution, found by one dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput

MOST = 4  # maps that are decoded: the paper's nets have four


@dataclass(frozen=True)
class Stage:
    """A module of the backbone, the channels of its map, and how many pixels a side one place of it stands for."""

    name: str
    channels: int
    stride: int


def find(backbone: nn.Module, example: Tensor, names: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of those names, coarsest first; without names one for each resolution, the coarsest four.

    Of the modules that give a map of one resolution it is the one that holds the most parameters (tensors), the last of
    equals: a whole stage, not the first layers of the next one, which may have the same resolution.
    Runs `example` (batch, channels, height, width) once, in eval mode, without a trace left. A stage's map is 2, 4, 8, ...
    times smaller than the image, alike in both directions. Raises BadInput for an unknown module, one that gives no such
    map, two of one size, and a backbone in which none is found.
    """
    modules = dict(backbone.named_modules())
    for name in names:
        if not name or name not in modules:
            known = [key for key in modules if key and key.count(".") < 2]
            raise BadInput(f"stage {name!r}: no such module; known: {', '.join(known[:12])} ...")
    calls: Counter[str] = Counter()
    last: dict[str, tuple[int, ...]] = {}  # in the order of completion

    def note(name: str, out: Any) -> None:
        calls[name] += 1
        found = map_of(out)
        last.pop(name, None)
        if found is not None:
            last[name] = tuple(found.shape)

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: note(name, out))
        for name, module in modules.items()
        if name
    ]
    try:
        with still(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone(example)
    finally:
        for handle in handles:
            handle.remove()
    size = tuple(example.shape[2:])
    if names:
        stages = [_named(name, last.get(name), size) for name in names]
    else:
        best: dict[int, tuple[int, Stage]] = {}
        for name, shape in last.items():
            stride = _stride(shape, size)
            if stride and calls[name] == 1 and shape[2] * shape[3] > 1:
                held = len(list(modules[name].parameters()))
                if held >= best.get(stride, (0,))[0]:
                    best[stride] = (held, Stage(name, shape[1], stride))
        stages = [stage for _, stage in best.values()]
    stages.sort(key=lambda stage: -stage.stride)
    strides = [stage.stride for stage in stages]
    if len(set(strides)) < len(strides):
        raise BadInput(f"two stages have a map of one size: {', '.join(f'{s.name} /{s.stride}' for s in stages)}")
    if not stages:
        raise BadInput(
            f"{type(backbone).__name__}: no module gives a map 2, 4, 8 ... times smaller than images of "
            f"{size[0]} x {size[1]}, larger than 1 x 1"
        )
    return tuple(stages if names else stages[:MOST])


@contextmanager
def captured(backbone: nn.Module, stages: Sequence[Stage]) -> Iterator[Mapping[str, Tensor]]:
    """While open, the last map that each stage gave, by name."""
    found: dict[str, Tensor] = {}

    def note(name: str, out: Any) -> None:
        made = map_of(out)
        if made is not None:
            found[name] = made

    handles = [
        backbone.get_submodule(stage.name).register_forward_hook(lambda m, args, out, name=stage.name: note(name, out))
        for stage in stages
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def map_of(out: Any) -> Tensor | None:
    """The first tensor with 4 dims of a module's output (a tensor, or a tuple, list or mapping of some)."""
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else (out,)
    return next((part for part in parts if isinstance(part, Tensor) and part.ndim == 4), None)


def _stride(shape: tuple[int, ...], size: tuple[int, ...]) -> int:
    """How many times smaller a map is than the image; 0 unless that is 2, 4, 8, ... and alike in both directions."""
    ratio = size[0] // shape[2] if shape[2] else 0
    fits = size == (ratio * shape[2], ratio * shape[3])
    return ratio if fits and ratio > 1 and ratio.bit_count() == 1 else 0


def _named(name: str, shape: tuple[int, ...] | None, size: tuple[int, ...]) -> Stage:
    stride = 0 if shape is None else _stride(shape, size)
    if shape is None or not stride:
        gave = "no map" if shape is None else f"a map of {shape[2]} x {shape[3]}"
        raise BadInput(f"stage {name}: gives {gave} for images of {size[0]} x {size[1]}, not one 2, 4, 8 ... times smaller")
    return Stage(name, shape[1], stride)
