"""What a merging method is made of, and what merging reads: named tensors, in memory or in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, Protocol

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.updates.consensus import Consensus, Summed
from maskwright.updates.sparsify import All, Sparsify

Rescale = Literal["none", "density", "l1"]
Shape = tuple[int, ...]
Place = Tensor | tuple[int, int]  # entries in memory, or an open file's descriptor and the byte that they begin at


class Tensors(Protocol):
    """Named tensors in flat pieces: a state dict, or files."""

    what: str

    def shapes(self) -> Mapping[str, tuple[torch.dtype, Shape]]:
        """dtype and shape of every tensor, in order."""
        ...

    def place(self, name: str, start: int, stop: int) -> Place:
        """Where entries start..stop of one tensor are, row-major. They are not to be changed."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a method is made of. rescale "density": survivors / density (DARE); "l1": to the delta's own L1 norm."""

    sparsify: Sparsify = field(default_factory=All)
    consensus: Consensus = field(default_factory=Summed)
    rescale: Rescale = "none"
    scale: float = 1.0


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A merging room: a final frozen dataclass of settings that says its parts.

    scale: the paper's alpha or lambda, on the combined delta.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise BadInput(f"scale is a finite number, got {self.scale}")
        self.parts()

    @abstractmethod
    def parts(self) -> Parts:
        """Sparsifier, consensus and scale. Raises BadInput for settings that make no sense."""


@dataclass
class TensorReport:
    """kept: entries each model keeps. overlap: entries kept by two or more; conflict: kept with both signs."""

    total: int
    kept: list[int]
    overlap: int = 0
    conflict: int = 0
