"""The operators `maskwright::merge_*`: their schemas, their native library, and which of the two ways a call takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from maskwright.kernels.building import Native
from maskwright.kernels.library import LIBRARY
from maskwright.kernels.merge import reference
from maskwright.kernels.merge.reference import Keep, Rule, Side

# Without contraction: a product and a sum rounded as one would give other bits than torch.
_PLAIN = ("-ffp-contract=off", "-fno-trapping-math", "-mf16c")
_NATIVE = Native(
    "merge",
    Path(__file__).with_name("native"),
    {
        "ops": ("-O2",),
        "avx2": ("-mavx2", *_PLAIN),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_PLAIN),
    },
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# `impl` names an instruction set, for tests; empty: the best of this CPU.
LIBRARY.define("merge_histogram(Tensor(a!) counts, Tensor base, Tensor tuned, str impl='') -> ()")
LIBRARY.define("merge_within(Tensor(a!) counts, Tensor base, Tensor tuned, int[] first, int[] wide, str impl='') -> int[]")
LIBRARY.define("merge_equal(Tensor base, Tensor tuned, int[] levels, str impl='') -> int[]")
LIBRARY.define(
    "merge_combine(Tensor(a!) out, Tensor base, Tensor[] tuned, int[] keeps, Tensor?[] masks, float[] factors, "
    "float[] weights, bool elect, float divisor, float leaning, float scale, str impl='') -> int[]"
)


@cache
def load() -> str | None:
    """Build (once, some 20 s) and load the native operators; None when they run, else the reason they do not."""
    return _NATIVE.load()


def _native(*pieces: Tensor) -> bool:
    return all(piece.dtype in _DTYPES for piece in pieces) and load() is None


def histogram(counts: Tensor, base: Tensor, tuned: Tensor) -> None:
    """Adds to `counts`, (BINS,) int64, how many differences have each value of their magnitude's upper 16 bits.

    base, tuned: (n,) floats of any dtypes.
    """
    if _native(base, tuned):
        torch.ops.maskwright.merge_histogram(counts, base, tuned)
    else:
        reference.histogram(counts, base, tuned)


def within(counts: Tensor, base: Tensor, tuned: Tensor, first: Sequence[int], wide: Sequence[int]) -> list[int]:
    """Of windows of `wide` bins from `first`: adds to `counts` how many entries have each value, 2^15 values a bin, one
    window after the other, int64; gives how many lie in the bins beyond each."""
    if _native(base, tuned):
        return torch.ops.maskwright.merge_within(counts, base, tuned, first, wide)  # type: ignore[no-any-return]
    return reference.within(counts, base, tuned, first, wide)


def equal(base: Tensor, tuned: Tensor, levels: Sequence[int]) -> list[int]:
    """How many differences have each of these magnitudes, given by their bits."""
    if _native(base, tuned):
        return torch.ops.maskwright.merge_equal(base, tuned, levels)  # type: ignore[no-any-return]
    return reference.equal(base, tuned, levels)


def combine(base: Tensor, tuned: Sequence[Tensor], sides: Sequence[Side], rule: Rule, out: Tensor) -> tuple[int, int]:
    """Writes the merged piece to `out`; gives how many differences are not finite, and how many results. (n,) floats.

    difference -> what stays -> factor -> weight -> sum or election -> scale -> + base -> rounded to `out`'s dtype, each
    step rounded to float32 by itself (float64 where a piece is).
    """
    if not _native(base, out, *tuned):
        return reference.combine(base, tuned, sides, rule, out)
    odd, beyond = torch.ops.maskwright.merge_combine(
        out, base, list(tuned), [number for side in sides for number in _numbers(side.keep)],
        [side.keep.mask for side in sides], [side.factor for side in sides], [side.weight for side in sides], *rule
    )  # fmt: skip
    return odd, beyond


def _numbers(keep: Keep) -> tuple[int, ...]:
    start, increment, place, bound = keep.chance or (0, 0, 0, -1)
    signed = (word - (1 << 64) if word >> 63 else word for word in (start, increment))
    return keep.above, keep.above_ties, keep.beyond, keep.beyond_ties, *signed, place, bound
