"""Linear layers from packed sparse weights on the CPU: layouts, native kernels, and their portable twin."""

from maskwright.kernels.packed_linear.indexed import Indexed, index
from maskwright.kernels.packed_linear.layout import Packed, check, pack, unpack
from maskwright.kernels.packed_linear.linear import MOST, NEVER, linear, steady
from maskwright.kernels.packed_linear.module import LoopLinear, PackedLinear, dense_module
from maskwright.kernels.packed_linear.ops import Engine, engine

__all__ = [
    "MOST", "NEVER", "Engine", "Indexed", "LoopLinear", "Packed", "PackedLinear", "check", "dense_module", "engine", "index",
    "linear", "pack", "steady", "unpack",
]  # fmt: skip
