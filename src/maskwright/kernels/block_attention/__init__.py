"""Attention over lists of key runs: one operation, four implementations behind `impl`."""

from maskwright.kernels.block_attention.attention import Choice, block_attention, choose
from maskwright.kernels.block_attention.pieces import Pieces

__all__ = ["Choice", "Pieces", "block_attention", "choose"]
