"""MoA: every head its own window, as long as its share of the loss asks for, found once by search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, ModelShape, State
from maskwright.attention.heads import HeadPlan
from maskwright.attention.method import Direction
from maskwright.attention.moa import layout
from maskwright.attention.moa.search import Calibration, search
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class Moa(AttentionMethod):
    """Head h reads the first `sink` blocks and a band of the last int(floor(alpha_h / block) + beta_h N / block) ones.

    alpha and beta are chosen per layer and key head by `search`, from how much the loss of the model's own answers owes
    to what a window leaves out (arXiv 2406.14909). N is the prompt's length, also while decoding: then a head reads the
    first sink blocks and the last band x block tokens, and nothing else stays in its cache (`shrink`).
    heads: a plan of `search`, or the path of a saved one; None: the uniform rule alpha 0, beta `density` for all heads.
    block, sink: of that uniform rule; a plan brings its own.
    Differs: the last block may be ragged (the code refuses such lengths), N / block is rounded up; a band that covers the
    prompt covers what is decoded too, so that beta 1 is dense attention; new tokens are appended to the shrunk cache
    and those that leave the window stay there unread, where the code overwrites them in a ring.
    Raises BadInput for settings out of range, a plan of another method or model, and heads that share keys by other rules.
    """

    heads: HeadPlan | str | None = None
    density: float = 0.5
    block: int = 64
    sink: int = 1
    shrink: bool = True
    direction: ClassVar[Direction] = "causal"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.block < 1 or self.sink < 0:
            raise BadInput(f"moa: density in (0, 1], block >= 1, sink >= 0, got {self.density}, {self.block}, {self.sink}")
        if self.found is not None and self.found.method != "moa":
            raise BadInput(f"moa: the plan was made for {self.found.method}")
        _ = self._grid

    @cached_property
    def found(self) -> HeadPlan | None:
        """The plan of heads, loaded where a path was given."""
        return HeadPlan.load(self.heads) if isinstance(self.heads, str) else self.heads

    @cached_property
    def _grid(self) -> tuple[int, int]:
        grid = {"block": self.block, "sink": self.sink} if self.found is None else self.found.grid
        block, sink = grid.get("block"), grid.get("sink")
        if type(block) is not int or type(sink) is not int or block < 1 or sink < 0:
            raise BadInput(f"moa: a plan's grid is a block and a sink, got {dict(grid)}")
        return block, sink

    def fits(self, shape: ModelShape) -> None:
        AttentionMethod.fits(self, shape)
        if self.found is not None:
            self.found.fits(shape)
            for layer in range(shape.layers):
                self.affine(layer, shape.heads, shape.kv_heads)

    def affine(self, layer: int, heads: int, kv_heads: int) -> Tensor:
        """(kv_heads, 2) float64: alpha and beta of each key head of a layer."""
        if self.found is None:
            return torch.tensor([[0.0, self.density]], dtype=torch.float64).expand(kv_heads, 2)
        try:
            pairs = [(rule.parameters["alpha"], rule.parameters["beta"]) for rule in self.found.rules[layer]]
        except KeyError as missing:
            raise BadInput(f"moa: a rule of the plan's layer {layer} has no {missing}") from None
        group = heads // kv_heads
        if any(pairs[h] != pairs[h // group * group] for h in range(heads)):
            raise BadInput(f"moa: layer {layer} has heads that share keys but not their rule")
        return torch.tensor(pairs[::group], dtype=torch.float64)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        block, sink = self._grid
        if site.begins or "band" not in state:
            state["band"] = self.bands(site)
        band: Tensor = state["band"]
        if site.begins and site.first is None:
            return KeyPlan(site.queries, site.keys, site.structure, layout.prompt(band[0], block, sink, site.keys))
        seen = layout.rows(site, band, block, sink)
        structure = seen if site.structure is None else site.structure & seen
        return KeyPlan(site.queries, site.keys, structure, offset=site.offset)

    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        if not self.shrink:
            return None
        block, sink = self._grid
        keep = layout.stored(site, state["band"], block, sink)
        # A layer's heads are stored in one tensor: where one of them keeps all, nothing would be saved.
        return None if int(keep.sum(-1).max()) == site.keys else keep

    def bands(self, site: AttentionSite) -> Tensor:
        """(batch | 1, kv_heads) int64: blocks of each head's band at this length."""
        alpha, beta = self.affine(site.layer, site.heads, site.kv_heads).unbind(-1)
        length = torch.tensor([site.keys]) if site.first is None else site.keys - site.first
        return layout.bands(alpha, beta, length, self._grid[0])

    @classmethod
    def search(
        cls, model: Any, calibration: Calibration, *, density: float = 0.5, lengths: tuple[int, ...] = (2048, 4096, 8192),
        seed: int = 0, say: Callable[[str], None] = lambda line: None, **settings: Any,
    ) -> HeadPlan:  # fmt: skip
        """Profile a causal model, solve for its rules, validate, and return the plan: see `moa.search.search`."""
        return search(cls, model, calibration, density=density, lengths=lengths, seed=seed, say=say, **settings)
