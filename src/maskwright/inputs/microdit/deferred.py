"""DeferredMask: light blocks over all tokens, then the mask, then the costly blocks over the kept ones. Any token model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.apply import visible
from maskwright.inputs.samplers import Exact


@final
class DeferredMask(nn.Module):
    """`mixer` sees all tokens, `blocks` only the kept ones; what they give is put back, zero tokens elsewhere.

    A kept token has heard of the dropped ones before they go, so the costly blocks learn from few tokens without losing
    the rest (arXiv 2407.15811; an empty mixer is the naive form). Each part is a chain of modules called
    as block(tokens, *args, **kwargs); tokens are (batch, tokens, width), and a block may change the width, so a last
    block that makes the outputs belongs into `blocks`. density is the share kept. The mask is drawn anew at each call in
    training mode that gives a generator; without one, and in eval mode, every token goes through and nothing is drawn.
    Raises BadInput for a density outside (0, 1].
    """

    def __init__(self, mixer: Iterable[nn.Module], blocks: Iterable[nn.Module], density: float = 0.25) -> None:
        super().__init__()
        self.mixer, self.blocks = nn.ModuleList(mixer), nn.ModuleList(blocks)
        self.density = density

    @property
    def density(self) -> float:
        """Share of the tokens the blocks see while training; 1 for the unmasked stage."""
        return self._sampler.density

    @density.setter
    def density(self, value: float) -> None:
        self._sampler = Exact(value)

    def draw(self, batch: int, tokens: int, rng: torch.Generator) -> Mask | None:
        """A mask (batch, tokens) with whole(density, tokens) kept in each sample; None where all stay."""
        return self._sampler((batch, tokens), rng=rng) if self.density < 1 else None

    def forward(
        self, x: Tensor, *args: Any, rng: torch.Generator | None = None, mask: Mask | None = None,
        along: Mapping[str, Tensor] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Mask | None]:  # fmt: skip
        """(batch, tokens, width) -> ((batch, tokens, width of the last block), the mask or None where all stay).

        mask: use this one instead of drawing. along: further keywords that hold one row a token, (batch, tokens, ...)
        with three dims; the blocks get the kept rows. Raises BadInput for a mask in eval mode, one that does not fit, a
        density that keeps no token, and NaN in a kept token.
        """
        if mask is not None and not self.training:
            raise BadInput(f"a mask of shape {mask.shape} in eval mode: masking is for training, sampling needs all tokens")
        if mask is None and rng is not None and self.training:
            mask = self.draw(x.shape[0], x.shape[1], rng)
        rows = dict(along or {})
        for block in self.mixer:
            x = block(x, *args, **rows, **kwargs)
        if mask is None:
            for block in self.blocks:
                x = block(x, *args, **rows, **kwargs)
            return x, None
        seen = visible(x, mask)
        rows, x = {name: visible(row, mask).values for name, row in rows.items()}, seen.values
        for block in self.blocks:
            x = block(x, *args, **rows, **kwargs)
        return seen.put_back(x), mask
