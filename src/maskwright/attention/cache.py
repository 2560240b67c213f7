"""The cache of a request: where a method's state lives, and the layer that keeps what an eviction left."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskwright.attention.site import State
from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_NAME = "maskwright_state"


def layer_of(held: Cache | None, index: int) -> Any:
    """One layer of a Hugging Face cache, or None where there is no cache or the layer holds nothing yet."""
    return None if held is None or index >= len(held.layers) else held.layers[index]


def state_of(layer: Any) -> State:
    """The state kept on a cache layer, so that a copy of the cache copies it and a new cache starts without."""
    if not hasattr(layer, _NAME):
        setattr(layer, _NAME, State())
    state = getattr(layer, _NAME)
    assert isinstance(state, State)
    return state


def evicted_layer(layer: Any, keep: Tensor) -> Any:
    """A cache layer holding only the kept keys of `layer`, and its state. keep (batch, kv_heads, keys) bool.

    Heads that keep fewer keys than others are filled up on the left. Raises BadInput where a head keeps nothing or the
    shape does not fit.
    """
    keys, values = layer.keys, layer.values
    if keep.dtype != torch.bool or tuple(keep.shape) != tuple(keys.shape[:3]):
        raise BadInput(f"an eviction of keys {tuple(keys.shape)} is bool (batch, kv_heads, keys), got {tuple(keep.shape)}")
    counts = keep.sum(-1)  # (batch, kv_heads)
    if int(counts.min()) < 1:
        raise BadInput("an eviction must leave every head at least one key")
    most = int(counts.max())
    # Kept keys in order at the end, and dropped ones (never looked at) in front of heads that keep fewer.
    order = torch.sort(keep.to(torch.int8), dim=-1, stable=True).indices[..., -most:]
    index = order[..., None].expand(-1, -1, -1, keys.shape[-1])
    made = _layer_class()(keys.gather(2, index), values.gather(2, index), most - counts, keys.shape[2])
    setattr(made, _NAME, state_of(layer))
    return made


def is_evicted(layer: Any) -> bool:
    """Whether a layer holds what an eviction left."""
    return getattr(layer, "is_evicted", False)


@cache
def _layer_class() -> Any:
    """The class of such layers: made when first needed, since its parent lies in transformers."""
    from transformers.cache_utils import DynamicLayer

    class EvictedLayer(DynamicLayer):
        """Keys an eviction left, then every new one. Its length is what was seen, not what is stored."""

        is_evicted = True
        is_croppable = False

        def __init__(self, keys: Tensor, values: Tensor, first: Tensor, seen: int) -> None:
            super().__init__()
            self.keys, self.values, self.first, self.seen = keys, values, first, seen
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.seen += key_states.shape[-2]
            return super().update(key_states, value_states, *args, **kwargs)

        def get_seq_length(self) -> int:
            return self.seen

        def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self.first = self.first.index_select(0, beam_idx.to(self.first.device))

        def crop(self, *args: Any) -> None:
            raise BadInput("a cache whose keys were evicted cannot be cropped")

    return EvictedLayer
