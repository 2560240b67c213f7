"""Schedules: step -> value, or None for "leave the mask alone". Driven by the optimiser's steps, never by forwards."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

from maskwright.core.errors import BadInput

Schedule = Callable[[int], float | None]


def once(value: float = 1.0, at: int = 0) -> Schedule:
    """`value` at one step, None at every other."""
    return lambda step: value if step == at else None


def every(n: int, of: Schedule | float = 1.0, start: int = 0, stop: int | None = None) -> Schedule:
    """`of` at steps start < step < stop that are multiples of n, None elsewhere (start itself is the initial mask)."""
    if n < 1 or (stop is not None and stop <= start):
        raise BadInput(f"every needs n >= 1 and stop > start, got n={n}, start={start}, stop={stop}")

    def at(step: int) -> float | None:
        if step <= start or step % n or (stop is not None and step >= stop):
            return None
        return of(step) if callable(of) else of

    return at


def _ramp(first: float, last: float, start: int, stop: int, shape: Callable[[float], float]) -> Schedule:
    if stop <= start:
        raise BadInput(f"a schedule needs stop > start, got {start}..{stop}")

    def at(step: int) -> float:
        part = min(max((step - start) / (stop - start), 0.0), 1.0)
        return last + (first - last) * shape(part)

    return at


def linear(first: float, last: float, start: int, stop: int) -> Schedule:
    """From `first` at start to `last` at stop in a straight line, constant outside."""
    return _ramp(first, last, start, stop, lambda part: 1 - part)


def cubic(first: float, last: float, start: int, stop: int) -> Schedule:
    """Gradual pruning's cubic (arXiv 1710.01878): fast at first, then slow."""
    return _ramp(first, last, start, stop, lambda part: (1 - part) ** 3)


def cosine(first: float, last: float, start: int, stop: int) -> Schedule:
    """Half a cosine from `first` to `last` (RigL's drop fraction with last = 0)."""
    return _ramp(first, last, start, stop, lambda part: (1 + cos(pi * part)) / 2)
