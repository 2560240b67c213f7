"""Noise addressed by (seed, name, offset): any piece of it can be made again, alone, and is the same to the bit.

A stream is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) with a start and an odd increment of its own, both from a hash
of (seed, name): word i is mix(start + (i + 1) * increment), so it needs no state and no words before it. An entry is
half a word (the low half first). Everything after the hash is whole-number arithmetic, a table and one multiplication
and addition in float32, in a fixed order: no result depends on the borders of chunks, on threads or on the processor's
vector width. numpy lets go of the interpreter lock inside, so threads that work on different pieces run side by side.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskwright.core.errors import BadInput

Words = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint32]
_WORDS = 1 << 14  # words a piece: with its temporaries it stays in a core's cache
_ALL = 2**64 - 1
_OCTAVES, _FINE = 31, 8  # the table's segments: 2^8 an octave of the tail's share, 31 octaves
_FIRST = 127  # float32's exponent field of 1.0
_here = threading.local()


def uniform_bits(seed: int, name: str, start: int, stop: int) -> Bits:
    """Entries start..stop of a stream as uint32, each of the 2^32 values as likely. (stop - start,).

    Raises BadInput unless 0 <= start <= stop.
    """
    bits = np.empty(_length(name, start, stop), np.uint32)
    for at, part in _pieces(seed, name, start, stop):
        bits[at : at + len(part)] = part
    return bits


def bernoulli(seed: int, name: str, start: int, stop: int, density: float, *, out: Tensor | None = None) -> Tensor:
    """Entries start..stop, each True with probability floor(density * 2^32) / 2^32. (stop - start,) bool.

    With one stream, what a smaller density keeps is kept by a greater one. `out` takes the result in place of a new
    tensor. Raises BadInput unless 0 <= density <= 1 and 0 <= start <= stop, and for an `out` that does not fit.
    """
    if not 0 <= density <= 1:
        raise BadInput(f"{name}: a density lies in 0..1, got {density}")
    keep = _out(out, torch.bool, name, start, stop)
    if density == 1:  # 2^32 is no uint32
        return keep.fill_(True)
    bound, into = np.uint32(int(density * 2**32)), keep.numpy()
    for at, part in _pieces(seed, name, start, stop):
        np.less(part, bound, out=into[at : at + len(part)])
    return keep


def normal(seed: int, name: str, start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
    """Entries start..stop, independent standard normals within +-6.24. (stop - start,) float32.

    The inverse of the normal distribution function, by a table of chords over shares that halve towards the tail
    (error below 1e-6), at the 2^31 odd multiples of 2^-32: what lies at share p lies at 1 - p with the other sign.
    `out` takes the result. Raises BadInput unless 0 <= start <= stop, and for an `out` that does not fit.
    """
    result = _out(out, torch.float32, name, start, stop)
    base, slope = _chords()
    into = result.numpy()
    for at, part in _pieces(seed, name, start, stop):
        room, count = _room(), len(part)
        share, whole, index = room.share[:count], room.whole[:count], room.index[:count]
        z = into[at : at + count]
        np.bitwise_and(part, np.uint32(0x7FFFFFFF), out=whole)
        np.bitwise_or(whole, np.uint32(1), out=whole)  # never 0; the middle of every two values
        np.bitwise_and(part, np.uint32(0x80000000), out=part)  # the sign
        share[:] = whole.view(np.int32)  # 2^32 times the share of the tail; 24 bits of it, as float32 rounds
        np.right_shift(share.view(np.int32), np.int32(23 - _FINE), out=whole.view(np.int32))
        index[:] = whole  # exponent and leading bits name the segment
        np.take(base, index, out=z, mode="clip")  # "clip" writes straight into `out`; no index is out of range
        rise = np.take(slope, index, out=whole.view(np.float32), mode="clip")
        np.multiply(rise, share, out=rise)
        np.add(z, rise, out=z)
        signed = z.view(np.uint32)
        np.bitwise_xor(signed, part, out=signed)
    return result


class _Room:
    """Scratch of one thread, made once: fresh pages would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self.ramp = np.arange(_WORDS, dtype=np.uint64)
        self.words, self.other = np.empty((2, _WORDS), np.uint64)
        self.whole, self.index = np.empty(2 * _WORDS, np.uint32), np.empty(2 * _WORDS, np.intp)
        self.share = self.other.view(np.float32)  # free again once the words are mixed


