"""From paired differences over seeds to a word. Imports no torch.

An effect "arm A beats arm B on a figure by more than a margin" is judged by the two-sided 95 % Student-t interval of
the mean of A - B over seeds (the same seed on both sides): above the margin it holds, below it does not hold, across
it the outcome is undecided, which is an answer too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from maskwright.core.method import Effect

Word = Literal["does not hold", "undecided", "holds"]
_ORDER: tuple[Word, ...] = ("does not hold", "undecided", "holds")


@dataclass(frozen=True)
class Outcome:
    """One judged effect: paired `values` (better - worse, turned so that more is better), one per seed.

    `difference` is their mean and `half_width` the half of the 95 % interval (infinite with one seed).
    """

    effect: Effect
    values: tuple[float, ...]
    difference: float
    half_width: float
    verdict: Word
    note: str = ""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half width) of the two-sided 95 % Student-t interval of the mean.

    One value: infinite half width. No spread at all: half width 0. Raises ValueError for no value or one not finite.
    """
    if not differences or not all(math.isfinite(value) for value in differences):
        raise ValueError(f"an interval needs finite differences, not {list(differences)}")
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return mean, math.inf
    if len(set(differences)) == 1:
        return differences[0], 0.0  # exactly: the mean above may have rounded
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    return mean, float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count)


def verdict(differences: Sequence[float], margin: float = 0.0) -> Word:
    """The word for paired differences against a margin.

    One seed is never enough: "undecided". Differences that are all the same number (nothing random in the arms) are
    compared with the margin as they stand, and being equal to it is not more than it.
    """
    mean, half = interval(differences)
    if half == 0.0:
        return "holds" if mean > margin else "does not hold"
    if mean - half > margin:
        return "holds"
    return "does not hold" if mean + half < margin else "undecided"


def worst(words: Iterable[Word]) -> Word:
    """The worst of several words: "does not hold" < "undecided" < "holds". Raises ValueError for none."""
    return min(words, key=_ORDER.index)


def judge(effect: Effect, better: Sequence[Mapping[str, float]], worse: Sequence[Mapping[str, float]]) -> Outcome:
    """Judge one effect from the two arms' figures, seed by seed in the same order.

    A `better` arm that broke down (not a number, or infinite to the bad side) makes the effect not hold; any other
    value that is not finite leaves it undecided. Raises ValueError when an arm did not give the figure.
    """
    sign = 1.0 if effect.higher else -1.0
    first, second = (
        [sign * _figure(effect, arm, row) for row in rows] for arm, rows in ((effect.better, better), (effect.worse, worse))
    )
    values = tuple(a - b for a, b in zip(first, second, strict=True))
    if all(math.isfinite(value) for value in values):
        mean, half = interval(values)
        return Outcome(effect, values, mean, half, verdict(values, effect.margin))
    broken = any(math.isnan(value) or value == -math.inf for value in first)
    note = f"{effect.better if broken else effect.worse} gave a value that is not finite"
    return Outcome(effect, values, math.nan, math.inf, "does not hold" if broken else "undecided", note)


def _figure(effect: Effect, arm: str, row: Mapping[str, float]) -> float:
    if effect.figure not in row:
        raise ValueError(f"effect {effect.name!r}: arm {arm!r} gives {', '.join(row)}, not {effect.figure!r}")
    return float(row[effect.figure])
