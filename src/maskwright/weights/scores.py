"""Scores that two or more methods of this place use."""

from __future__ import annotations

from torch import Tensor

from maskwright.core.score import score
from maskwright.weights.sites import WeightSite


@score("input_norm")
def input_weighted(site: WeightSite) -> Tensor:
    """|w| x ||x||_2 of its input over the calibration tokens (Wanda, arXiv 2306.11695, eq. 1)."""
    return site.tensor(site.matrix.abs() * site.stat("input_norm"))
