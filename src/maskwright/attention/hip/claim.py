"""HiP's claim: the tree search finds most of what exact top-k finds, the more the smoother the keys, and keeps far facts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, State, use
from maskwright.attention.hip import Hip
from maskwright.core.method import Claim, Effect, get
from maskwright.core.select import generator
from maskwright.lab.ask import accuracy
from maskwright.lab.decoder import llama
from maskwright.lab.made import made
from maskwright.lab.recall import key_value, needle
from maskwright.lab.text import python_chars
from maskwright.lab.train import char_rows

RHOS = (0.0, 0.5, 0.9, 0.99)
BLOCK_Q, BLOCK_K, WINDOW, SINK = 16, 2, 32, 4


@dataclass(frozen=True)
class Flipped(AttentionMethod):
    """The broken twin: the search keeps the segments whose score is smallest."""

    inner: Hip = field(default_factory=Hip)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return self.inner.plan(replace(site, q=-site.q), state)


@dataclass(frozen=True)
class AfterFirst(AttentionMethod):
    """A method on every layer but the first, as HiP's dense layer gives it."""

    inner: AttentionMethod = field(default_factory=Hip)

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return self.inner.plan(site, state) if site.layer else site.dense()


def _chance(site: AttentionSite, n: int, seed: int) -> torch.Tensor:
    """Random key blocks: (heads, keys) bool, n of them for each head."""
    order = torch.rand(site.heads, -(-site.keys // BLOCK_K), generator=generator(seed, "chance")).argsort(1)
    keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep.repeat_interleave(BLOCK_K, 1)[:, : site.keys]


def _masses(arm: str, seed: int, length: int, k: int) -> dict[str, float]:
    """Mean share of the attention of single queries that falls on the kept keys: keys are AR(1) along the sequence."""
    figures, rises = {}, []
    for rho in RHOS:
        rng = generator(seed, f"ar {rho}")
        noise = torch.randn(20, length, 32, generator=rng)
        keys = [noise[:, 0]]
        for t in range(1, length):
            keys.append(rho * keys[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
        rows, q = torch.stack(keys, 1)[None], torch.randn(1, 20, 1, 32, generator=rng)
        site = AttentionSite(0, 1, q, rows, rows, 32**-0.5, Causal(), length - 1, False)
        share = (2 * 32**-0.5 * q @ rows.mT).softmax(-1)[0, :, 0]  # sharpness 2
        bare = Hip(mask_k=k, block_q=1, block_k=BLOCK_K, window=0, sink=0, dense_layers=0)

        def mass(method: AttentionMethod, site: AttentionSite = site, share: torch.Tensor = share) -> float:
            return float((share * method.plan(site, State()).dense()[0, :, 0]).sum(-1).mean())

        exact = mass(replace(bare, representative="max"))
        if arm == "chance":
            found = float((share * _chance(site, k // BLOCK_K, seed)).sum(-1).mean())
        else:
            found = exact if arm == "exact" else mass(Flipped(bare) if arm == "flipped" else bare)
        figures[f"mass_{rho:g}"] = found
        rises.append(found / exact)
    return figures | {"share_rise": rises[-1] - rises[0]}


def _method(arm: str, k: int) -> AttentionMethod | None:
    hip = Hip(
        mask_k=k, block_q=BLOCK_Q, block_k=BLOCK_K, window=WINDOW, sink=SINK, dense_layers=1, judges=BLOCK_Q, refresh=1
    )
    if arm == "window":
        # HiP's rows read k searched keys, the sink, and their window rounded up to the block of rows: as many here.
        return AfterFirst(get("sliding_window")(window=k + WINDOW + BLOCK_Q - 1, sink=SINK))
    found: dict[str, AttentionMethod] = {
        "hip": hip, "exact": replace(hip, representative="max"), "flipped": Flipped(hip),
    }  # fmt: skip
    return found.get(arm)


@cache
def _data(scale: str) -> dict[str, Any]:
    full = scale == "full"
    length, count, rows = (512, 256, 64) if full else (96, 4, 2)
    asks = {"needle": needle(length, count, seed=4), "key_value": key_value(length, count, pairs=8 if full else 2, seed=4)}
    return {**asks, "text": char_rows(python_chars().val, 512 if full else 96, rows)}


def _arm(arm: str):  # type: ignore[no-untyped-def]
    def run(seed: int, scale: str) -> dict[str, float]:
        full = scale == "full"
        figures = {} if arm in ("dense", "window") else _masses(arm, seed, *((2048, 128) if full else (128, 16)))
        if arm == "chance":
            return figures
        letters = len(python_chars().vocabulary)
        model: Any = (
            made("recall_lm", seed)
            if full
            else llama(letters, layers=2, width=32, heads=2, kv_heads=1, hidden=32, seed=seed)
        )
        method = _method(arm, 64 if full else 16)
        if method is None:
            return figures | _asked(model, scale)
        with use(model, method):
            return figures | _asked(model, scale)

    return run


@torch.no_grad()
def _asked(model: Any, scale: str) -> dict[str, float]:
    data = _data(scale)
    x, y = data["text"]
    losses = [
        float(F.cross_entropy(model(input_ids=x[i : i + 16], use_cache=False).logits.flatten(0, 1), y[i : i + 16].flatten()))
        for i in range(0, len(x), 16)
    ]
    asked = {name: accuracy(model, data[name], "decode") for name in ("needle", "key_value")}
    return {"loss": sum(losses) / len(losses), **asked}


CLAIM = Claim(
    arms={name: _arm(name) for name in ("dense", "exact", "hip", "chance", "window", "flipped")},
    method="hip",
    twin="flipped",
    effects=(
        *(
            Effect(f"keys of correlation {rho:g}: more attention found than by chance", "hip", "chance", f"mass_{rho:g}")
            for rho in RHOS
        ),
        Effect("the share of exact top-k's attention rises with the correlation", "hip", "exact", "share_rise", margin=0.1),
        Effect(
            "key-value needles: at least 20 points above a window of the same budget",
            "hip",
            "window",
            "key_value",
            margin=0.2,
        ),
        Effect("sentence needles: at least 20 points above that window", "hip", "window", "needle", "quality", 0.2),
        Effect("text: lower loss than a window of the same budget", "hip", "window", "loss", "quality", higher=False),
        Effect("text: exact top-k loses no more than HiP", "exact", "hip", "loss", "quality", -0.005, higher=False),
        Effect("text: at most 0.05 nats above dense", "hip", "dense", "loss", "quality", -0.05, higher=False),
        Effect("key-value needles: within 5 points of dense", "hip", "dense", "key_value", "quality", -0.05),
        Effect("sentence needles: exact top-k within 5 points of dense", "exact", "dense", "needle", "quality", -0.05),
    ),
    seeds=(0, 1, 2),
    paper="LongBench: 95-97% of dense at 8B, StreamingLLM clearly lower; passkeys near 100, StreamingLLM only in its window",
    needs=("lab:recall_lm",),
)
