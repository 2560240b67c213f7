"""Scores: functions of a site; greater means keep. A score names its needs, so just those are gathered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import generator

# Every statistic a score may ask for; a place gathers those it can and refuses the others early.
NEEDS = frozenset({"grad", "dense_grad", "input_norm", "input_mean", "input_variance", "gram", "attention"})


class Site(Protocol):
    """What a score may read of one masked tensor (each place has its own frozen class)."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def seed(self) -> int: ...
    def stat(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """A score function with its needs. Call it with a site; the result has the shape of `site.value`."""

    fn: Callable[[Any], Tensor]
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.needs <= NEEDS:
            raise BadInput(f"unknown needs {sorted(self.needs - NEEDS)}; known: {sorted(NEEDS)}")

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", "score")

    def __call__(self, site: Any) -> Tensor:
        out = self.fn(site)
        if out.shape != site.value.shape:
            raise BadInput(
                f"{site.name}: score {self.name} has shape {tuple(out.shape)}, the site {tuple(site.value.shape)}"
            )
        return out


def score(*needs: str) -> Callable[[Callable[[Any], Tensor]], Score]:
    """Decorator: `@score("input_norm")` turns a function of a site into a Score with these needs."""
    return lambda fn: Score(fn, frozenset(needs))


@score()
def magnitude(site: Site) -> Tensor:
    """|w|."""
    return site.value.detach().abs()


@score()
def uniform_random(site: Site) -> Tensor:
    """Uniform noise in [0, 1), a function of the run's seed and the site's name alone."""
    return torch.rand(site.value.shape, generator=generator(site.seed, site.name), dtype=torch.float64)


def force(values: Tensor, keep: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
    """Scores with +inf where `keep` and -inf where `drop` (bool, same shape).

    Infinities and not max + eps: float32 swallows eps at 256 and above. Raises BadInput where both hold.
    """
    if keep is not None and drop is not None and bool((keep & drop).any()):
        raise BadInput(f"{int((keep & drop).sum())} entries of shape {tuple(values.shape)} are forced both ways")
    if not values.dtype.is_floating_point:
        values = values.double()
    if keep is not None:
        values = values.masked_fill(keep, float("inf"))
    return values if drop is None else values.masked_fill(drop, float("-inf"))
