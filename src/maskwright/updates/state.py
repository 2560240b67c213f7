"""Merging state dicts in memory: the same work as on files, for models that are already loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.updates.merging import Merging
from maskwright.updates.parts import MergeMethod, Shape, TensorReport


class StateTensors:
    """A state dict as `Tensors`. Tied tensors (the same memory twice) are one, under their first name."""

    def __init__(self, state: Mapping[str, Tensor], what: str, names: Sequence[str] | None = None) -> None:
        self.what = what
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if wrong:
            raise BadInput(f"{what}: {wrong[0]} is {type(state[wrong[0]]).__name__}, not a tensor")
        self.tied: dict[str, str] = {}
        if names is None:
            first: dict[Any, str] = {}
            for name, value in state.items():
                place = (value.data_ptr(), tuple(value.shape), value.stride()) if value.numel() else name
                self.tied[name] = first.setdefault(place, name)
            names = list(dict.fromkeys(self.tied.values()))
        # A name that the base has tied is read once there; here it may be untied, and then does not count.
        self.state = {name: state[name].detach() for name in names if name in state}

    def shapes(self) -> Mapping[str, tuple[torch.dtype, Shape]]:
        return {name: (value.dtype, tuple(value.shape)) for name, value in self.state.items()}

    def place(self, name: str, start: int, stop: int) -> Tensor:
        return self.state[name].reshape(-1)[start:stop]


@dataclass(frozen=True)
class Merged:
    """The merged state dict (new tensors, the base's dtypes and ties) and what was kept of each tensor."""

    state: dict[str, Tensor]
    report: dict[str, TensorReport]


@torch.no_grad()
def merge(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: MergeMethod | Sequence[MergeMethod],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Merged:
    """Merge state dicts tuned from `base`, which stay as they are.

    method: one for all models or one each. weights: one a model, default 1. Integer tensors come from the base, running
    statistics of norms are merged whole. Raises BadInput when names or shapes differ, or a delta is NaN or infinite.
    """
    mine = StateTensors(base, "the base")
    theirs = []
    for i, state in enumerate(tuned):
        odd = [name for name in base if name not in state] + [name for name in state if name not in base]
        if odd:
            raise BadInput(f"model {i}: {odd[0]} is in only one of it and the base ({len(odd)} tensors)")
        theirs.append(StateTensors(state, f"model {i}", list(mine.state)))
    work = Merging(mine, theirs, method, weights=weights, seed=seed, stats=True)
    work.prepare()
    out: dict[str, Tensor] = {}
    report = {}
    for name, value in mine.state.items():
        whole = torch.empty(value.shape, dtype=value.dtype)
        flat = whole.view(-1)

        def place(start: int, stop: int, flat: Tensor = flat) -> Tensor:
            return flat[start:stop]

        told = work.tensor(name, place)
        out[name] = whole
        if told is not None:
            report[name] = told
    return Merged({name: out[mine.tied[name]] for name in base}, report)
