"""Essential sparsity: one-shot global magnitude on a pretrained model, and the knee of its curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from maskwright.core.errors import BadInput
from maskwright.core.score import Score, magnitude
from maskwright.weights import ByScore
from maskwright.weights.oneshot import Within


@final
@dataclass(frozen=True)
class EssentialSparsity(ByScore):
    """Keep the largest |w| over all block matrices as one competition (arXiv 2306.03805).

    Every point of a sweep starts from the dense checkpoint; masks at lower densities are subsets of those at
    higher ones. How far this goes for free is read off the curve by `tolerance_knee` and `broken_line_knee`.
    """

    within: Within = "global"

    @property
    def score(self) -> Score:
        return magnitude


@dataclass(frozen=True)
class BrokenLine:
    """A continuous two-segment fit: where it breaks, the slopes on both sides, and whether the break is sharp."""

    knee: float
    before: float
    after: float
    error: float

    @property
    def sharp(self) -> bool:
        """Slope after at least 3 times the slope before (our own rule; the paper shows the knee by eye)."""
        return abs(self.after) >= 3 * abs(self.before)


def tolerance_knee(dropped: Sequence[float], quality: Sequence[float], tolerance: float = 0.01) -> float:
    """The largest dropped share with quality >= (1 - tolerance) x dense up to there, interpolated to the crossing.

    dropped: ascending, starting at 0. quality: greater is better (for losses pass -loss; then the bound is a
    relative rise of the loss). Raises BadInput for unsorted, short or non-finite curves.
    """
    s, q = _curve(dropped, quality)
    bound = q[0] - tolerance * abs(q[0])
    for i in range(1, len(s)):
        if q[i] < bound:
            part = (q[i - 1] - bound) / (q[i - 1] - q[i])
            return float(s[i - 1] + part * (s[i] - s[i - 1]))
    return float(s[-1])


def broken_line_knee(dropped: Sequence[float], quality: Sequence[float], grid: int = 401) -> BrokenLine:
    """Least squares over a grid of break points: quality = a + b s + c max(s - knee, 0). Needs four points."""
    s, q = _curve(dropped, quality)
    if len(s) < 4:
        raise BadInput(f"a broken line needs at least four points, got {len(s)}")
    fits = []
    for knee in np.linspace(s[0], s[-1], grid)[1:-1]:
        design = np.stack([np.ones_like(s), s, np.maximum(s - knee, 0)], axis=1)
        fit = np.linalg.lstsq(design, q, rcond=None)[0]
        error = float(((design @ fit - q) ** 2).sum())
        fits.append(BrokenLine(float(knee), float(fit[1]), float(fit[1] + fit[2]), error))
    return min(fits, key=lambda line: line.error)


def _curve(dropped: Sequence[float], quality: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    s, q = np.asarray(dropped, float), np.asarray(quality, float)
    if s.shape != q.shape or len(s) < 2 or (np.diff(s) <= 0).any() or not np.isfinite(q).all():
        raise BadInput("a sparsity curve needs ascending dropped shares and as many finite qualities")
    return s, q
