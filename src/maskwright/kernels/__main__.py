"""`python -m maskwright.kernels`: build the native kernels now, instead of when they are first used."""

from __future__ import annotations

import time
from collections.abc import Callable

from maskwright.kernels.block_attention import ops as block_attention
from maskwright.kernels.merge import ops as merge
from maskwright.kernels.noise import ops as noise
from maskwright.kernels.packed_linear import native as packed_linear
from maskwright.kernels.scatter import ops as scatter

LIBRARIES: dict[str, Callable[[], str | None]] = {
    "packed_linear": packed_linear.load,
    "block_attention": block_attention.load,
    "merge": merge.load,
    "noise": noise.load,
    "scatter": scatter.load,
}


def main() -> None:
    """Build and load each library; where one cannot run, the portable code will, and one line says why."""
    for name, load in LIBRARIES.items():
        start = time.perf_counter()
        reason = load()
        took = time.perf_counter() - start
        print(f"{name}: native, {took:.0f} s" if reason is None else f"{name}: portable ({reason})")


if __name__ == "__main__":
    main()
