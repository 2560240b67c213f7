"""DMA's claim: the gate learns from the task's loss which keys hold something, and so recalls what a window loses."""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State, choose, use
from maskwright.attention.dma import Dma, convert
from maskwright.attention.dma.running import running_top
from maskwright.core.method import Claim, Effect, get
from maskwright.core.select import generator
from maskwright.lab.associative import IGNORE, Recall, RecallNet, right
from maskwright.lab.train import train

WINDOW, HEADS = 48, 4  # 16 pairs and 16 questions, and room for 16 of the 96 tokens of filler


@final
@dataclass(frozen=True)
class ByChance(AttentionMethod):
    """As many keys a row, whichever chance ranks first: the same for every text, another choice in every head."""

    window: int = WINDOW

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        rank = torch.rand(1, site.kv_heads, site.keys, generator=generator(site.seed, f"layer {site.layer}"))
        pieces = running_top(rank, self.window, site.queries)
        return KeyPlan(site.queries, site.keys, site.structure, pieces, offset=site.offset)


@final
@dataclass(frozen=True)
class Seen(AttentionMethod):
    """A method, and what its layers' last rows read."""

    inner: Dma = field(default_factory=Dma)
    reads: list[Tensor] = field(default_factory=list)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        plan = self.inner.plan(site, State())
        self.reads.append(plan.dense()[:, :, -1].float())  # (batch, kv_heads, keys)
        return plan


def _run(method: AttentionMethod | None, seed: int, scale: str, frozen: bool = False) -> dict[str, float]:
    full = scale == "full"
    impl = "auto" if choose(torch.empty(1, 1, 1, 16)).name == "cpu" else "reference"  # "gather" is for long sequences
    steps, batch, width = (300, 32, 64) if full else (3, 2, 16)
    task = Recall()
    net = RecallNet(task, width=width, heads=HEADS, seed=seed)
    gates = convert(net, seed=seed) if isinstance(method, Dma) else {}
    for gate in gates.values():
        gate.requires_grad_(not frozen)
    rule = method if method is not None else get("sliding_window")(window=task.length, sink=0)

    def inside(model: nn.Module, optimizer: object = None):  # type: ignore[no-untyped-def]
        return use(model, rule, impl=impl, seed=seed)

    train(net, task.draw(), steps=steps, batch=batch, lr=1e-2, optimizer="adamw", clip=1.0, warmup=20, seed=seed,
          context=inside)  # fmt: skip
    with inside(net):
        hit, back = right(net, task, 500 if full else 4, seed=10_000 + seed)
    figures = {"recall": float(hit.float().mean()), "far": float(hit[back >= WINDOW].float().mean())}
    return figures | (_kept(net, method, task, seed) if isinstance(method, Dma) else {})


def _kept(net: nn.Module, method: Dma, task: Recall, seed: int) -> dict[str, float]:
    """Share of the pairs, and of the filler, that the last row reads: mean over heads, and in the head with most; the
    greatest |a|."""
    x, y, _ = task.sample(64, generator(seed, "kept"))
    seen = Seen(method)
    with use(net, seen, impl="reference"), torch.no_grad():
        net(x)
    pair = x[..., 1] > 0
    filler = ~pair & (y == IGNORE)
    of_pairs, of_filler = (
        (seen.reads[0] * part[:, None]).sum((0, 2)) / part.sum() for part in (pair, filler)
    )  # (kv_heads,)
    scales = [value.abs().max() for name, value in net.state_dict().items() if name.endswith("dma_gate.a")]
    shares = {"pairs_kept": of_pairs.mean(), "filler_kept": of_filler.mean(), "pairs_kept_best_head": of_pairs.max()}
    shares["a"] = torch.stack(scales).max()
    return {name: float(share) for name, share in shares.items()}


def _arm(method: AttentionMethod | None, frozen: bool = False):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _run(method, seed, scale, frozen)


CLAIM = Claim(
    arms={
        "dense": _arm(None),
        "window": _arm(get("sliding_window")(window=WINDOW, sink=0)),
        "by_chance": _arm(ByChance()),
        "dma": _arm(Dma(window=WINDOW)),
        "one_list": _arm(Dma(window=WINDOW, per_query=False)),
        "frozen_gate": _arm(Dma(window=WINDOW), frozen=True),
    },
    method="dma",
    twin="frozen_gate",
    effects=(
        Effect("recalls as dense, less 5 points", "dma", "dense", "recall", margin=-0.05),
        Effect("recalls 30 points more than a window of as many keys", "dma", "window", "recall", margin=0.30),
        Effect("recalls 30 points more than with its gate frozen", "dma", "frozen_gate", "recall", margin=0.30),
        Effect(
            "reads 30 points more of the pairs than with its gate frozen", "dma", "frozen_gate", "pairs_kept", margin=0.30
        ),
        Effect(
            "its best head reads 60 points more of the pairs", "dma", "frozen_gate", "pairs_kept_best_head", "quality", 0.6
        ),
        Effect("recalls more than keys drawn by chance", "dma", "by_chance", "recall", "quality"),
        Effect("one list for all rows recalls as much, less 5 points", "one_list", "dma", "recall", "quality", -0.05),
    ),
    seeds=(0, 1, 2),
    paper="80M to 1.7B: lower perplexity than dense, windows and native sparse attention; best at multi-query recall",
    trains=True,
)
