"""DMA: a learned gate on the values says which keys are read, and is added to their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Pieces, Rows, State
from maskwright.attention.dma.gate import NAME
from maskwright.attention.dma.running import best_first, running_top, smoothed
from maskwright.attention.method import Direction
from maskwright.core.errors import BadInput

_ROWS = 64  # rows a list is cut for, so that it is read no further than they may see
_CHECK = 8  # values compared before scores are reused: a cache whose samples were reordered keeps its state's order


@final
@dataclass(frozen=True)
class Dma(AttentionMethod):
    """Logits q k' / sqrt(width) + s over the keys that s keeps, s = a softplus(W v) (arXiv 2508.02124).

    `per_query`: row i reads the `window` best of its own keys 0 .. i, of equal ones the most recent; else one list of
    the `window` best keys serves all rows, whose choice looks ahead in training. `relu`: the keys with s > 0 instead
    of the best. Texts of at most `window` keys are read whole. `exp`: s = exp(a softplus(W v)), the paper's form.
    `smooth` b > 0: blocks of b keys are read whole where more than half of their keys are kept, else not at all.
    Gates come from `convert(model)`; a module without one reads as with a = 0, its last `window` keys.
    Differs: a row whose list holds none of its keys reads its own key; a row's last block of `smooth` counts up to the
    row, so that decoding equals the row; W has no bias. Raises BadInput for settings that cannot be.
    """

    window: int = 2048
    per_query: bool = True
    relu: bool = False
    exp: bool = False
    smooth: int = 0
    direction: ClassVar[Direction] = "causal"

    def __post_init__(self) -> None:
        if self.window < 1 or self.smooth < 0:
            raise BadInput(f"dma needs window >= 1 and smooth >= 0, got {self.window} and {self.smooth}")

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        s = self.scores(site, state)
        bias = s.repeat_interleave(site.group, 1)[:, :, None] if hasattr(site.module, NAME) else None
        if site.keys <= self.window or site.evicted:
            return KeyPlan(site.queries, site.keys, site.structure, bias=bias, offset=site.offset)
        rank = s.detach()
        if site.first is not None:  # padding is read last
            rank = rank.masked_fill((torch.arange(site.keys) < site.first[:, None])[:, None], float("-inf"))
        if self.per_query and not self.relu:
            pieces = running_top(rank, self.window, site.queries, self.smooth)
            return KeyPlan(site.queries, site.keys, site.structure, pieces, bias, offset=site.offset)
        listed, rows = self.listed(rank), torch.arange(site.queries) + site.offset
        first = listed.int().argmax(-1).masked_fill(~listed.any(-1), site.keys)[..., None]  # (batch, kv_heads, 1)
        alone = rows < first
        own = torch.stack([torch.where(alone, rows, first), (rows + 1).expand_as(alone)], -1)[..., None, :]
        structure = Rows(own.repeat_interleave(site.group, 1), site.offset)
        listed = listed | (torch.arange(site.keys) < first)
        pieces = Pieces.from_keep(listed[:, :, None], -(-site.queries // _ROWS) * _ROWS, site.queries).split(_ROWS)
        seen = structure if site.structure is None else site.structure & structure
        return KeyPlan(site.queries, site.keys, seen, pieces, bias, offset=site.offset)

    def scores(self, site: AttentionSite, state: State) -> Tensor:
        """s (batch, kv_heads, keys), with gradient to the gate and v. In decoding only new keys are scored.

        Raises BadInput for a score that is not a number.
        """
        known, last = state.get("scores"), state.get("values")
        begin = 0
        if known is not None and last is not None and not torch.is_grad_enabled():
            begin = min(known.shape[2], site.offset)
            here = site.v[:, :, : known.shape[2]][:, :, -_CHECK:]
            if begin < known.shape[2] or not torch.equal(here, last):
                begin = 0
        v, gate = site.v[:, :, begin:], getattr(site.module, NAME, None)
        s = v.new_zeros(v.shape[:3]) if gate is None else gate(v)
        s = s.exp() if self.exp and gate is not None else s
        if bool(s.isnan().any()):
            raise BadInput(f"dma, layer {site.layer}: the gate's scores of values {tuple(site.v.shape)} hold NaN")
        s = torch.cat([known[:, :, :begin], s], 2) if begin and known is not None else s
        if not torch.is_grad_enabled():
            state["scores"], state["values"] = s, site.v[:, :, -_CHECK:].clone()
        return s

    def listed(self, rank: Tensor) -> Tensor:
        """The keys that serve all rows. rank (batch, kv_heads, keys) -> bool of the same shape."""
        keep = rank > 0
        if not self.relu:
            best = best_first(rank)[..., : self.window]
            keep = torch.zeros_like(keep).scatter_(-1, best, True)
        if not self.smooth:
            return keep
        return smoothed(keep[..., None, :], torch.tensor([rank.shape[-1] - 1]), self.smooth)[..., 0, :]
