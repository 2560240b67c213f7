"""The operators `maskwright::packed_linear`, `indexed_linear`, `dense_linear`: schemas, shapes, and what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from maskwright.kernels.library import LIBRARY as _LIBRARY
from maskwright.kernels.packed_linear import native, reference

_SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor values, Tensor bitmask, Tensor row_offsets, Tensor? scale, Tensor? bias, "
    "int step, int dense_from, str impl='') -> Tensor",
    "indexed_linear": "(Tensor x, Tensor values, Tensor offsets, Tensor bases, Tensor row_groups, Tensor? scale, "
    "Tensor? bias, int dense_from, str impl='') -> Tensor",
    "dense_linear": "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str impl='') -> Tensor",
    "instructions": "() -> str",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)


@torch.library.register_fake("maskwright::packed_linear", lib=_LIBRARY)
def _packed_shape(x, values, bitmask, row_offsets, scale, bias, step, dense_from, impl=""):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], bitmask.shape[0])


@torch.library.register_fake("maskwright::indexed_linear", lib=_LIBRARY)
def _indexed_shape(x, values, offsets, bases, row_groups, scale, bias, dense_from, impl=""):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], row_groups.shape[0] - 1)


@torch.library.register_fake("maskwright::dense_linear", lib=_LIBRARY)
def _dense_shape(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, impl: str = "") -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class Engine:
    """What runs the operators: an instruction set, or `portable` and the reason why."""

    name: str
    reason: str = ""

    @property
    def native(self) -> bool:
        return not self.reason


@cache
def engine() -> Engine:
    """Load the native operators, or put the portable ones in their place. Called before an operator is used."""
    reason = native.load()
    if reason is None:
        return Engine(torch.ops.maskwright.instructions())
    for name in ("packed_linear", "indexed_linear", "dense_linear"):
        _LIBRARY.impl(name, getattr(reference, name), "CPU")
    return Engine("portable", reason)