def _room() -> _Room:
    if not hasattr(_here, "room"):
        _here.room = _Room()
    return _here.room  # type: ignore[no-any-return]


def _pieces(seed: int, name: str, start: int, stop: int) -> Iterator[tuple[int, Bits]]:
    """(place from 0, entries) of start..stop in order. The entries lie in scratch: used, or changed, before the next."""
    _length(name, start, stop)
    first, gamma = stream(seed, name)
    for word in range(start // 2, (stop + 1) // 2, _WORDS):
        words = _mixed(first, gamma, word, min(_WORDS, (stop + 1) // 2 - word))
        low, high = max(start, 2 * word), min(stop, 2 * (word + len(words)))
        yield low - start, words.view(np.uint32)[low - 2 * word : high - 2 * word]


def _mixed(first: int, gamma: int, start: int, count: int) -> Words:
    """Words start..start + count (at most _WORDS) of SplitMix64, in scratch."""
    room = _room()
    words, other = room.words[:count], room.other[:count]
    np.multiply(room.ramp[:count], np.uint64(gamma), out=words)
    np.add(words, np.uint64((first + (start + 1) * gamma) & _ALL), out=words)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(words, np.uint64(shift), out=other)
        np.bitwise_xor(words, other, out=words)
        np.multiply(words, np.uint64(factor), out=words)
    np.right_shift(words, np.uint64(31), out=other)
    return np.bitwise_xor(words, other, out=words)


@lru_cache(maxsize=64)
def stream(seed: int, name: str) -> tuple[int, int]:
    """(start, odd increment) of a stream. The increment has enough changes of bits, as SplitMix's mixGamma asks."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    first, gamma = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
    gamma |= 1
    return first, gamma if (gamma ^ gamma >> 1).bit_count() >= 24 else gamma ^ 0xAAAAAAAAAAAAAAAA


@lru_cache(maxsize=1)
def _chords() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(base, slope) by segment: normal = base + slope * (2^32 times the share below), exact at the segments' ends."""
    inverse, fine = NormalDist().inv_cdf, 1 << _FINE
    ends = [2.0 ** (at // fine) * (1 + at % fine / fine) for at in range(_OCTAVES * fine + 1)]
    values = [inverse(end / 2**32) for end in ends]
    # Indexed by the float's own leading bits; the rows below exponent 127 are never read. One row more: the share 1/2.
    base, slope = np.zeros((2, (_FIRST + _OCTAVES) * fine + 1), np.float32)
    for at in range(_OCTAVES * fine):
        rise = (values[at + 1] - values[at]) / (ends[at + 1] - ends[at])
        slope[_FIRST * fine + at] = rise
        base[_FIRST * fine + at] = values[at] - rise * ends[at]
    return base, slope


@lru_cache(maxsize=1)
def table() -> Tensor:
    """The chords of `normal` for kernels/noise, base and slope of each segment. (segments, 2) float32; not to be changed."""
    return torch.from_numpy(np.stack(_chords(), axis=1))


def _length(name: str, start: int, stop: int) -> int:
    if not 0 <= start <= stop:
        raise BadInput(f"{name}: noise has entries start..stop with 0 <= start <= stop, asked for {start}..{stop}")
    return stop - start


def _out(out: Tensor | None, dtype: torch.dtype, name: str, start: int, stop: int) -> Tensor:
    shape = (_length(name, start, stop),)
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.dtype != dtype or tuple(out.shape) != shape or not out.is_contiguous() or out.device.type != "cpu":
        raise BadInput(
            f"{name}: out must be {dtype} of shape {shape}, contiguous on the CPU, not {out.dtype} {tuple(out.shape)}"
        )
    return out
