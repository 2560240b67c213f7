"""Small networks made here: the same weights for the same seed, whatever was drawn before.

Transformers keep their blocks in an `nn.ModuleList` called as a chain, hidden state first, so that a walk block by
block works on them as on a packaged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generator as from `seed`; outside, its state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def dense_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(width)) v on (batch, heads, length, width)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


class Mlp(nn.Sequential):
    """Linear layers with ReLU between: sizes (inputs, hidden, ..., classes). Takes any shape, flattened per sample."""

    def __init__(self, sizes: Sequence[int], *, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> None:
        if len(sizes) < 2:
            raise ValueError(f"Mlp needs at least an input and an output size, not {tuple(sizes)}")
        with seeded(seed):
            layers: list[nn.Module] = [nn.Flatten()]
            for index, (inputs, outputs) in enumerate(pairwise(sizes)):
                layers += [activation()] if index else []
                layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet8(nn.Module):
    """Stem, three residual blocks (width, 2 width, 4 width), mean pool, `fc`: (batch, channels, h, w) -> logits."""

    def __init__(self, width: int = 16, *, classes: int = 10, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(width)
            widths = (width, width, 2 * width, 4 * width)
            strides = (1, 2, 2)
            self.blocks = nn.ModuleList(_Residual(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False))
            self.fc = nn.Linear(4 * width, classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head attention with its four maps apart; `attend` may be replaced by another attention function."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attend: Attend = dense_attention

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.query, self.key, self.value)
        query, key, value = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in maps)
        mixed = self.attend(query, key, value, self.causal)  # (batch, heads, length, width / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: (batch, length, width) -> the same."""

    def __init__(self, width: int, heads: int, *, causal: bool, activation: type[nn.Module], hidden: int = 0) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class Transformer(nn.Module):
    """What CharLM and Vit share: positions, blocks in a chain, a last norm and a head. Not used by itself."""

    def __init__(
        self, inlet: nn.Module, length: int, layers: int, width: int, heads: int, outputs: int, *,
        causal: bool, activation: type[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.inlet = inlet
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=causal, activation=activation) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5 / 2)
                nn.init.zeros_(module.bias)

    def run(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) -> the normed last hidden state."""
        hidden = hidden + self.positions[: hidden.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class CharLM(Transformer):
    """Causal character model: (batch, length <= context) int64 -> logits (batch, length, vocabulary)."""

    def __init__(
        self, vocabulary: int, *, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128,
        activation: type[nn.Module] = nn.GELU, seed: int = 0,
    ) -> None:  # fmt: skip
        with seeded(seed):
            inlet = nn.Embedding(vocabulary, width)
            nn.init.normal_(inlet.weight, std=0.02)
            super().__init__(inlet, context, layers, width, heads, vocabulary, causal=True, activation=activation)
        self.context = context

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > self.context:
            raise ValueError(f"{ids.shape[-1]} characters do not fit a context of {self.context}")
        return self.head(self.run(self.inlet(ids)))


class Vit(Transformer):
    """Small vision transformer: (batch, channels, size, size) -> logits; patches by a linear map, mean pooled."""

    def __init__(
        self, size: int = 28, patch: int = 4, *, channels: int = 1, layers: int = 4, width: int = 64, heads: int = 4,
        classes: int = 10, activation: type[nn.Module] = nn.GELU, seed: int = 0,
    ) -> None:  # fmt: skip
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch}")
        with seeded(seed):
            inlet = nn.Linear(channels * patch * patch, width)
            length = (size // patch) ** 2
            super().__init__(inlet, length, layers, width, heads, classes, causal=False, activation=activation)
        self.patch = patch

    def patches(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, h/p * w/p, channels * p * p), row by row."""
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inlet(self.patches(x))).mean(1))
