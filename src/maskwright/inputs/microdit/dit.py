"""A small conditional diffusion transformer: adaLN blocks with normed queries and keys, around a deferred mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.microdit.deferred import DeferredMask
from maskwright.inputs.microdit.ffn import Experts, SwiGlu
from maskwright.inputs.patches import patches, sides, unpatched

EPS = 1e-6
FREQUENCIES = 256


@final
class Attention(nn.Module):
    """Multi-head attention; queries and keys are normed over their whole width, without weights, before the heads."""

    def __init__(self, width: int, inner: int, heads: int, reads: int | None = None) -> None:
        super().__init__()
        self.inner, self.heads = inner, heads
        self.query, self.out = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.key_value = nn.Linear(reads or width, 2 * inner, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (batch, tokens, width) reads itself, or `context` (batch, others, reads)."""
        key, value = self.key_value(x if context is None else context).chunk(2, -1)
        query, key = (F.layer_norm(part, (self.inner,), eps=EPS) for part in (self.query(x), key))
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def start(self, std: float, out: float) -> None:
        """Normal weights: `std` inside, `out` for what is added to the residual."""
        for linear in (self.query, self.key_value):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.trunc_normal_(self.out.weight, std=out, a=-2 * out, b=2 * out)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (batch, tokens, width) with one shift and scale a sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _modulation(inputs: int, outputs: int) -> nn.Sequential:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.GELU(approximate="tanh"), linear)


@final
class Block(nn.Module):
    """x += gate attention(mod(norm x)); x += cross attention(norm x, context); x += gate ffn(mod(norm x)).

    Gates, shifts and scales come from the condition and start at 0: the block then is the identity, but for the cross
    attention, which has no gate (it is there only where the condition has tokens).
    """

    def __init__(
        self, width: int, attention: Attention, cross: Attention | None, ffn: SwiGlu | Experts, condition: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attention, self.cross, self.ffn = attention, cross, ffn
        self.norm2 = None if cross is None else nn.LayerNorm(width, eps=EPS)
        self.modulation = _modulation(condition, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate.unsqueeze(1) * self.attention(modulated(self.norm1(x), shift, scale))
        if self.cross is not None and self.norm2 is not None and context is not None:
            x = x + self.cross(self.norm2(x), context)
        return x + gate2.unsqueeze(1) * self.ffn(modulated(self.norm3(x), shift2, scale2))


@final
class Bridge(nn.Module):
    """Norm and linear map between the width of the mixer and that of the backbone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(inputs, eps=EPS), nn.Linear(inputs, outputs, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(self.norm(x))


@final
class Last(nn.Module):
    """adaLN, then a linear map to the pixels of a patch that starts at 0."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width, eps=EPS), nn.Linear(width, pixels)
        self.modulation = _modulation(width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(modulated(self.norm(x), *self.modulation(condition).chunk(2, -1)))


class Conditioner(nn.Module, ABC):
    """y -> (a vector for each sample, tokens for the cross attention or None). Raises BadInput for what is no y."""

    @abstractmethod
    def forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """(batch, ...) -> ((batch, width), (batch, others, width) or None)."""

    @abstractmethod
    def dropped(self, y: Tensor) -> Tensor:
        """The y of no condition, of the same shape."""


def two(inputs: int, width: int) -> tuple[nn.Linear, nn.GELU, nn.Linear]:
    """Two linear maps with GELU between, small at first."""
    first, second = nn.Linear(inputs, width), nn.Linear(width, width)
    for linear in (first, second):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return first, nn.GELU(approximate="tanh"), second


@final
class DiT(nn.Module):
    """F(x, c_noise, condition): images (batch, channels, height, width) in, the same out. `trunk` is the deferred mask.

    shape: (channels, height, width). interpolation: 2 puts the positions of a finer grid where a coarser one's were.
    Raises BadInput for a patch that does not divide the image and images of another shape.
    """

    positions: Tensor
    waves: Tensor

    def __init__(
        self, shape: tuple[int, int, int], patch: int, width: int, conditioner: Conditioner, trunk: DeferredMask,
        *, interpolation: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, rows, columns = sides(torch.empty(1, *shape), patch)[1:]
        self.shape, self.patch, self.grid = shape, patch, (rows // patch, columns // patch)
        self.inlet = nn.Linear(channels * patch * patch, width)
        self.time = nn.Sequential(*two(2 * FREQUENCIES, width))
        self.conditioner, self.trunk = conditioner, trunk
        nn.init.xavier_uniform_(self.inlet.weight)
        nn.init.zeros_(self.inlet.bias)
        self.register_buffer("positions", positions(self.grid, width, interpolation), persistent=False)
        self.register_buffer("waves", 10000.0 ** (-torch.arange(FREQUENCIES) / FREQUENCIES), persistent=False)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(
        self, x: Tensor, noise: Tensor, y: Tensor, *, rng: torch.Generator | None = None, mask: Mask | None = None
    ) -> tuple[Tensor, Mask | None]:
        """x (batch, channels, height, width), noise = c_noise (batch,) -> (the same shape as x, the mask or None)."""
        if tuple(x.shape[1:]) != self.shape:
            raise BadInput(f"this model was made for images of {self.shape}, got a batch of {tuple(x.shape)}")
        angle = noise[:, None] * self.waves
        vector, context = self.conditioner(y)
        condition = self.time(torch.cat([angle.cos(), angle.sin()], 1)) + vector
        hidden = self.inlet(patches(x, self.patch)) + self.positions
        out, mask = self.trunk(hidden, condition, context, rng=rng, mask=mask)
        return unpatched(out, self.patch, self.grid), mask


def positions(grid: tuple[int, int], width: int, interpolation: float = 1.0) -> Tensor:
    """Fixed sine and cosine positions, (rows * columns, width): half of the width for the column, half for the row."""
    if width % 4:
        raise BadInput(f"two-dimensional sine positions need a width that 4 divides, got {width}")
    rates = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = (torch.arange(side)[:, None] / interpolation * rates for side in grid)
    row, column = (torch.cat([part.sin(), part.cos()], 1) for part in (row, column))
    return torch.cat([column.repeat(grid[0], 1), row.repeat_interleave(grid[1], 0)], 1)
