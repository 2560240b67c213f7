"""What an attention method is given: one layer's call, the model's shape, and the state of the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maskwright.attention.plan import KeyPlan
from maskwright.attention.structure import Padding, Sink, Structure


class State(dict[str, Any]):
    """What a method remembers of one (layer, request): emptied when a request begins, copied with its cache."""


@dataclass(frozen=True)
class ModelShape:
    """What a plan depends on in a model. `sliding` is the model's own sliding window (None where it has none)."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    causal: bool
    sliding: int | None = None


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One call of one attention layer.

    q (batch, heads, queries, width), rotated as the model does; k, v (batch, kv_heads, keys, width), the cached keys
    first. `structure` is the model's own mask: causality, padding, sliding window (None: everything). Row i stands at
    key `offset + i`. `begins` says that the request begins with this call (its cache was empty). `told` is what the
    sampler told (step, steps, new_tokens ...). `evicted` says that k is what an eviction left of the keys. `first`
    (batch,) is the first real key of each sample where the batch is padded on the left, else None.
    """

    layer: int
    layers: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    structure: Structure | None
    offset: int
    begins: bool = True
    told: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    seed: int = 0
    evicted: bool = False
    first: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def sink(self, size: int) -> Structure:
        """The first `size` real keys of each sample."""
        return Sink(size) if self.first is None else Padding(self.first, self.first + size)

    def dense(self) -> KeyPlan:
        """Everything the model's structure allows."""
        return KeyPlan(self.queries, self.keys, self.structure, offset=self.offset)
