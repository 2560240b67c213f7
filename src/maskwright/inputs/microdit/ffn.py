"""The two feed-forward parts of a block: SwiGLU, and experts that choose their tokens."""

from __future__ import annotations

from fractions import Fraction
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.pattern import Unstructured
from maskwright.core.select import select

_SAMPLE_AND_EXPERT = Unstructured((0, 1))


def rounded(size: Fraction, multiple: int) -> int:
    """`size` rounded down to a whole number, then up to a multiple."""
    return -(-int(size) // multiple) * multiple


@final
class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x), with 2/3 of the hidden size asked for, rounded up to `multiple`."""

    def __init__(self, width: int, hidden: Fraction, multiple: int) -> None:
        super().__init__()
        size = rounded(Fraction(2, 3) * int(hidden), multiple)
        self.w1, self.w2 = nn.Linear(width, size, bias=False), nn.Linear(width, size, bias=False)
        self.w3 = nn.Linear(size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

    def start(self, std: float, out: float) -> None:
        """Normal weights: `std` inside, `out` for what is added to the residual."""
        nn.init.trunc_normal_(self.w1.weight, std=std, a=-2 * std, b=2 * std)
        for last in (self.w2, self.w3):
            nn.init.trunc_normal_(last.weight, std=out, a=-2 * out, b=2 * out)


@final
class Experts(nn.Module):
    """Expert choice (arXiv 2202.09368): each expert takes the int(capacity * tokens / experts) tokens it is surest of.

    A token may go to none or to several; the output is the sum of probability * expert(token). The number follows the
    tokens present, so masking shrinks it too. Raises BadInput where it is 0, or more than there are tokens.
    """

    def __init__(self, width: int, hidden: Fraction, multiple: int, experts: int, capacity: float) -> None:
        super().__init__()
        self.experts, self.capacity = experts, Fraction(repr(float(capacity)))
        size = rounded(hidden, multiple)
        self.gate = nn.Linear(width, experts, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.empty(experts, width, size)), nn.Parameter(torch.empty(experts, size, width))

    def count(self, tokens: int) -> int:
        """Tokens each expert takes of a sample. Exact: no float product."""
        taken = int(self.capacity * tokens / self.experts)
        if not 1 <= taken <= tokens:
            told = f"{self.experts} experts of capacity {float(self.capacity):g} would take {taken} of {tokens} tokens each"
            raise BadInput(f"{told}; at least 1 and at most all are needed")
        return taken

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        taken = self.count(tokens)
        chance = self.gate(x).softmax(-1).mT  # (batch, experts, tokens)
        chosen = select(chance.detach(), _SAMPLE_AND_EXPERT, taken).keep
        index = chosen.nonzero()[:, 2].view(batch, self.experts, taken)
        wide = index.flatten(1).unsqueeze(-1).expand(-1, -1, width)
        picked = x.gather(1, wide).view(batch, self.experts, taken, width)
        made = F.gelu(picked @ self.w1) @ self.w2 * chance.gather(2, index).unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(1, wide, made.flatten(1, 2))

    def start(self, std: float, out: float) -> None:
        """As SwiGlu's."""
        for weight in (self.gate.weight, self.w1):
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        nn.init.trunc_normal_(self.w2, std=out, a=-2 * out, b=2 * out)
