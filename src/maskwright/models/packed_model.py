"""A packed folder as a model whose linear layers hold their weights packed: nothing is ever expanded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear import PackedLinear, unpack
from maskwright.models.checkpoint import some
from maskwright.models.load import class_of, quiet, read_tokenizer
from maskwright.models.packed import PackedCheckpoint
from maskwright.models.packed_format import holds_packed


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint: ours, be it damaged, or a legacy one."""
    if holds_packed(folder):
        return True
    try:
        PackedCheckpoint(folder)
    except BadInput:
        return False
    return True


def load_packed(folder: Path) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or None) of a packed folder, tensor by tensor, in the dtypes stored.

    Weights of plain Linear layers stay packed; others (GPT-2's Conv1D, convolutions) are expanded. Raises BadInput
    for a damaged folder, a tensor the model has no place for, or one that it lacks.
    """
    checkpoint = PackedCheckpoint(folder)
    if checkpoint.parts:
        checkpoint.verify()
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise BadInput("packed models need the extra `lm`: pip install 'maskwright[lm]'") from None
    with quiet():
        config, kind = class_of(folder)
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        tokenizer = read_tokenizer(folder)
    unknown = []
    for name in checkpoint.weights:
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            unknown.append(name)
            continue
        packed = checkpoint.packed(name)
        if type(module) is nn.Linear and attribute == "weight" and packed.shape == tuple(module.weight.shape):
            made = PackedLinear(packed)
            made.bias = module.bias
            model.set_submodule(path, made)
        else:
            _put(model, name, unpack(packed), unknown)
    for name, read in checkpoint.dense():
        _put(model, name, read(), unknown)
    model.tie_weights()
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent or unknown:
        raise BadInput(f"{folder}: " + (f"lacks {some(absent)}" if absent else f"{kind.__name__} has no {some(unknown)}"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), tokenizer


def _put(model: nn.Module, name: str, tensor: torch.Tensor, unknown: list[str]) -> None:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        there = getattr(module, attribute)
    except AttributeError:
        unknown.append(name)
        return
    if tuple(there.shape) != tuple(tensor.shape):
        raise BadInput(f"{name}: shape {tuple(tensor.shape)}, the model has {tuple(there.shape)}")
    if isinstance(there, nn.Parameter):
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        there.copy_(tensor)
