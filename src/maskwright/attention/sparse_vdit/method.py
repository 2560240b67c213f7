"""Sparse-vDiT: one of five static patterns for every head of a video diffusion transformer, chosen offline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, ModelShape, State
from maskwright.attention.heads import HeadPlan
from maskwright.attention.method import Direction
from maskwright.attention.sparse_vdit.patterns import PATTERNS, USUAL, Bands, Grid, layer_plan
from maskwright.attention.sparse_vdit.plan import Patterns, read
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class SparseVDiT(AttentionMethod):
    """Every head keeps its pattern at every denoising step, whatever the input (arXiv 2506.03065).

    heads: a plan that `search` made, or the path of a saved one; None: `pattern` ("full", "diagonal", "multi",
    "stripe", "skip") for all heads, on `grid` (None: all tokens are one frame) with `bands`; a plan brings its own.
    The first `warmup` steps that the sampler tells are dense.
    A skipped head gives zeros. Text tokens are read by every other head and read everything.
    Differs: the band around a place closes around the frame's end, as |i - j - c S| <= w says for any whole c.
    Raises BadInput for an unknown pattern, a plan of another model, method or grid, grouped key heads, and causal
    attention.
    """

    heads: HeadPlan | str | None = None
    pattern: str = "full"
    grid: Grid | None = None
    bands: Bands = USUAL
    warmup: int = 0
    direction: ClassVar[Direction] = "bidirectional"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise BadInput(f"sparse_vdit: unknown pattern {self.pattern!r}; known: {', '.join(PATTERNS)}")
        if self.warmup < 0:
            raise BadInput(f"sparse_vdit: warmup is 0 steps or more, got {self.warmup}")
        if self.found is not None and self.grid not in (None, self.found.grid):
            raise BadInput(f"sparse_vdit: the plan was made for {self.found.grid}, not for {self.grid}")

    @cached_property
    def _plan(self) -> HeadPlan | None:
        return HeadPlan.load(self.heads) if isinstance(self.heads, str) else self.heads

    @property
    def found(self) -> Patterns | None:
        """What the plan says, loaded where a path was given."""
        return None if self._plan is None else read(self._plan)

    def fits(self, shape: ModelShape) -> None:
        super().fits(shape)
        if shape.kv_heads != shape.heads:
            raise BadInput(f"sparse_vdit runs heads apart: {shape.heads} heads share {shape.kv_heads} key heads")
        if self._plan is not None:
            self._plan.fits(shape)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if self.warmup and int(site.told.get("step", self.warmup)) < self.warmup:
            return site.dense()
        found = self.found or Patterns(
            ((self.pattern,) * site.heads,) * site.layers, self.grid or Grid(1, 1, site.keys), self.bands
        )
        if (site.queries, site.keys) != (found.grid.tokens, found.grid.tokens):
            raise BadInput(
                f"sparse_vdit, layer {site.layer}: {site.queries} queries and {site.keys} keys do not fit the "
                f"{found.grid.tokens} tokens of {found.grid}"
            )
        return layer_plan(found.names[site.layer], found.grid, found.bands).within(site.structure)
