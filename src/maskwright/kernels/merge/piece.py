"""A flat piece of a tensor: in memory, or in a file that the kernels read or write as they go."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from maskwright.core.errors import BadInput

# Both stand in native/ops.cpp too.
SPAN = 1 << 15  # entries that the native passes read and work on at a time
ENDED = "a file ended while it was read"


class Piece(NamedTuple):
    """`length` entries of a tensor.

    memory: (n,) the entries, or room for a result. With a file: room for all of them, which the first pass over them fills,
    or for SPAN of them, through which they pass. file: its descriptor, or -1; at: the byte in it where they begin.
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

    def store(self, values: Tensor) -> None:
        """Write the entries, (length,) of any dtype, to where they belong."""
        if self.file < 0:
            self.memory[: self.length].copy_(values)
            return
        left, at = values.to(self.dtype).contiguous().view(torch.uint8).numpy().data, self.at
        while left:
            put = os.pwrite(self.file, left, at)
            left, at = left[put:], at + put


def piece(memory: Tensor) -> Piece:
    """Of a tensor in memory."""
    return Piece(memory, len(memory))
