"""Seeded mask samplers for images, video, token rows and mel spectrograms: one mask a sample, exact counts.

A shape is (batch, *grid): (batch, tokens), (batch, rows, columns), (batch, time, rows, columns), (batch, bins, frames).
The grid may be coarser than the data; `hide` spreads it. Each sample has a competition of its own, so that its mask
keeps whole(density, units) units and does not depend on the rest of the batch's values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Block, Pattern, Unstructured
from maskwright.core.select import draw, select

Shape = tuple[int, ...]
_SAMPLE = (0,)  # the batch dim splits the competition


@dataclass(frozen=True)
class Sampler(ABC):
    """Settings of a random mask; `density` is the share kept. Called with a shape and a generator it gives a Mask.

    Raises BadInput for a density outside (0, 1].
    """

    density: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"{type(self).__name__} keeps a share in (0, 1] of each sample, got density {self.density}")

    @abstractmethod
    def pattern(self, shape: Shape) -> Pattern:
        """What a unit is on this shape, and that the samples of a batch do not compete."""

    def __call__(self, shape: Shape, *, rng: torch.Generator, score: Tensor | None = None) -> Mask:
        """A mask of `shape` = (batch, *grid). `score` may force entries (+inf stays, -inf goes).

        Raises BadInput when the grid does not fit the units or the density keeps no unit of a sample.
        """
        pattern = self.pattern(batched(shape))
        return draw(pattern, tuple(shape), count(self.density, pattern, shape), rng=rng, score=score)


def batched(shape: Shape) -> Shape:
    """The shape, if it has a batch and a grid. Raises BadInput."""
    if len(shape) < 2 or min(shape) < 1:
        raise BadInput(f"a mask over inputs has shape (batch, *grid) with sides of at least 1, got {tuple(shape)}")
    return tuple(shape)


def count(density: float, pattern: Pattern, shape: Shape) -> int:
    """Units kept of each group: whole(density, units). Raises BadInput when that is none."""
    units = pattern.grid(tuple(shape))[1]
    kept = whole(density, units)
    if not kept:
        raise BadInput(f"density {density} keeps none of the {units} units of a sample ({pattern} on shape {tuple(shape)})")
    return kept


@final
@dataclass(frozen=True)
class Exact(Sampler):
    """Every entry is a unit: exactly whole(density, entries) of each sample stay."""

    def pattern(self, shape: Shape) -> Pattern:
        return Unstructured(_SAMPLE)


@final
@dataclass(frozen=True)
class Bernoulli(Sampler):
    """Every entry stays with probability `density`, by itself: the count varies."""

    def pattern(self, shape: Shape) -> Pattern:
        return Unstructured(_SAMPLE)

    def __call__(self, shape: Shape, *, rng: torch.Generator, score: Tensor | None = None) -> Mask:
        return draw(self.pattern(batched(shape)), tuple(shape), rng=rng, probability=self.density, score=score)


@final
@dataclass(frozen=True)
class Blocks(Sampler):
    """Blocks of the last dims stay or go whole, exactly whole(density, blocks) a sample; a ragged edge is refused."""

    block: tuple[int, ...] = (2, 2)

    def pattern(self, shape: Shape) -> Pattern:
        return Block(self.block, within=_SAMPLE)


@final
@dataclass(frozen=True)
class Tubes(Sampler):
    """Video (batch, time, rows, columns): a place stays or goes for all of the time (VideoMAE, arXiv 2203.12602)."""

    block: tuple[int, int] = (1, 1)

    def pattern(self, shape: Shape) -> Pattern:
        if len(shape) != 4:
            raise BadInput(f"tubes lie in (batch, time, rows, columns), got shape {tuple(shape)}")
        return Block((shape[1], *self.block), within=_SAMPLE)


@final
@dataclass(frozen=True)
class Bands(Sampler):
    """Spectrogram (batch, bins, frames): whole bins ("bins") or whole frames ("frames") stay or go, `width` together."""

    along: str = "bins"
    width: int = 1

    def pattern(self, shape: Shape) -> Pattern:
        if len(shape) != 3:
            raise BadInput(f"bands lie in (batch, bins, frames), got shape {tuple(shape)}")
        if self.along not in ("bins", "frames"):
            raise BadInput(f"bands run along 'bins' or 'frames', got {self.along!r}")
        return Block((self.width, shape[2]) if self.along == "bins" else (shape[1], self.width), within=_SAMPLE)


@final
@dataclass(frozen=True)
class Views:
    """`n` masks of one sample that hide different places: each keeps `density`, together they hide the share `cover`.

    Every view hides what no view has hidden yet, until the union of the hidden holds whole(cover, units); the rest it
    hides again, by chance. With n = 2 this is disjoint masking (DMJD, arXiv 2301.00230); cover 1 and density 1/2 gives a
    mask and its complement. `block` (with sides that divide the grid) makes blocks of the last dims the units.
    Differs: n views for any cover they can reach; the code knows two, and a cover that two cannot reach is cut there.
    Raises BadInput for a cover that n views of this density cannot hide, or that is less than what one hides.
    """

    density: float = 0.4
    n: int = 2
    cover: float = 1.0
    block: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not 0 < self.cover <= 1 or self.n < 1:
            told = f"density {self.density}, cover {self.cover}, n {self.n}"
            raise BadInput(f"views need density in (0, 1), cover in (0, 1] and n of at least 1, got {told}")

    def __call__(self, shape: Shape, *, rng: torch.Generator) -> Mask:
        """(batch, *grid) -> a mask of shape (n, batch, *grid). Raises BadInput as said above."""
        pattern = Block(self.block, within=(0, 1)) if self.block else Unstructured((0, 1))
        full = (self.n, *batched(shape))
        groups, units = pattern.grid(full)
        hide, target = units - count(self.density, pattern, full), whole(self.cover, units)
        if not hide <= target <= min(units, self.n * hide):
            least = f"{self.n} views of density {self.density} hide between {hide} and {min(units, self.n * hide)}"
            raise BadInput(f"{least} of {units} units of shape {tuple(shape)}, cover {self.cover} asks for {target}")
        batch = groups // self.n
        hidden, views = torch.zeros(batch, units, dtype=torch.bool), []
        for at in range(self.n):
            fresh = min(hide, target - (0 if not at else int(hidden[0].sum())))
            gone = _among(~hidden, fresh, rng) | _among(hidden, hide - fresh, rng)
            hidden = hidden | gone
            views.append(~gone)
        return Mask(pattern.unfold(torch.cat(views), full), pattern)


def _among(allowed: Tensor, number: int, rng: torch.Generator) -> Tensor:
    """`number` of the allowed entries of each row, by chance. (rows, units) bool -> the same shape."""
    if not number:
        return torch.zeros_like(allowed)
    score = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
    return draw(Unstructured(_SAMPLE), tuple(allowed.shape), number, rng=rng, score=score).keep


def salient(score: Tensor, density: float, pattern: Pattern | None = None) -> Mask:
    """The whole(density, units) units of each sample with the greatest score. score: (batch, *grid).

    `pattern` says what a unit is (default: every entry, each sample by itself). Raises BadInput on NaN and where the
    density keeps no unit.
    """
    pattern = pattern or Unstructured(_SAMPLE)
    shape = batched(tuple(score.shape))
    if not 0 < density <= 1:
        raise BadInput(f"a density lies in (0, 1], got {density}")
    return select(score, pattern, count(density, pattern, shape))
