"""MoA's rules: how long a head's window is at a length, what it costs, and what it loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput

Affine = tuple[float, float]  # alpha (tokens), beta (share of the length)


def band(alpha: float, beta: float, length: int, block: int) -> int:
    """Blocks of the causal band at a length, the diagonal one counted: int(floor(alpha / block) + beta n) >= 1, n all."""
    return max(1, int(alpha // block + beta * -(-length // block)))


def density(blocks: int, length: int, block: int, sink: int) -> float:
    """Kept blocks in the last row as a share of all: the share of the cache that a head holds."""
    every = -(-length // block)
    return min(every, blocks + sink) / every


def candidates(lengths: Sequence[int], extend: int, block: int, step: int, betas: int) -> list[Affine]:
    """The search space: alpha from -shortest to longest about every `step` tokens, beta in `betas` places of 0..1.

    Left out are rules whose window is longer than the input at the longest or the extended length, or empty at the
    shortest one, and rules that are like an earlier one at all these lengths.
    """
    low, high = min(lengths), max(lengths)
    found: dict[tuple[int, ...], Affine] = {}
    for alpha in np.linspace(-low, high, (high + low) // step + 1):
        for beta in np.linspace(0, 1, betas):
            if alpha + beta * high <= high and alpha + beta * extend <= extend and alpha + beta * low > 0:
                rule = (float(alpha), float(beta))
                found.setdefault(tuple(band(*rule, n, block) for n in (*lengths, extend)), rule)
    if not found:
        raise BadInput(f"moa: no rule fits lengths {tuple(lengths)} extended to {extend}: alpha every {step}, {betas} betas")
    return list(found.values())


def losses(blocks: Tensor, bands: Sequence[int], sink: int) -> Tensor:
    """The influence that bands of so many blocks leave out. blocks (..., n, n) >= 0 -> (..., rules); falls with the band."""
    n = blocks.shape[-1]
    row = torch.arange(n)
    far = (row[:, None] - row).masked_fill(row < sink, -1).clamp(min=-1)  # the sink and the future are never left out
    at = (far + 1).flatten().expand(*blocks.shape[:-2], -1)
    sums = torch.zeros(*blocks.shape[:-2], n + 1, dtype=blocks.dtype).scatter_add_(-1, at, blocks.flatten(-2))
    tail = torch.cat([sums[..., 1:].flip(-1).cumsum(-1).flip(-1), torch.zeros_like(sums[..., :1])], -1)
    return tail[..., torch.tensor([min(wide, n) for wide in bands])]  # tail[d]: d blocks away or farther
