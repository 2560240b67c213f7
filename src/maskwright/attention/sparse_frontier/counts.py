"""What a point of the frontier costs in FLOPs, and which points no other one beats. Source: arXiv 2504.17768."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maskwright.core.errors import BadInput

Unit = Literal["window", "pooled", "pages", "none"]


@dataclass(frozen=True)
class Size:
    """A model as its FLOPs see it: parameters without the embedding, layers, query heads, width of a head."""

    params: int
    layers: int
    heads: int
    width: int

    def __post_init__(self) -> None:
        if min(self.params, self.layers, self.heads, self.width) < 1:
            raise BadInput(f"a model has at least one parameter, layer, head and channel, got {self}")


def prefill_flops(size: Size, length: int, density: float = 1.0, index: float = 0.0) -> float:
    """FLOPs of a prompt of `length` tokens: 2 a parameter and token, 4 x width a kept pair and head, `index` a layer.

    density: kept share of the length (length + 1) / 2 causal pairs.
    """
    if length < 1 or not 0 <= density <= 1 or index < 0:
        raise BadInput(f"length >= 1, density in 0..1 and index >= 0, got {length}, {density} and {index}")
    pairs = density * length * (length + 1) / 2
    return 2.0 * size.params * length + size.layers * (4.0 * size.width * size.heads * pairs + index)


def equal_density(large: Size, small: Size, length: int, index: float = 0.0) -> float | None:
    """The density at which `large` spends on a prompt what `small` spends dense; None where it spends more even at 0.

    Above 1 the larger model is cheaper as it is. isoFLOPS asks which of the two then scores more: only where attention
    outweighs the parameters (a long prompt, a narrow model) is there such a density at all.
    """
    spare = prefill_flops(small, length) - prefill_flops(large, length, 0.0, index)
    pairs = large.layers * 4.0 * large.width * large.heads * length * (length + 1) / 2
    return spare / pairs if spare >= 0 else None


def token_flops(size: Size, keys: int, density: float = 1.0, index: float = 0.0) -> float:
    """FLOPs of one decoded token that reads the share `density` of `keys` cached keys."""
    if keys < 1 or not 0 <= density <= 1 or index < 0:
        raise BadInput(f"keys >= 1, density in 0..1 and index >= 0, got {keys}, {density} and {index}")
    return 2.0 * size.params + size.layers * (4.0 * size.width * size.heads * density * keys + index)


def indexing(unit: Unit, keys: int, width: int, heads: int, *, window: int = 256, block: int = 16) -> float:
    """FLOPs a layer spends on finding what to keep.

    "window" (vertical-slash, FlexPrefill, SnapKV, Ada-SnapKV): the last `window` queries against all keys, 2 w N d H.
    "pooled" (block-sparse): block means and their products, N d + 2 (N / b)^2 d H. "pages" (Quest): the bound of every
    page for one token, 4 (N / b) d H. "none": nothing is asked of the content.
    """
    blocks = -(-keys // block)
    known = {
        "window": 2.0 * min(window, keys) * keys * width * heads,
        "pooled": 1.0 * keys * width + 2.0 * blocks**2 * width * heads,
        "pages": 4.0 * blocks * width * heads,
        "none": 0.0,
    }
    if unit not in known:
        raise BadInput(f"indexing cost of {unit!r} is not known; known: {', '.join(known)}")
    return known[unit]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the (cost, score) points on the front, cheap to dear: no other point scores as much for less.

    Of equal points the first stays.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
