"""The operator `maskwright::noise_move`: its schema, its native library, and which rows it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from maskwright.kernels.building import Native
from maskwright.kernels.library import LIBRARY

# Without contraction: a product and a sum rounded as one would give other bits than torch.
_PLAIN = ("-ffp-contract=off", "-fno-trapping-math", "-fno-strict-aliasing")
_NATIVE = Native(
    "noise",
    Path(__file__).with_name("native"),
    {
        "ops": ("-O2",),
        "avx2": ("-mavx2", *_PLAIN),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_PLAIN),
    },
)
# `impl` names an instruction set, for tests; empty: the best of this CPU.
LIBRARY.define(
    "noise_move(Tensor(a!) row, int start, int increment, int place, Tensor table, Tensor? bits, float[] scales, "
    "float decay, str impl='') -> ()"
)


@cache
def load() -> str | None:
    """Build (once, some 10 s) and load the native operator; None when it runs, else the reason it does not."""
    return _NATIVE.load()


def fits(row: Tensor) -> bool:
    """Whether `move` takes this row: flat float32 on the CPU, and the native operator runs here."""
    flat = row.ndim == 1 and row.is_contiguous() and row.dtype == torch.float32 and row.device.type == "cpu"
    return flat and load() is None


def move(
    row: Tensor, stream: tuple[int, int], table: Tensor, bits: Tensor | None, scales: Sequence[float], decay: float = 0.0
) -> None:
    """row += mask * (scale * z) for each scale in turn, in place; with the last, mask * (decay * row) is added to it first.

    row: (n,) that `fits`. z: the standard normals of entries 0..n of a stream (its start, its odd increment), made as
    `updates/noise.py` says: SplitMix64's half words, a sign and a chord of `table`, (segments, 2) float32, base and slope.
    bits: (ceil(n / 8),) uint8, entry i in bit i % 8 of byte i // 8, None for all. Every product and sum is rounded to
    float32 by itself. Entries that the mask drops keep every bit.
    """
    signed = (word - (1 << 64) if word >> 63 else word for word in stream)
    torch.ops.maskwright.noise_move(row, *signed, 0, table, bits, scales, decay)
    torch.autograd.graph.increment_version(row)  # as torch's own operators in place do
