"""What the policies are held against: the best keys, blocks by chance, sinks and the latest keys, and a broken twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, Pieces, Sink, State, Window
from maskwright.attention.scores import best, force
from maskwright.core.select import generator


def row_keys(density: float, length: int) -> int:
    """Keys a row that keep `density` of all causal pairs, when shorter rows keep all: k (k + 1) / 2 + (n - k) k."""
    b = 2 * length + 1
    return max(1, round((b - sqrt(b * b - 4 * density * length * (length + 1))) / 2))


@dataclass(frozen=True)
class Chosen(AttentionMethod):
    """Baselines at an exact count: the keys of the greatest scores (oracle), or blocks by chance beside the forced ones."""

    keys: int = 32
    oracle: bool = True
    prompt: bool = True  # mask the prompt; else the decoded tokens
    block: int = 4

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if site.begins != self.prompt:
            return site.dense()
        unit = 1 if self.oracle else self.block
        rows = unit if self.prompt else 1
        at = torch.arange(site.offset, site.keys, rows)[:, None] // unit  # (row groups, 1): the block a group stands in
        block = torch.arange(-(-site.keys // unit))
        counts = (at[:, 0] + 1).clamp(max=max(3, round(self.keys / unit)) if not self.oracle else self.keys)
        if self.oracle:
            k = site.k.repeat_interleave(site.group, 1)
            score = force(site.q @ k.mT, block > block.max() + 1, block > at)
        else:
            rng = generator(site.seed, f"{site.layer} {site.keys}")
            score = torch.rand(site.batch, site.heads, len(at), len(block), generator=rng)
            score = force(score, (block == at) | (block == at - 1) | (block == 0), block > at)
        keep = best("chosen", site, score, counts)
        pieces = Pieces.from_blocks(keep, rows, unit, site.queries, site.keys)
        return KeyPlan(site.queries, site.keys, site.structure, pieces)


@dataclass(frozen=True)
class Recent(AttentionMethod):
    """Sinks and the latest keys for decoded tokens, behind a dense prompt."""

    keys: int = 32
    sinks: int = 4

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        if site.begins:
            return site.dense()
        return KeyPlan(site.queries, site.keys, Causal() & (Window(self.keys - self.sinks) | Sink(self.sinks)))


@dataclass(frozen=True)
class Negated(AttentionMethod):
    """The broken twin: the inner method asked with the negated queries, so that it keeps what scores lowest."""

    inner: AttentionMethod

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return self.inner.plan(replace(site, q=-site.q), state)
