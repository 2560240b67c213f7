"""Which base a delta was made for, and whether a tensor is that: by a full hash, or by a quick one of 1,024 entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskwright.core.maskset import tensor_hash
from maskwright.kernels.scatter import reference, sample

Check = Literal["quick", "full", "none"]
Layer = tuple[Tensor | None, Tensor]  # entries that were changed (None: all of them), ascending, and what they were before
_SPOTS, _RUN = 16, 64
_AROUND = 16


@dataclass(frozen=True)
class BaseId:
    """Which tensor a delta was made for: its full hash, and a quick one of 1,024 entries."""

    full: str
    quick: str

    @staticmethod
    def of(value: Tensor) -> BaseId:
        return BaseId(tensor_hash(value), quick_id(value))


def quick_id(value: Tensor) -> str:
    """sha256 of shape and 16 runs of 64 entries spread over the tensor, 16 digits. Half precision is widened first."""
    return quick_ids([value])[0]


def quick_ids(values: Sequence[Tensor]) -> list[str]:
    """`quick_id` of each."""
    some = sample([value.detach() for value in values], _SPOTS, _RUN)
    return [_digest(value.shape, each) for value, each in zip(values, some, strict=True)]


def _digest(shape: torch.Size, some: Tensor) -> str:
    return hashlib.sha256(f"{some.dtype}{tuple(shape)}".encode() + some.numpy().tobytes()).hexdigest()[:16]


def around(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of the tensors that a delta leaves alone, up to 16, spread evenly, by which it knows its base when it adds nothing.

    Such a delta only replaces tensors (a head). The base's own value of these is not asked for: nothing of it is left, and
    a fresh head differs from run to run. What the head was trained on are the tensors around it. Matrices, where there are
    any: norms and biases begin alike in every net.
    """
    names = [name for name, shape in shapes.items() if len(shape) > 1] or list(shapes)
    return list(dict.fromkeys(names[(len(names) - 1) * i // (_AROUND - 1)] for i in range(_AROUND))) if names else []


def is_base(value: Tensor, theirs: BaseId, check: Check, quick: str = "", layers: Sequence[Layer] = ()) -> bool:
    """Whether a tensor is the one of that id, now or before one of the layers that changed it since, the last at the end.

    quick: its quick id, where that is known.
    """
    if check == "none":
        return True
    if check == "full":
        earlier = _earlier(value, layers)
        return BaseId.of(value) == theirs or any(BaseId.of(each.view(value.shape)) == theirs for each in earlier)
    if (quick or quick_id(value)) == theirs.quick:
        return True
    at = reference.sampled(value.numel(), _SPOTS, _RUN)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    return any(_digest(value.shape, each.to(wide)) == theirs.quick for each in _earlier(value, layers, at))


def _earlier(value: Tensor, layers: Sequence[Layer], at: Tensor | None = None) -> Iterator[Tensor]:
    """The tensor's entries (those at `at`) before the last layer, before the one below it, and so on: one memory for all."""
    if not layers:
        return
    flat = value.detach().reshape(-1)
    some = (flat if at is None else flat[at.to(flat.device)]).to("cpu", copy=True)
    for where, before in reversed(layers):
        old = before.reshape(-1).cpu()
        if where is None:
            some.copy_(old if at is None else old[at])
        elif at is None:
            some[where] = old
        elif len(where):
            place = torch.searchsorted(where, at).clamp_(max=len(where) - 1)
            found = where[place] == at
            some[found] = old[place[found]]
        yield some
