"""Sparse additions to many tensors at once, and what reading them from a file takes."""

from maskwright.kernels.scatter import reference
from maskwright.kernels.scatter.ops import BLOCK, DTYPES, Stored, add, load, places, room, sample

__all__ = ["BLOCK", "DTYPES", "Stored", "add", "load", "places", "reference", "room", "sample"]
