"""maskwright: sparse masks for deep learning, exact, composable, saved, measured.

Everything is loaded on first use, so that `import maskwright` and `maskwright list` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Mask": "core.mask",
    "SoftMask": "core.mask",
    "MaskSet": "core.maskset",
    "Unstructured": "core.pattern",
    "NM": "core.pattern",
    "Block": "core.pattern",
    "Group": "core.pattern",
    "select": "core.select",
    "draw": "core.select",
    "accelerate": "weights",
    "attach": "weights",
    "bake": "weights",
    "training": "weights",
    "get": "core.method",
    "methods": "core.method",
}
__all__ = [
    "Block",
    "Group",
    "Mask",
    "MaskSet",
    "NM",
    "SoftMask",
    "Unstructured",
    "__version__",
    "accelerate",
    "attach",
    "bake",
    "draw",
    "get",
    "methods",
    "select",
    "training",
]

if TYPE_CHECKING:
    from maskwright.core.mask import Mask, SoftMask
    from maskwright.core.maskset import MaskSet
    from maskwright.core.method import get, methods
    from maskwright.core.pattern import NM, Block, Group, Unstructured
    from maskwright.core.select import draw, select
    from maskwright.weights import accelerate, attach, bake, training


def __getattr__(name: str) -> Any:
    if name in ("core", "weights", "updates", "attention", "inputs", "lab", "report"):
        return importlib.import_module(f"maskwright.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'maskwright' has no attribute {name!r}")
    return getattr(importlib.import_module(f"maskwright.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
