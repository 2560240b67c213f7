"""The passes of a merge over pieces of flat tensors: counting magnitudes, and from differences to the rounded sum."""

from maskwright.kernels.merge.ops import combine, equal, histogram, load, within
from maskwright.kernels.merge.reference import ABS, BINS, LOW, Keep, Rule, Side, difference, kept, magnitude_bits

__all__ = [
    "ABS", "BINS", "LOW", "Keep", "Rule", "Side", "combine", "difference", "equal", "histogram", "kept", "load",
    "magnitude_bits", "within",
]  # fmt: skip
