"""AttentionMethod: what a room of this place is. It plans; the place attends, keeps state and moves the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from maskwright.attention.plan import KeyPlan
from maskwright.attention.site import AttentionSite, ModelShape, State
from maskwright.core.errors import BadInput

Direction = Literal["causal", "bidirectional", "both"]


class AttentionMethod(ABC):
    """A final frozen dataclass of a paper's settings, every one with a default. Checks its settings when made."""

    direction: ClassVar[Direction] = "causal"

    @abstractmethod
    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        """What each query row of this call reads. Asked at every call of every layer; never sees more than the model may."""

    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        """After the prefill: (batch, kv_heads, keys) bool, the keys that stay in the cache for good; None keeps all."""
        return None

    def fits(self, shape: ModelShape) -> None:
        """Raise BadInput when this method cannot run on such a model, before any work."""
        if self.direction != "both" and shape.causal != (self.direction == "causal"):
            model = "causal" if shape.causal else "bidirectional"
            raise BadInput(f"{type(self).__name__} masks {self.direction} attention; this model's attention is {model}")
