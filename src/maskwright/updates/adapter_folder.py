"""What PEFT's adapter folders have in common, whatever the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskwright.core.cache import write_atomic

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files, each of which appears whole; the config, which makes it an adapter, last."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
