"""The operators `maskwright::scatter_*`: their schemas, their native library, and which of the two ways a call takes."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maskwright.kernels.building import Native
from maskwright.kernels.library import LIBRARY
from maskwright.kernels.scatter import reference

_NATIVE = Native("scatter", Path(__file__).with_name("native"), {"ops": (), "pages": ()})
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK = 1 << 16  # stands in native/ops.cpp too
_LARGE = 1 << 21
LIBRARY.define("scatter_add(Tensor(a!)[] targets, Tensor[] indices, Tensor[] values, Tensor(b!)[] before) -> bool")
LIBRARY.define("scatter_places(Tensor(a!) out, Tensor file, int[] table) -> int[]")
LIBRARY.define("scatter_sample(Tensor(a!) out, Tensor[] tensors, int spots, int run) -> ()")


@cache
def load() -> str | None:
    """Build (once, some 20 s) and load the native operators; None when they run, else the reason they do not."""
    return _NATIVE.load()


def room(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) without values. From 2 MiB on in large pages, which the kernel hands out faster than it does small ones."""
    size = count * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    return torch.frombuffer(memory, dtype=dtype, count=count)


def add(targets: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """targets[i].flatten()[indices[i]] += values[i], in place; gives the old entries of each.

    targets: contiguous. indices: (n,) int64, ascending. values: (n,) float. Each sum is made in float32 (float64 for
    float64) and rounded once. A private mapping of a file, of which the kernel copies each page that is written to, is
    copied 2 MiB at a time where many entries change, and stays at its addresses. Raises RuntimeError for indices that do
    not ascend or lie outside.
    """
    if targets and all(map(_plain, targets, values)) and load() is None:
        counts = [len(each) for each in indices]
        rooms = {kind: iter(_split(kind, targets, counts)) for kind in {target.dtype for target in targets}}
        before = [next(rooms[target.dtype]) for target in targets]
        if torch.ops.maskwright.scatter_add(targets, indices, values, before):
            return before
    return [reference.add(*each) for each in zip(targets, indices, values, strict=True)]


def _plain(target: Tensor, values: Tensor) -> bool:
    # Of subclasses (quantised, distributed) only torch knows where the entries are.
    kinds = type(target) is type(values) is Tensor and target.dtype in DTYPES and values.dtype in DTYPES
    return kinds and target.device.type == values.device.type == "cpu"


def _split(kind: torch.dtype, targets: Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
    mine = [count for target, count in zip(targets, counts, strict=True) if target.dtype == kind]
    return room(sum(mine), kind).split(mine)


class Stored(NamedTuple):
    """Where in a file's bytes a tensor's parts begin, and their sizes.

    counts: the entries of each of `blocks` blocks (int32); offsets: those of the entries in their blocks (uint16). Or
    counts: a bit for every entry, in `blocks` bytes, and offsets -1. values: `number` of them.
    """

    counts: int
    blocks: int
    offsets: int
    number: int
    values: int
    dtype: torch.dtype


def places(file: Tensor, stored: Sequence[Stored]) -> list[tuple[Tensor, int]] | None:
    """Of each tensor its indices, and the last of them: -1 for none, -2 where they do not ascend within their blocks, counts
    or bits do not fit, or a value is not finite. None where there is no native operator.

    file: (bytes,) uint8. Raises RuntimeError for places outside the file.
    """
    if load() is not None:
        return None
    numbers = [each.number for each in stored]
    out = room(sum(numbers), torch.int64)
    table = [number for each in stored for number in (*each[:5], DTYPES[each.dtype])]
    return list(zip(out.split(numbers), torch.ops.maskwright.scatter_places(out, file, table), strict=True))


def sample(tensors: Sequence[Tensor], spots: int, run: int) -> list[Tensor]:
    """Of each tensor `spots` runs of entries spread over it (of a small one all), (n,) float32, float64 for float64."""
    if (
        not tensors
        or not all(t.dtype in DTYPES and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        or load() is not None
    ):
        return [reference.sample(tensor, spots, run) for tensor in tensors]
    out = torch.empty(len(tensors), spots * run)
    torch.ops.maskwright.scatter_sample(out, tensors, spots, run)
    return [row[: tensor.numel()] for row, tensor in zip(out.unbind(), tensors, strict=True)]
