"""LoRA on a pruned model without losing its sparsity: forward computes mask * (W + scale B A), and so does `merge`.

Plain LoRA (arXiv 2106.09685) trains a dense B A beside a sparse W; merging it fills the zeros, and masking only at
the merge changes the outputs that were trained. Here the mask is there from the first step on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from typing import final

import torch
from torch import Tensor, nn

from maskwright import __version__
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.select import generator
from maskwright.updates.branch import Branch, Branched, branched, linears
from maskwright.updates.guard import zero_masks


@final
class LowRank(Branch):
    """dW = scale B A with A (rank, inputs), drawn Kaiming-uniform with a = sqrt(5), and B (outputs, rank), zero."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float = 1.0, *, seed: int = 0, name: str = "") -> None:
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(uniform((rank, shape[1]), shape[1], seed, name))
        self.B = nn.Parameter(torch.zeros(shape[0], rank))

    def delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)


def uniform(shape: tuple[int, ...], fan_in: int, seed: int, name: str) -> Tensor:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), Kaiming's bound at a = sqrt(5); a function of the seed and the name."""
    draw = torch.rand(shape, generator=generator(seed, name), dtype=torch.float64)
    return ((2 * draw - 1) / sqrt(fan_in)).float()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank factors by weight name: A (rank, inputs), B (outputs, rank) and the scale of B A.

    `masks` are those the factors were trained under. `transposed` names the weights stored (inputs, outputs).
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    scale: Mapping[str, float]
    masks: MaskSet | None = None
    transposed: frozenset[str] = field(default_factory=frozenset)

    def delta(self, name: str) -> Tensor:
        """scale B A of one weight, in the weight's own layout, float32."""
        dense = self.scale[name] * (self.B[name].float() @ self.A[name].float())
        return dense.T if name in self.transposed else dense

    @torch.no_grad()
    def merge(self, model: nn.Module, masks: MaskSet | None = None) -> None:
        """W <- mask * (W + scale B A) in place; `masks` (default: the adapter's own) by weight name.

        A site without a mask is merged dense. Raises BadInput for a weight that is missing, of another shape or tied to
        another, for masks that name no weight of the adapter, and for factors that are not finite; then
        nothing is written.
        """
        masks = self.masks if masks is None else masks
        sites = linears(model, [f"re:^{re.escape(name)}$" for name in self.A])
        shapes = {name: (len(self.B[name]), self.A[name].shape[1]) for name in self.A}
        for name, shape in shapes.items():
            if sites[name].shape != shape:
                raise BadInput(f"{name}: the adapter is for a weight of shape {shape}, the model's is {sites[name].shape}")
            if not bool(torch.isfinite(self.delta(name)).all()):
                raise BadInput(f"{name}: the adapter's B A of shape {shape} is not finite")
        branches = {}
        for name, shape in shapes.items():
            branches[name] = LowRank(shape, len(self.A[name]), self.scale[name])
            branches[name].A.copy_(self.A[name])
            branches[name].B.copy_(self.B[name])
        kept = None if masks is None else {name: mask for name, mask in masks.items() if name in sites}
        if masks is not None and len(masks) and not kept:
            raise BadInput(f"none of the masks' {len(masks)} sites is a weight of the adapter: {next(iter(masks))}")
        with branched(model, sites, branches, masks=kept) as run:
            run.merge()


@dataclass(eq=False)
class LoraRun:
    """A model under LoRA, between entering and leaving `Lora.attach`."""

    branched: Branched
    kept: MaskSet

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The factors A and B of every site."""
        return self.branched.trainable

    def masks(self) -> MaskSet:
        """What each weight may hold: the given masks, and everything where none was given."""
        return self.kept

    def merge(self) -> None:
        """W <- mask * (W + scale B A), in place. Outputs do not change, to the bit."""
        self.branched.merge()

    def adapter(self) -> Adapter:
        """The factors as they are now (copies), with their masks: what `write_peft` saves."""
        low: dict[str, LowRank] = self.branched.branches  # type: ignore[assignment]
        return Adapter(
            {name: branch.A.detach().cpu().clone() for name, branch in low.items()},
            {name: branch.B.detach().cpu().clone() for name, branch in low.items()},
            {name: branch.scale for name, branch in low.items()},
            None if all(bool(mask.keep.all()) for mask in self.kept.values()) else self.kept,
            frozenset(name for name, site in self.branched.sites.items() if site.transposed),
        )


@final
@dataclass(frozen=True)
class Lora:
    """Pairs A, B of `rank` on the Linear weights that `where` names; scale = alpha / rank, or alpha / sqrt(rank).

    where: patterns as in `linears`; empty: the sites of the masks, or else those inside the blocks.
    rslora: the rank-stabilised scale (arXiv 2312.03732). Differs: no dropout on the input, since the update lies in
    the weight. Raises BadInput for settings that make no sense.
    """

    rank: int = 8
    alpha: float = 8.0
    where: tuple[str, ...] = ()
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            object.__setattr__(self, "where", (self.where,))
        if self.rank < 1 or not isfinite(self.alpha) or self.alpha <= 0:
            raise BadInput(f"lora needs rank >= 1 and alpha > 0, got rank {self.rank}, alpha {self.alpha}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @contextmanager
    def attach(self, model: nn.Module, masks: MaskSet | str | None = None, *, seed: int = 0) -> Iterator[LoraRun]:
        """Hang the pairs on the model. masks: a MaskSet, a pattern ("unstructured", "2:4") to read off the weights'
        zeros, or None for plain LoRA. A site that the masks do not name is not masked.

        Raises BadInput for a mask on no site of these, of another shape, or a pattern that does not hold.
        """
        where = self.where or ([f"re:^{re.escape(n)}$" for n in masks] if isinstance(masks, MaskSet) and len(masks) else ())
        sites = linears(model, where)
        if isinstance(masks, str):
            masks = zero_masks(model, where, masks)
        given = {} if masks is None else {name: mask for name, mask in masks.check().items() if name in sites}
        if masks is not None and len(masks) > len(given):
            other = next(name for name in masks if name not in sites)
            raise BadInput(f"{other}: has a mask but is not among the {len(sites)} sites of LoRA (where {self.where})")
        for name, mask in given.items():
            if mask.shape != tuple(sites[name].weight.shape):
                raise BadInput(f"{name}: the mask has shape {mask.shape}, the weight {tuple(sites[name].weight.shape)}")
        full = {n: given.get(n) or Mask(torch.ones(s.weight.shape, dtype=torch.bool)) for n, s in sites.items()}
        made = {"method": "lora", "version": __version__, "rank": self.rank, "seed": seed}
        kept = MaskSet(full, {**made, "masks": dict(masks.made_by) if masks is not None else {}})
        pairs = {n: LowRank(s.shape, self.rank, self.scale, seed=seed, name=n) for n, s in sites.items()}
        with branched(model, sites, pairs, masks=given) as run:
            yield LoraRun(run, kept)


def unmasked(adapter: Adapter) -> Adapter:
    """The same factors without masks: what PEFT computes, which adds B A to dropped weights too."""
    return replace(adapter, masks=None)
