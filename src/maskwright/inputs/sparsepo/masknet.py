"""The mask network: the reference's hidden states before a token -> the token's weight, at least 0, exactly 0 for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput


@final
class TokenMaskNet(nn.Module):
    """m_t = relu(sum_l c_l relu(w_l . LN(h_l,t) + b_l)), one shared LayerNorm, dropout behind either relu.

    `layers` sequences of hidden states (n, tokens, width) -> (n, tokens). inner: 0, or the width of a second linear
    layer before w_l (200 in the paper's "ml" masks). start: the weight of every token before training.
    arXiv 2410.05102, section 3.2; the code's SimpleMaskAllLayers.

    Differs: the code starts every linear layer at random, so about half of the layers count against the mask and it may
    be 0 everywhere, which no gradient mends. Here w_l = 0, b_l = start and c_l = 1 / layers: every token begins with the
    same weight. With start = 1 the loss begins as TDPO1's, and where the mask goes is learned, not drawn.
    """

    def __init__(
        self, width: int, layers: int, *, inner: int = 0, dropout: float = 0.01, start: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        if width < 1 or layers < 1 or inner < 0 or not 0 <= dropout < 1 or not 0 < start < float("inf"):
            told = f"width {width}, layers {layers}, inner {inner}, dropout {dropout}, start {start}"
            raise BadInput(f"a mask network needs positive sizes and start, and dropout in [0, 1), got {told}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
            self.inner = nn.ModuleList(nn.Linear(width, inner) if inner else nn.Identity() for _ in range(layers))
            self.layers = nn.ModuleList(nn.Linear(inner or width, 1) for _ in range(layers))
            self.mixer = nn.Linear(layers, 1, bias=False)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.zero_()  # type: ignore[operator]
                layer.bias.fill_(start)  # type: ignore[operator]
            self.mixer.weight.fill_(1 / layers)

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """One tensor of hidden states a layer -> weights. Raises BadInput for another number of layers."""
        if len(hidden) != len(self.layers):
            raise BadInput(f"a mask network over {len(self.layers)} layers was given the states of {len(hidden)}")
        each = []
        for states, inner, layer in zip(hidden, self.inner, self.layers, strict=True):
            normed = self.norm(states.to(self.mixer.weight.dtype))
            within = normed if isinstance(inner, nn.Identity) else self.drop(inner(normed))
            each.append(self.drop(torch.relu(layer(within))))
        return self.drop(torch.relu(self.mixer(torch.cat(each, -1)))).squeeze(-1)
