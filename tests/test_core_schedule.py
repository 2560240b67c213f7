"""Schedules: hand values at the ends and the middle."""

from __future__ import annotations

from math import isclose

import pytest

from maskwright.core.errors import BadInput
from maskwright.core.schedule import cosine, cubic, every, linear, once


def test_once_is_one_step() -> None:
    assert [once(0.3, at=2)(step) for step in range(4)] == [None, None, 0.3, None]
    assert [once()(step) for step in range(2)] == [1.0, None]


def test_every_names_multiples_between_start_and_stop() -> None:
    assert [step for step in range(12) if every(3)(step) is not None] == [3, 6, 9]
    assert [step for step in range(30) if every(5, start=10, stop=25)(step) is not None] == [15, 20]
    assert [step for step in range(10) if every(1, start=3, stop=6)(step) is not None] == [4, 5]
    assert every(2, of=0.0)(4) == 0.0  # a value of 0 is a value


def test_every_passes_the_step_on() -> None:
    drop = every(100, of=cosine(0.3, 0.0, 0, 750), stop=750)
    assert drop(0) is None and drop(50) is None and drop(750) is None
    assert isclose(drop(100), 0.15 * (1 + 0.9135454576426009))  # cos(pi 100/750)


@pytest.mark.parametrize("ramp", [linear, cubic, cosine])
def test_ramps_end_where_told_and_stay(ramp) -> None:
    at = ramp(0.8, 0.1, 10, 20)
    assert isclose(at(10), 0.8) and at(20) == 0.1 and isclose(at(-5), 0.8) and at(99) == 0.1
    values = [at(step) for step in range(10, 21)]
    assert values == sorted(values, reverse=True)
    rising = ramp(0.1, 0.8, 10, 20)
    assert all(isclose(rising(step) + at(step), 0.9) for step in range(8, 23))


def test_ramps_in_the_middle() -> None:
    assert isclose(linear(1.0, 0.0, 0, 4)(1), 0.75)
    assert isclose(cubic(1.0, 0.2, 0, 4)(2), 0.2 + 0.8 / 8)
    alpha = 0.3  # RigL's drop fraction: alpha, alpha / 2, 0 (papers/sparse-ift.md)
    drop = cosine(alpha, 0.0, 100, 300)
    assert (drop(100), drop(300)) == (alpha, 0.0) and isclose(drop(200), alpha / 2)


def test_refusals() -> None:
    for ramp in (linear, cubic, cosine):
        for stop in (5, 4):
            with pytest.raises(BadInput, match=r"stop > start, got 5\.\."):
                ramp(1.0, 0.0, 5, stop)
    for bad in ({"n": 0}, {"n": -1}, {"n": 1, "start": 3, "stop": 3}):
        with pytest.raises(BadInput, match="n >= 1 and stop > start"):
            every(**bad)
