"""A flat piece of a tensor: in memory, or in a file from which the kernels read it as they go."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from maskwright.core.errors import BadInput

SPAN = 1 << 15  # entries that the native passes read and work on at a time
ENDED = "a file ended while it was read"


class Piece(NamedTuple):
    """`length` entries of a tensor.

    memory: (n,) the entries. With a file: room for them, which is filled by the first pass over them, or room for SPAN
    entries, through which they pass. file: its descriptor, or -1; at: the byte in it where they begin.
    """

    memory: Tensor
    length: int
    file: int = -1
    at: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def load(self) -> Tensor:
        """The entries, (length,). Raises BadInput when the file ends before them."""
        if self.file < 0:
            return self.memory[: self.length]
        out = self.memory[: self.length] if len(self.memory) >= self.length else self.memory.new_empty(self.length)
        left, at = out.view(torch.uint8).numpy().data, self.at
        while left:
            got = os.preadv(self.file, [left], at)
            if not got:
                raise BadInput(ENDED)
            left, at = left[got:], at + got
        return out


def piece(memory: Tensor) -> Piece:
    """Of a tensor in memory."""
    return Piece(memory, len(memory))
