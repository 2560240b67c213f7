"""Linear layers that hold their weight packed, and one that reads a dense weight by the same kernels. Inference only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.indexed import Indexed, check_indexed
from maskwright.kernels.packed_linear.layout import Packed, check
from maskwright.kernels.packed_linear.linear import MOST, NEVER, steady
from maskwright.kernels.packed_linear.ops import engine

_PARTS = {
    "bitmask": ("values", "bitmask", "row_offsets", "scale"),
    "indexed": ("values", "offsets", "bases", "row_groups", "scale"),
}


class PackedLinear(nn.Module):
    """A Linear (out, in) from a packed weight: its tensors are buffers, so it saves and loads like any module.

    weight: Packed or Indexed. dense_from: rows of input from which the weight is expanded block by block and
    multiplied by torch. Loading refuses buffers that do not fit together.
    """

    scale: Tensor | None

    def __init__(self, weight: Packed | Indexed, bias: Tensor | None = None, dense_from: int = NEVER) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise BadInput(f"a packed Linear needs a weight of 2 dims, got shape {tuple(weight.shape)}")
        engine()
        self.out_features, self.in_features = weight.shape
        self.layout = "bitmask" if isinstance(weight, Packed) else "indexed"
        for part in _PARTS[self.layout]:
            self.register_buffer(part, getattr(weight, part))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.dense_from = dense_from
        self.step = steady(weight) if isinstance(weight, Packed) else 0

    @property
    def packed(self) -> Packed | Indexed:
        """The weight in its layout."""
        kind: Any = Packed if self.layout == "bitmask" else Indexed
        return kind((self.out_features, self.in_features), *(getattr(self, part) for part in _PARTS[self.layout]))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x; sums are float32."""
        parts = [getattr(self, part) for part in _PARTS[self.layout]]
        if self.layout == "bitmask":
            return torch.ops.maskwright.packed_linear(x, *parts, self.bias, self.step, self.dense_from)
        return torch.ops.maskwright.indexed_linear(x, *parts, self.bias, self.dense_from)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        # half() and to(bfloat16) are meant for values; int8 ones are no floats, and their scales stay float32.
        if scale is not None and self.scale is not None:
            self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight = self.packed
        try:
            check(weight) if isinstance(weight, Packed) else check_indexed(weight)
        except BadInput as error:
            raise BadInput(f"{prefix.rstrip('.')}: {error}") from None
        self.step = steady(weight) if isinstance(weight, Packed) else 0

    def extra_repr(self) -> str:
        kept = self.packed.values.numel() / max(1, self.out_features * self.in_features)
        dtype = str(self.packed.values.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout}, {dtype}, kept={kept:.3f}"


def dense_module(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A Linear around a weight (out, in) that is there already: nothing is made or copied."""
    made = kind(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = bias  # type: ignore[assignment]
    return made


class LoopLinear(nn.Linear):
    """A dense Linear whose small batches run on the kernels' dense loop: torch's own is slow there in some dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        if x.numel() > MOST * self.in_features:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.maskwright.dense_linear(x, self.weight, None, self.bias)
