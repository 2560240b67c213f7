"""The native operators: compiled once for this torch into the cache, or the reason why the portable twin runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from maskwright.kernels.building import Native

_NATIVE = Native(
    "packed_linear",
    Path(__file__).with_name("native"),
    {
        "ops": (),
        "avx2": ("-mavx2", "-mfma", "-mbmi2", "-mpopcnt", "-mf16c"),
        "avx512": (
            "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2", "-mavx512bf16",
            "-mfma", "-mbmi2", "-mpopcnt", "-mf16c",
        ),
    },
)  # fmt: skip


@cache
def load() -> str | None:
    """Build (once, some 20 s) and load the native operators; None when they run, else the reason they do not.

    `MASKWRIGHT_NATIVE=0` turns them off.
    """
    return _NATIVE.load()


@cache
def version() -> str:
    """What the built operators depend on, as 16 hexadecimal digits: sources, flags and torch."""
    return _NATIVE.version()
