"""The gate: what a DMA layer learns beside its attention, and how a model gets it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.attention.huggingface import hosts, shape_of
from maskwright.core.errors import BadInput
from maskwright.core.select import generator

NAME = "dma_gate"


class Gate(nn.Module):
    """s = a softplus(weight u), u the values of all key heads of a token side by side (arXiv 2508.02124, code form).

    `a` (kv_heads,) begins at 0, `weight` (kv_heads, kv_heads * width) at a normal of `std`.
    """

    def __init__(self, kv_heads: int, width: int, *, std: float = 0.02, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(kv_heads))
        self.weight = nn.Parameter(torch.randn(kv_heads, kv_heads * width, generator=rng) * std)

    def forward(self, v: Tensor) -> Tensor:
        """v (batch, kv_heads, keys, width) -> s (batch, kv_heads, keys), float32 or wider."""
        kv_heads, width = v.shape[1], v.shape[3]
        if tuple(self.weight.shape) != (kv_heads, kv_heads * width):
            raise BadInput(f"a dma gate of {tuple(self.weight.shape)} does not fit values {tuple(v.shape)}")
        delta = torch.einsum("bhnd,ghd->bgn", v, self.weight.to(v.dtype).view(-1, kv_heads, width))
        delta = delta if delta.dtype == torch.float64 else delta.float()  # softplus loses too much in half precision
        return self.a.to(delta.dtype)[:, None] * F.softplus(delta)


def convert(model: nn.Module, *, std: float = 0.02, seed: int = 0) -> dict[str, Gate]:
    """Add an untrained gate to every attention module, under the name `dma_gate`: name of the module -> its gate.

    The gates' parameters are then the model's own: an optimiser finds them, its state dict holds them. With a = 0 no
    score differs from another, so a model reads its last `window` keys, and is unchanged on texts no longer than that.
    Takes Hugging Face models, and modules with an `attend` whose maps are `value` (nn.Linear) and `heads` or `kv_heads`.
    Raises BadInput for a model without attention, one already converted, or a module whose shape cannot be told.
    """
    found = hosts(model)
    sizes = [(shape.kv_heads, shape.width) for shape in (shape_of(module) for _, module in found)]
    if not found:
        found = [(name, module) for name, module in model.named_modules() if callable(getattr(module, "attend", None))]
        sizes = [_size(name, module) for name, module in found]
    if not found:
        raise BadInput(f"{type(model).__name__} has no attention layer that asks AttentionInterface or has an `attend`")
    made = {}
    for (name, module), (kv_heads, width) in zip(found, sizes, strict=True):
        if hasattr(module, NAME):
            raise BadInput(f"{name} has a dma gate already: a model is converted once")
        gate = Gate(kv_heads, width, std=std, rng=generator(seed, name))
        like = next(module.parameters())
        made[name] = gate.to(device=like.device, dtype=like.dtype)
    for name, gate in made.items():
        setattr(model.get_submodule(name), NAME, gate)
    return made


def _size(name: str, module: nn.Module) -> tuple[int, int]:
    heads = getattr(module, "kv_heads", getattr(module, "heads", None))
    value = getattr(module, "value", None)
    if not isinstance(heads, int) or not isinstance(value, nn.Linear) or value.out_features % heads:
        raise BadInput(f"{name}: the heads of its values cannot be told: set a Gate as its `{NAME}` yourself")
    return heads, value.out_features // heads
