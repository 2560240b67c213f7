"""Vision transformers that run on some of their tokens: what is asked of one, two that can, and the light decoder.

A masked-modelling step is cheap because hidden tokens never enter the encoder's blocks (MAE, arXiv 2111.06377).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.apply import Visible, visible
from maskwright.inputs.patches import patches, sides


@runtime_checkable
class TokenEncoder(Protocol):
    """An image encoder in three steps. Its positions are added in `embed`, so that `blocks` takes any of the tokens."""

    @property
    def patch(self) -> int:
        """Pixels on a side of a token's patch."""

    @property
    def width(self) -> int:
        """Features of a token."""

    def embed(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, width), one a patch, row by row."""

    def blocks(self, tokens: Tensor) -> Tensor:
        """(batch, some tokens, width) -> the same shape; no token that is not given has any part in it."""

    def norm(self, tokens: Tensor) -> Tensor:
        """The last norm, token by token."""


def encoder_of(model: nn.Module) -> TokenEncoder:
    """The model's three steps: its own, or those of a transformers ViTModel (or a model with one as `.vit`).

    Raises BadInput naming the class of a model that has neither.
    """
    if isinstance(model, TokenEncoder):
        return model
    inner = getattr(model, "vit", model)
    if type(inner).__name__ == "ViTModel":
        return HfVit(inner)
    asked = "embed, blocks, norm, patch and width (inputs.vit.TokenEncoder), or a transformers ViTModel"
    raise BadInput(f"{type(model).__name__} cannot run on a part of its tokens: it needs {asked}")


@final
@dataclass(frozen=True, eq=False)
class HfVit:
    """A transformers ViTModel as a TokenEncoder. Its class token goes through the blocks with every subset, unseen here.

    It holds the model, not copies: training it trains the model, and `blocks` over all tokens is the model's forward.
    """

    model: Any

    @property
    def patch(self) -> int:
        return int(self._size(self.model.config.patch_size, "patch_size"))

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def _size(self, side: Any, name: str) -> int:
        pair = (side, side) if isinstance(side, int) else tuple(side)
        if pair[0] != pair[1]:
            raise BadInput(f"ViTModel: patches are square here, {name} is {pair}")
        return int(pair[0])

    def embed(self, images: Tensor) -> Tensor:
        inlet = self.model.embeddings
        side = self.model.config.image_size
        _fits("ViTModel", images, self.model.config.num_channels, (side, side) if isinstance(side, int) else tuple(side))
        return inlet.dropout(inlet.patch_embeddings(images) + inlet.position_embeddings[:, 1:])

    def blocks(self, tokens: Tensor) -> Tensor:
        inlet = self.model.embeddings
        first = inlet.dropout(inlet.cls_token + inlet.position_embeddings[:, :1])
        hidden = torch.cat([first.expand(len(tokens), -1, -1), tokens], 1)
        layers = self.model.layers if hasattr(self.model, "layers") else self.model.encoder.layer
        for layer in layers:
            out = layer(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden[:, 1:]

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.layernorm(tokens)


class Block(nn.Module):
    """Pre-norm attention and a two-layer map four times as wide, each added to its input. (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


@final
class SmallVit(nn.Module):
    """A plain vision transformer, a TokenEncoder: (batch, channels, *size) -> (batch, width), the mean normed token.

    Fixed sine and cosine positions, no class token. size: pixels, one number or (height, width).
    Raises BadInput where the patch does not divide the image, or the heads or 4 the width.
    """

    positions: Tensor

    def __init__(
        self, size: int | tuple[int, int] = 32, patch: int = 4, *, channels: int = 3, width: int = 128, layers: int = 4,
        heads: int = 4, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.patch, self.width, self.channels = patch, width, channels
        sides(torch.empty(1, channels, *self.size), patch)
        with torch.random.fork_rng(devices=[]):
            self.inlet = nn.Linear(channels * patch * patch, width)
            self.layers = _stack(width, layers, heads, "SmallVit")
            self.last = nn.LayerNorm(width)
        grid = (self.size[0] // patch, self.size[1] // patch)
        self.register_buffer("positions", sincos(grid, width), persistent=False)
        initialise(self, generator(seed, "small_vit"))

    def embed(self, images: Tensor) -> Tensor:
        _fits("SmallVit", images, self.channels, self.size)
        return self.inlet(patches(images, self.patch)) + self.positions

    def blocks(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def norm(self, tokens: Tensor) -> Tensor:
        return self.last(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(images))).mean(1)


@final
class Decoder(nn.Module):
    """MAE's decoder: a narrower map, one learned token at every hidden place, fixed positions, blocks, norm, and a head.

    Visible (batch, kept, inputs) -> (batch, tokens, outputs). Raises BadInput for heads or 4 that do not divide `width`.
    """

    positions: Tensor

    def __init__(
        self, inputs: int, outputs: int, grid: tuple[int, int], *, width: int, layers: int, heads: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.inlet = nn.Linear(inputs, width)
            self.layers = _stack(width, layers, heads, "the decoder")
            self.last, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos(grid, width), persistent=False)
        initialise(self, rng)
        nn.init.normal_(self.mask_token, std=0.02, generator=rng)

    def forward(self, seen: Visible) -> Tensor:
        rows = seen.put_back(self.inlet(seen.values), self.mask_token) + self.positions
        for layer in self.layers:
            rows = layer(rows)
        return self.head(self.last(rows))


def encode(encoder: TokenEncoder, tokens: Tensor, mask: Mask) -> Visible:
    """Blocks and norm over the kept tokens alone. tokens: `embed`'s; mask: (batch, tokens) or (batch, rows, columns).

    Raises BadInput where the samples keep different numbers of tokens, and for NaN on kept ones.
    """
    seen = visible(tokens, mask)
    return replace(seen, values=encoder.norm(encoder.blocks(seen.values)))


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (rows * columns, width): half the features for the row, half for the column; sines, then cosines.

    Raises BadInput for a width that 4 does not divide.
    """
    if width % 4:
        raise BadInput(f"sine and cosine positions in two directions need a width divisible by 4, got {width}")
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid)).view(-1, 2)
    angle = place.unsqueeze(-1) * rate
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1).float()


def initialise(module: nn.Module, rng: torch.Generator) -> None:
    """Linear maps anew: Glorot-uniform weights, biases 0, as MAE does. Norms are left as they are."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=rng)
            nn.init.zeros_(part.bias)


def _stack(width: int, layers: int, heads: int, what: str) -> nn.ModuleList:
    if layers < 1 or heads < 1 or width < 1 or width % heads:
        raise BadInput(f"{what} needs layers and heads of at least 1, heads dividing the width: {layers}, {heads}, {width}")
    return nn.ModuleList(Block(width, heads) for _ in range(layers))


def _fits(what: str, images: Tensor, channels: int, size: tuple[int, ...]) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (channels, *size):
        raise BadInput(f"{what} takes images (batch, {channels}, {size[0]}, {size[1]}), got shape {tuple(images.shape)}")
