"""The passes of a merge over pieces of flat tensors: counting magnitudes, and from differences to the rounded sum."""

from maskwright.kernels.merge.ops import combine, difference, equal, histogram, load, within
from maskwright.kernels.merge.piece import ENDED, SPAN, Piece, piece
from maskwright.kernels.merge.reference import ABS, BINS, LOW, Keep, Rule, Side, kept, magnitude_bits

__all__ = [
    "ABS", "BINS", "ENDED", "LOW", "SPAN", "Keep", "Piece", "Rule", "Side", "combine", "difference", "equal", "histogram",
    "kept", "load", "magnitude_bits", "piece", "within",
]  # fmt: skip
