"""Sliding window with sinks: the fixed mask every learned or searched one is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, State, Window
from maskwright.attention.method import Direction
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class SlidingWindow(AttentionMethod):
    """The last `window` keys (the own one counted) and the first `sink` ones (StreamingLLM's mask, arXiv 2309.17453).

    In a bidirectional model the window reaches as far to the right.
    Raises BadInput for a window below 1 or a negative sink.
    """

    window: int = 256
    sink: int = 4
    direction: ClassVar[Direction] = "both"

    def __post_init__(self) -> None:
        if self.window < 1 or self.sink < 0:
            raise BadInput(f"sliding_window: window >= 1 and sink >= 0, got {self.window} and {self.sink}")

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        causal = site.structure is not None and any(isinstance(part, Causal) for part in site.structure.parts())
        seen = Window(self.window, 0 if causal else self.window - 1) | site.sink(self.sink)
        if site.evicted:
            return site.dense()
        return KeyPlan(site.queries, site.keys, seen if site.structure is None else site.structure & seen)
