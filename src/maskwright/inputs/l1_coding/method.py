"""Sparse coding with l1, as it is usually done."""

from dataclasses import dataclass
from typing import final

from maskwright.inputs import Coding, Proximal
from maskwright.inputs.proximal import penalty


@final
@dataclass(frozen=True)
class L1Coding(Coding):
    """min 1/2 ||x - D a||^2 + lam |a|_1 (Olshausen and Field 1996, with l1 in place of their log).

    Codes by soft thresholding (ISTA): convex, so the start does not matter, but every coefficient ends up too small.
    """

    @property
    def operator(self) -> Proximal:
        return penalty("l1", non_negative=self.non_negative, lam=self.lam)
