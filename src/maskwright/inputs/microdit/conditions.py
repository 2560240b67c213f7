"""What a sample is conditioned on: a class, or the tokens a frozen text encoder made of its caption."""

from __future__ import annotations

from fractions import Fraction
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.inputs.microdit.dit import EPS, Attention, Conditioner, two
from maskwright.inputs.microdit.ffn import SwiGlu


@final
class Classes(Conditioner):
    """y (batch,) int64 in 0..classes-1, or -1 for none: one vector a sample, no tokens. None is the zero vector."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if y.ndim != 1 or y.dtype != torch.int64 or int(y.max()) >= self.table.num_embeddings or int(y.min()) < -1:
            told = f"(batch,) int64 in -1..{self.table.num_embeddings - 1}"
            raise BadInput(f"classes are {told}, got {y.dtype} of shape {tuple(y.shape)}, {y.min()} to {y.max()}")
        return torch.where((y >= 0).unsqueeze(1), self.table(y.clamp(min=0)), 0.0), None

    def dropped(self, y: Tensor) -> Tensor:
        return torch.full_like(y, -1)


@final
class Captions(Conditioner):
    """y (batch, length, inputs): encoded captions, zeros for none -> their mean through a map, and the tokens themselves.

    Norm and a two-layer map to `width`, one self-attention block, and a two-layer map of the mean.
    """

    def __init__(self, inputs: int, width: int, head: int, multiple: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.project = nn.Sequential(nn.LayerNorm(inputs, eps=EPS), *two(inputs, width))
        self.norm1, self.attention = nn.LayerNorm(width, eps=EPS), Attention(width, width, width // head)
        self.norm2, self.ffn = nn.LayerNorm(width, eps=EPS), SwiGlu(width, Fraction(4 * width), multiple)
        self.pooled = nn.Sequential(nn.LayerNorm(width, eps=EPS), *two(width, width))
        for part in (self.attention, self.ffn):
            part.start(0.02, 0.02)
        for last in (self.attention.out, self.ffn.w3):
            nn.init.zeros_(last.weight)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if y.ndim != 3 or y.shape[2] != self.inputs:
            raise BadInput(f"captions are (batch, length, {self.inputs}), got shape {tuple(y.shape)}")
        tokens = self.project(y)
        tokens = tokens + self.attention(self.norm1(tokens))
        tokens = tokens + self.ffn(self.norm2(tokens))
        return self.pooled(tokens.mean(1)), tokens

    def dropped(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)
