"""The operators `maskwright::merge_*`: their schemas, their native library, and which of the two ways a call takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.kernels.building import Native
from maskwright.kernels.library import LIBRARY
from maskwright.kernels.merge import reference
from maskwright.kernels.merge.piece import ENDED, Piece
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
# `files`: (descriptor, byte) of each piece. What lies in a file is read into the tensor that stands for it.
_PAIR = "Tensor(b!) base, Tensor(c!) tuned, int[] files, int n"
LIBRARY.define(f"merge_histogram(Tensor(a!) counts, {_PAIR}, str impl='') -> ()")
LIBRARY.define(f"merge_within(Tensor(a!) counts, {_PAIR}, int[] first, int[] wide, str impl='') -> int[]")
LIBRARY.define(f"merge_equal({_PAIR}, int[] levels, str impl='') -> int[]")
LIBRARY.define(
    "merge_combine(Tensor(a!) out, Tensor(b!) base, Tensor(c!)[] tuned, int[] files, int n, int[] keeps, Tensor?[] masks, "
    "float[] factors, float[] weights, bool elect, float divisor, float leaning, float scale, str impl='') -> int[]"
)


@cache
def load() -> str | None:
    """Build (once, some 20 s) and load the native operators; None when they run, else the reason they do not."""
    return _NATIVE.load()


def _native(*dtypes: torch.dtype) -> bool:
    return all(dtype in _DTYPES for dtype in dtypes) and load() is None


def _call(name: str, *args: Any) -> Any:
    try:
        return getattr(torch.ops.maskwright, name)(*args)
    except RuntimeError as error:
        if ENDED in str(error):
            raise BadInput(ENDED) from None
        raise


def _pair(base: Piece, tuned: Piece) -> tuple[Any, ...]:
    if base.length != tuned.length:
        raise BadInput(f"pieces of {base.length} and {tuned.length} entries make no differences")
    return base.memory, tuned.memory, (base.file, base.at, tuned.file, tuned.at), base.length


def difference(base: Piece, tuned: Piece) -> Tensor:
    """tuned - base as a new tensor, (n,): float64 if either is, else float32."""
    return reference.difference(base.load(), tuned.load())


def histogram(counts: Tensor, base: Piece, tuned: Piece) -> None:
    """Adds to `counts`, (BINS,) int64, how many differences have each value of their magnitude's upper 16 bits."""
    if _native(base.dtype, tuned.dtype):
        _call("merge_histogram", counts, *_pair(base, tuned))
    else:
        reference.histogram(counts, base.load(), tuned.load())


def within(counts: Tensor, base: Piece, tuned: Piece, first: Sequence[int], wide: Sequence[int]) -> list[int]:
    """Of windows of `wide` bins from `first`: adds to `counts` how many entries have each value, 2^15 values a bin, one
    window after the other, int64; gives how many lie in the bins beyond each."""
    if _native(base.dtype, tuned.dtype):
        return _call("merge_within", counts, *_pair(base, tuned), first, wide)  # type: ignore[no-any-return]
    return reference.within(counts, base.load(), tuned.load(), first, wide)


def equal(base: Piece, tuned: Piece, levels: Sequence[int]) -> list[int]:
    """How many differences have each of these magnitudes, given by their bits."""
    if _native(base.dtype, tuned.dtype):
        return _call("merge_equal", *_pair(base, tuned), levels)  # type: ignore[no-any-return]
    return reference.equal(base.load(), tuned.load(), levels)


def combine(base: Piece, tuned: Sequence[Piece], sides: Sequence[Side], rule: Rule, out: Piece) -> tuple[int, int]:
    """Writes the merged piece to `out`; gives how many differences are not finite, and how many results.

    difference -> what stays -> factor -> weight -> sum or election -> scale -> + base -> rounded to `out`'s dtype, each
    step rounded to float32 by itself (float64 where a piece is).
    """
    if {base.length, out.length} != {piece.length for piece in tuned}:
        raise BadInput(f"pieces of {[base.length, *(piece.length for piece in tuned)]} entries do not merge to {out.length}")
    if not _native(base.dtype, out.dtype, *(piece.dtype for piece in tuned)):
        made = torch.empty(out.length, dtype=out.dtype)
        told = reference.combine(base.load(), [piece.load() for piece in tuned], sides, rule, made)
        out.store(made)
        return told
    odd, beyond = _call(
        "merge_combine", out.memory, base.memory, [piece.memory for piece in tuned],
        [number for piece in (out, base, *tuned) for number in (piece.file, piece.at)], out.length,
        [number for side in sides for number in _numbers(side.keep)], [side.keep.mask for side in sides],
        [side.factor for side in sides], [side.weight for side in sides], *rule,
    )  # fmt: skip
    return odd, beyond


def _numbers(keep: Keep) -> tuple[int, ...]:
    start, increment, place, bound = keep.chance or (0, 0, 0, -1)
    signed = (word - (1 << 64) if word >> 63 else word for word in (start, increment))
    return keep.above, keep.above_ties, keep.beyond, keep.beyond_ties, *signed, place, bound
