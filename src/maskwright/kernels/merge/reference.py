"""The passes of a merge in plain torch: what the native ones compute, to the bit, and what runs where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOW = 15  # bits below a bin
BINS = 1 << (31 - LOW)
ABS = 0x7FFFFFFF
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Keep(NamedTuple):
    """Which entries of a piece of one model's difference stay; all conditions must hold.

    above, above_ties: the bits of a magnitude; what is greater stays, and the first so many entries that equal it.
    beyond, beyond_ties: the same for what is dropped from the top. chance: (stream's start, its increment, place of the
    piece's first entry, bound): SplitMix64's half words below the bound stay (see `updates/noise.py`). mask: (n,) bool.
    """

    above: int = -1
    above_ties: int = 0
    beyond: int = ABS
    beyond_ties: int = 0
    chance: tuple[int, int, int, int] | None = None
    mask: Tensor | None = None


class Side(NamedTuple):
    """One model: what stays of its difference, what survivors are multiplied by, its weight."""

    keep: Keep
    factor: float = 1.0
    weight: float = 1.0


class Rule(NamedTuple):
    """How the differences become one. elect: the sign of their sum wins, what agrees with it is summed (TIES).

    divisor: what the sum is divided by (0: nothing); with `elect` anything else means: the weights of those that agree.
    leaning: the sign that an exact tie elects.
    """

    elect: bool = False
    divisor: float = 0.0
    leaning: float = 1.0
    scale: float = 1.0


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """tuned - base as a new tensor: float64 if either is, else float32."""
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    out = tuned.to(wide)
    return torch.sub(out, base) if out is tuned else out.sub_(base)


def magnitude_bits(delta: Tensor) -> Tensor:
    """|float32| as int32 whose order is that of the magnitudes."""
    return delta.view(torch.int32) & ABS


def histogram(counts: Tensor, base: Tensor, tuned: Tensor) -> None:
    """Adds to `counts`, (BINS,) int64, how many differences have each value of their magnitude's upper 16 bits."""
    counts += torch.bincount(magnitude_bits(difference(base, tuned)) >> LOW, minlength=BINS)


def within(counts: Tensor, base: Tensor, tuned: Tensor, first: Sequence[int], wide: Sequence[int]) -> list[int]:
    """Of windows of `wide` bins from `first`: adds to `counts` how many entries have each value, 2^LOW values a bin, one
    window after the other; gives how many lie in the bins beyond each."""
    bits = magnitude_bits(difference(base, tuned))
    above, at = [], 0
    for start, width in zip(first, wide, strict=True):
        low, end = start << LOW, (start + width) << LOW
        counts[at : at + end - low] += torch.bincount(bits[(bits >= low) & (bits < end)] - low, minlength=end - low)
        above.append(int((bits >= end).sum()))
        at += end - low
    return above


def equal(base: Tensor, tuned: Tensor, levels: Sequence[int]) -> list[int]:
    """How many differences have each of these magnitudes, given by their bits."""
    bits = magnitude_bits(difference(base, tuned))
    return [int((bits == level).sum()) for level in levels]


def kept(delta: Tensor, keep: Keep) -> Tensor:
    """(n,) float -> (n,) bool. Of float64 only a mask and chance can choose."""
    out = torch.ones(len(delta), dtype=torch.bool) if keep.mask is None else keep.mask.clone()
    if keep.above >= 0 or keep.beyond < ABS:
        bits = magnitude_bits(delta)
        out &= _above(bits, keep.above, keep.above_ties) & ~_above(bits, keep.beyond, keep.beyond_ties)
    return out if keep.chance is None else out & _drawn(len(delta), *keep.chance)


def _above(bits: Tensor, level: int, ties: int) -> Tensor:
    out = bits > level
    if ties:
        out[(bits == level).nonzero().flatten()[:ties]] = True
    return out


def _drawn(count: int, start: int, increment: int, place: int, bound: int) -> Tensor:
    words = torch.arange(place // 2 + 1, (place + count + 1) // 2 + 1) * _signed(increment) + _signed(start)
    for shift, factor in _MIX:
        words = (words ^ _shifted(words, shift)) * _signed(factor)
    words ^= _shifted(words, 31)
    halves = torch.stack((words & 0xFFFFFFFF, _shifted(words, 32)), 1).flatten()
    return halves[place % 2 : place % 2 + count] < bound


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, as if they had no sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def combine(base: Tensor, tuned: Sequence[Tensor], sides: Sequence[Side], rule: Rule, out: Tensor) -> tuple[int, int]:
    """Writes the merged piece to `out`; gives how many differences are not finite, and how many results.

    difference -> what stays -> factor -> weight -> sum or election -> scale -> + base -> rounded to `out`'s dtype.
    """
    parts, odd = [], 0
    for piece, (keep, factor, weight) in zip(tuned, sides, strict=True):
        delta = difference(base, piece)
        odd += _not_finite(delta)
        if keep != Keep():
            delta = torch.where(kept(delta, keep), delta, 0.0)
        for by in (factor, weight):
            delta = delta if by == 1 else delta.mul_(by)
        parts.append(delta)
    one = _elected(parts, [side.weight for side in sides], rule) if rule.elect else _summed(parts, rule)
    if rule.scale != 1:
        one.mul_(rule.scale)
    out.copy_(one.add_(base))
    return odd, _not_finite(out)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The parts' sum, in their order; its sign is what is elected."""
    out = parts[0].clone()
    for part in parts[1:]:
        out.add_(part)
    return out


def _summed(parts: Sequence[Tensor], rule: Rule) -> Tensor:
    out = total(parts)
    return out.div_(rule.divisor) if rule.divisor else out


def _elected(parts: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    sign = total(parts).sign_()
    sign.add_(sign.eq(0), alpha=rule.leaning)
    out, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight in zip(parts, weights, strict=True):
        agreeing = part.mul_(sign).relu_()  # magnitudes of those with the elected sign
        out.add_(agreeing)
        if rule.divisor:
            divisor.add_(agreeing.sign_() * weight)
    # Where nothing agrees the sum is 0, and 0 over anything above 0 stays 0.
    return out.mul_(sign).div_(divisor.clamp_(min=1e-30)) if rule.divisor else out.mul_(sign)


def _not_finite(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())
