"""Pieces of the base and of the models tuned from it. What lies in files is read by the passes as they go, into memory
that is used again: a fresh page costs more than the work on it.

Mapped files were tried: their small pages make every pass over them slower by more than the copy takes, and a file that
is cut short would kill the process.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from maskwright.kernels.merge import SPAN, Piece
from maskwright.updates.cuts import Pair
from maskwright.updates.parts import Place, Tensors

BASE = -1
RESULT, HELD = "result", "held"


class Pieces:
    """Reads models by number, 0 and up; the base is number BASE."""

    def __init__(self, base: Tensors, tuned: Sequence[Tensors]) -> None:
        self._models = {BASE: base, **dict(enumerate(tuned))}
        self._here = _Here()

    def read(self, model: int, name: str, start: int, stop: int, count: int = 0) -> Piece:
        """Entries start..stop as they are stored; the first `count` of them if not 0.

        Good until the same thread reads of the same model again.
        """
        stop = min(stop, start + count) if count else stop
        source, here = self._models[model], self._here
        if here.held is not None and (model, start) in here.held:
            return Piece(here.held[model, start][: stop - start], stop - start)
        place = source.place(name, start, stop)
        if isinstance(place, Tensor):
            return Piece(place, stop - start)
        dtype = source.shapes()[name][0]
        if here.held is None or count:
            return Piece(here.mine(model, SPAN * dtype.itemsize).view(dtype), stop - start, *place)
        memory = here.room[HELD, model][start * dtype.itemsize : stop * dtype.itemsize].view(dtype)
        here.held[model, start] = memory  # the first pass over the piece fills it
        return Piece(memory, stop - start, *place)

    def pair(self, model: int, name: str, start: int, stop: int, count: int = 0) -> Pair:
        """(base, tuned) of the same entries."""
        return self.read(BASE, name, start, stop, count), self.read(model, name, start, stop, count)

    def result(self, place: Place, length: int, dtype: torch.dtype) -> Piece:
        """A piece for what is made of others, at its place. Good until the same thread asks again."""
        if isinstance(place, Tensor):
            return Piece(place, length)
        return Piece(self._here.mine(RESULT, SPAN * dtype.itemsize).view(dtype), length, *place)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in all models together."""
        told = [model.shapes()[name] for model in self._models.values()]
        return sum(prod(shape) * dtype.itemsize for dtype, shape in told)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Inside, this thread reads every piece of this tensor once and keeps it; it reads no other tensor."""
        for number, model in self._models.items():
            dtype, shape = model.shapes()[name]
            self._here.mine((HELD, number), prod(shape) * dtype.itemsize)
        self._here.held = {}
        try:
            yield
        finally:
            self._here.held = None


class _Here(threading.local):
    """One thread's buffers by purpose, and the pieces it holds."""

    def __init__(self) -> None:
        self.room: dict[Any, Tensor] = {}
        self.held: dict[tuple[int, int], Tensor] | None = None

    def mine(self, what: Any, size: int) -> Tensor:
        """The buffer for one purpose, `size` bytes of it."""
        if what not in self.room or len(self.room[what]) < size:
            self.room[what] = _memory(size)
        return self.room[what][:size]


def _memory(size: int) -> Tensor:
    """(size,) uint8, in large pages where the system has them: passes over it are bound by memory."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    made = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            made.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(made, dtype=torch.uint8)
