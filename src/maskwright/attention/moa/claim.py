"""MoA's claim: windows chosen per head by influence keep far facts that a uniform window of the same density loses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from maskwright.attention import AttentionMethod, use
from maskwright.attention.heads import HeadPlan, solve
from maskwright.attention.moa import Moa
from maskwright.attention.moa.profile import answered
from maskwright.attention.moa.search import Table, measure, weigh
from maskwright.core.method import Claim, Effect, get
from maskwright.lab.ask import accuracy
from maskwright.lab.decoder import llama
from maskwright.lab.made import made
from maskwright.lab.recall import key_value, needle
from maskwright.lab.text import python_chars
from maskwright.lab.train import char_rows

BLOCK, SINK = 8, 1
LENGTHS, UNSEEN, LONGEST = (128, 256), 384, 512  # profiled; to choose from the front; not looked at before the end
SHARES = (0.05, 0.15, 0.3, 0.5, 0.75)  # densities at which a single head's loss is measured
SMALL = ((64, 96), 112, 128)


def _lengths(scale: str) -> tuple[tuple[int, ...], int, int]:
    return (LENGTHS, UNSEEN, LONGEST) if scale == "full" else SMALL


@cache
def _model(seed: int, scale: str) -> Any:
    letters = len(python_chars().vocabulary)
    return (
        made("recall_lm", seed)
        if scale == "full"
        else llama(letters, layers=2, width=32, heads=2, kv_heads=2, hidden=32, seed=seed)
    )


@cache
def _told(seed: int, scale: str) -> dict[int, torch.Tensor]:
    """Prompts of training text that end in a question, answered by the dense model: half pairs, half needles."""
    lengths, unseen, _ = _lengths(scale)
    count, text, answer = (32 if scale == "full" else 2), python_chars().train, 3
    found = {}
    for n in (*lengths, unseen):
        asks = [make(n - answer, count, seed=100 + seed, text=text).prompt for make in (_pairs, needle)]
        found[n] = answered(_model(seed, scale), torch.cat(asks), n)
    return found


def _pairs(length: int, n: int, **told: Any) -> Any:
    return key_value(length, n, pairs=4 if length >= 96 else 1, **told)


@cache
def _table(seed: int, scale: str, betas: int = 9) -> Table:
    lengths, _, longest = _lengths(scale)
    told = _told(seed, scale)
    grid: dict[str, Any] = {"extend": longest, "block": BLOCK, "sink": SINK, "step": 4 * BLOCK}
    table = weigh(Moa, _model(seed, scale), told, dict.fromkeys(told, 3), lengths, batch=16, **grid)
    if betas == 1:  # constant windows: the rules without beta, whose density can only be held at the longest profiled length
        flat = [r for r, (_, beta) in enumerate(table.rules) if beta == 0]
        one = table.lengths[-1:]
        return Table(
            one, one[0], tuple(table.rules[r] for r in flat), table.loss[-1:][..., flat], table.cost[[-2, -2]][:, flat],
            table.heads, BLOCK, SINK,
        )  # fmt: skip
    return table


def _best(table: Table, density: float, seed: int, scale: str) -> HeadPlan:
    """The plan of the front that answers best at a length that was not profiled."""
    unseen = _lengths(scale)[1]
    plans = [
        table.plan(choice.rules) for choice in table.choose(density, at_most_rules=2, points=5 if scale == "full" else 2)
    ]
    ids = _told(seed, scale)[unseen]
    return min(plans, key=lambda plan: measure(_model(seed, scale), Moa(heads=plan), ids, 3, 16))


@cache
def _plan(arm: str, density: float, seed: int, scale: str) -> HeadPlan:
    table = _table(seed, scale, 1 if arm == "fixed" else 9)
    if arm == "random":
        _, layers, kv_heads, rules = table.loss.shape
        chance = np.random.default_rng(seed).random((layers * kv_heads, rules))
        cost = table.cost[:, None].repeat(layers * kv_heads, 1)
        found = solve(chance, cost, [(0.9 * density - 1e-9, density + 1e-9)] * len(cost))
        if found is None:
            raise ValueError("no random rules have this density")
        return table.plan(found.rules)
    if arm == "flipped":
        table = replace(table, loss=-table.loss)
    return _best(table, density, seed, scale)


def _rank(table: Table, seed: int, scale: str) -> float:
    """Rank correlation, over (key head, rule), of the predicted loss with the loss measured when that head alone has it."""
    length, model = table.lengths[-1], _model(seed, scale)
    ids = _told(seed, scale)[length]
    _, layers, kv_heads, rules = table.loss.shape
    whole = table.rules.index((0.0, 1.0))
    shares = table.cost[len(table.lengths) - 1]
    picked = sorted({int(np.abs(shares - want).argmin()) for want in SHARES[: None if scale == "full" else 2]})
    predicted, found = [], []
    for head in range(layers * kv_heads):
        for rule in picked:
            each = [rule if h == head else whole for h in range(layers * kv_heads)]
            predicted.append(table.loss[-1].reshape(-1, rules)[head, rule])
            found.append(measure(model, Moa(heads=table.plan(each)), ids, 3, 16))
    one, two = (np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (predicted, found))
    return float(np.corrcoef(one, two)[0, 1])


def _arm(arm: str):  # type: ignore[no-untyped-def]
    def run(seed: int, scale: str) -> dict[str, float]:
        model, (_, _, longest) = _model(seed, scale), _lengths(scale)
        figures: dict[str, float] = {}
        if arm == "dense":
            with use(model, Moa(density=1.0)):
                asked = _asked(model, scale)
            return {f"{name}_{percent}": value for percent in (50, 25) for name, value in asked.items()}
        for percent in (50, 25):
            density = percent / 100 if scale == "full" else 0.55
            if arm == "uniform":
                method: AttentionMethod = get("sliding_window")(
                    window=int(density * longest) - SINK * BLOCK, sink=SINK * BLOCK
                )
            else:
                method = Moa(heads=_plan(arm, density, seed, scale))
            with use(model, method):
                figures |= {f"{name}_{percent}": value for name, value in _asked(model, scale).items()}
        if arm in ("moa", "flipped"):
            table = _table(seed, scale)
            figures["rank"] = _rank(replace(table, loss=-table.loss) if arm == "flipped" else table, seed, scale)
        return figures

    return run


def _unrelated(seed: int, scale: str) -> dict[str, float]:
    """A prediction that has nothing to do with what is measured."""
    return {"rank": 0.0}


@torch.no_grad()
def _asked(model: Any, scale: str) -> dict[str, float]:
    longest, full = _lengths(scale)[2], scale == "full"
    count = 256 if full else 4
    x, y = char_rows(python_chars().val, longest, 64 if full else 2)
    losses = [
        float(F.cross_entropy(model(input_ids=a, use_cache=False).logits.flatten(0, 1), b.flatten()))
        for a, b in zip(x.split(16), y.split(16), strict=True)
    ]
    asked = {"recall": key_value(longest, count, pairs=8, seed=5), "needle": needle(longest, count, seed=5)}
    return {"loss": sum(losses) / len(losses)} | {name: accuracy(model, told, "decode") for name, told in asked.items()}


CLAIM = Claim(
    arms={name: _arm(name) for name in ("dense", "uniform", "moa", "fixed", "random", "flipped")}
    | {"unrelated": _unrelated},
    method="moa",
    twin="flipped",
    effects=(
        Effect("the predicted loss of a head's rule ranks the measured one (> 0.6)", "moa", "unrelated", "rank", margin=0.6),
        Effect("density 0.5: recall 15 points above a uniform window", "moa", "uniform", "recall_50", margin=0.15),
        Effect("density 0.5: needles 15 points above a uniform window", "moa", "uniform", "needle_50", "quality", 0.15),
        Effect("density 0.25: recall 15 points above a uniform window", "moa", "uniform", "recall_25", "quality", 0.15),
        Effect("density 0.5: recall above random rules", "moa", "random", "recall_50", "quality"),
        Effect(
            "density 0.5: recall above constant windows at a length beyond the profile",
            "moa",
            "fixed",
            "recall_50",
            "quality",
        ),
        Effect("density 0.5: recall within 5 points of dense", "moa", "dense", "recall_50", "quality", -0.05),
        Effect(
            "density 0.5: text loss no higher than a uniform window's", "moa", "uniform", "loss_50", "quality", -0.01, False
        ),
    ),
    seeds=(0, 1, 2),
    paper="Vicuna-7B, half the density, 8k: retrieval .97 against .16 for StreamingLLM",
    needs=("lab:recall_lm",),
)
