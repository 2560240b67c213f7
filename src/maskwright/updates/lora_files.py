"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, read and written without PEFT."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.updates.adapter_folder import CONFIG, PREFIX, WEIGHTS, write_adapter
from maskwright.updates.branch import named
from maskwright.updates.lora import Adapter

MASKS = "masks.safetensors"
_REFUSED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "its B has a bias",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it adapts bare parameters",
    "layer_replication": "it changes the depth of the model",
    "use_qalora": "it is made for quantised groups",
    "alora_invocation_tokens": "it is active on some tokens only",
    "arrow_config": "it is a router over other adapters",
}
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change W itself: W + scale B A is not the model


def read_peft(folder: str | Path) -> Adapter:
    """A LoRA adapter as PEFT saves it, with the masks that `write_peft` put beside it, if any.

    Scale per module: lora_alpha / r, or / sqrt(r) with use_rslora; rank_pattern and alpha_pattern are obeyed.
    Raises BadInput in one line for a folder that is not one, pickled weights, other adapters than LoRA, and kinds of
    LoRA that are more than W + scale B A (DoRA, biases, whole modules saved).
    """
    folder = Path(folder)
    config = _config(folder)
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise BadInput(
                f"{folder}: adapter_model.bin is pickled and not read; in PEFT: model.save_pretrained(..., "
                "safe_serialization=True)"
            )
        raise BadInput(f"{folder}: has no {WEIGHTS}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise BadInput(f"{folder / WEIGHTS}: not a safetensors file: {error}") from None
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for key, value in tensors.items():
        side = next((s for s in ("A", "B") if key.endswith(f".lora_{s}.weight")), None)
        if side is None or not key.startswith(PREFIX):
            raise BadInput(
                f"{folder / WEIGHTS}: {key} is no factor of a Linear layer; such an adapter cannot be merged here"
            )
        path = key.removeprefix(PREFIX).removesuffix(f".lora_{side}.weight")
        ({"A": A, "B": B}[side])[f"{path}.weight"] = value
    odd = sorted(set(A) ^ set(B))
    if odd or not A:
        raise BadInput(f"{folder / WEIGHTS}: {f'{odd[0]} lacks a factor' if odd else 'holds no factors'}")
    for name, right in A.items():
        left = B[name]
        if right.ndim != 2 or left.ndim != 2 or len(right) != left.shape[1]:
            raise BadInput(f"{name}: factors of shapes {tuple(left.shape)} and {tuple(right.shape)} do not multiply")
    scale = {name: _scale(config, name, len(A[name])) for name in A}
    masks = MaskSet.load(folder / MASKS) if (folder / MASKS).is_file() else None
    # With fan_in_fan_out the weights are Conv1D's (inputs, outputs); PEFT corrects the flag by module type, so
    # `Adapter.merge` asks the model, and this is for `delta` alone.
    return Adapter(A, B, scale, masks, frozenset(A) if config.get("fan_in_fan_out") else frozenset())


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: no readable {CONFIG}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise BadInput(f"{folder / CONFIG}: peft_type is {kind!r}, not 'LORA'")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise BadInput(f"{folder / CONFIG}: {key} is set ({why}): more than W + scale B A, so it cannot be merged")
    if str(config.get("init_lora_weights", True)).lower().startswith(_MOVED):
        raise BadInput(f"{folder / CONFIG}: init_lora_weights {config['init_lora_weights']!r} changed the base weights too")
    if config.get("bias", "none") != "none":
        raise BadInput(f"{folder / CONFIG}: bias is {config['bias']!r}: biases were trained too, so it cannot be merged")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise BadInput(f"{folder / CONFIG}: {key} is {config.get(key)!r}, not a positive number")
    return config


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    path = name.removesuffix(".weight")
    asked = _by_pattern(config.get("rank_pattern"), path, config["r"])
    if asked != rank:
        raise BadInput(f"{name}: the factors have rank {rank}, {CONFIG} says {asked}")
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, path: str, otherwise: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the module's path, at a dot; the first wins."""
    for pattern, value in (patterns or {}).items():
        if named(path, rf"re:(?:.*\.|^)(?:{pattern.removeprefix('^')})$"):
            return value
    return otherwise


def write_peft(folder: str | Path, adapter: Adapter, *, base: str = "", dense: bool = False) -> None:
    """Write the adapter as PEFT reads it: `PeftModel.from_pretrained(model, folder)`. `base` names the base model.

    PEFT adds B A to every entry. An adapter with masks that drop something is refused unless dense=True says that
    this is wanted; its masks are then put beside it, where PEFT does not look and `read_peft` does.
    Raises BadInput for factors of different ranks or scales, which one config cannot tell.
    """
    masks = adapter.masks
    if masks is not None and masks.count < masks.total and not dense:
        raise BadInput(
            f"PEFT would fill {masks.total - masks.count} dropped weights of {len(masks)} sites (it adds B A everywhere): "
            "merge with the masks and save the model, or pass dense=True"
        )
    ranks = {len(a) for a in adapter.A.values()}
    scales = set(adapter.scale.values())
    if len(ranks) != 1 or len(scales) != 1:
        raise BadInput(
            f"one adapter_config.json holds one rank and one scale, got ranks {sorted(ranks)}, scales {sorted(scales)}"
        )
    rank, scale = ranks.pop(), scales.pop()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": bool(adapter.transposed),
        "target_modules": [name.removesuffix(".weight") for name in adapter.A],
    }
    tensors = {}
    for name in adapter.A:
        path = PREFIX + name.removesuffix(".weight")
        for side, value in (("A", adapter.A[name]), ("B", adapter.B[name])):
            if not bool(torch.isfinite(value).all()):
                raise BadInput(f"{name}: factor {side} of shape {tuple(value.shape)} is not finite")
            tensors[f"{path}.lora_{side}.weight"] = value.contiguous()
    folder = Path(folder)
    write_adapter(folder, tensors, config)
    if masks is not None:
        masks.save(folder / MASKS)
    else:
        (folder / MASKS).unlink(missing_ok=True)
