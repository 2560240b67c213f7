"""DSnoT's claim: swaps lower each row's expected output error at the same count. Gated on |delta|."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskwright.core.mask import Mask
from maskwright.core.method import Claim, Effect, get
from maskwright.core.pattern import Unstructured
from maskwright.core.score import force
from maskwright.core.select import draw, generator, select
from maskwright.lab.made import made
from maskwright.lab.models import CharLM
from maskwright.lab.text import python_chars
from maskwright.lab.train import char_rows, loss_of
from maskwright.weights import OneShot, Solved, WeightSite, attach, input_weighted, sites
from maskwright.weights.dsnot import Dsnot
from maskwright.weights.walk import walk

DENSITY = 0.3


@dataclass(frozen=True)
class RandomSwaps(OneShot):
    """The broken twin: as many swaps a row as DSnoT makes, but chosen by chance."""

    @property
    def needs(self) -> frozenset[str]:
        return Dsnot().needs

    def rank(self, site: WeightSite) -> Tensor:
        return input_weighted(site)

    def solve(self, site: WeightSite, counts: Tensor) -> Solved:
        start = select(input_weighted(site), site.pattern, counts).keep
        right = Dsnot(density=self.density, stat="mean", threshold=0.0).solve(site, counts).mask.keep
        moved = (start & ~right).sum(1)
        rows = Unstructured((0,))
        none = torch.zeros(start.shape)
        stay = draw(rows, site.shape, counts - moved, rng=generator(1, site.name), score=force(none, drop=~start)).keep
        grown = draw(rows, site.shape, moved, rng=generator(2, site.name), score=force(none, drop=start)).keep
        return Solved(Mask(stay | grown, site.pattern))


def _run(method: OneShot | None, seed: int, scale: str) -> dict[str, float]:
    chars = python_chars()
    if scale == "full":
        model = made("char_lm_relu", seed)
    else:
        model = CharLM(len(chars.vocabulary), layers=2, width=32, heads=2, context=32, activation=torch.nn.ReLU, seed=seed)
    full = scale == "full"
    length, count = (128, 64) if full else (32, 4)
    rng = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(chars.train) - length, (count,), generator=rng).tolist()
    batches = [torch.stack([chars.train[s : s + length] for s in starts[i : i + 8]]) for i in range(0, count, 8)]
    x, y = char_rows(chars.val, length, limit=200 if full else 4)
    if method is None:
        return {"delta": 0.0, "loss": loss_of(model, x, y, batch=64)}
    masks = method.masks(model, batches, seed=seed)
    found = sites(model)
    off = []
    for step in walk(model, batches, found, frozenset({"input_mean"}), propagate=False):
        for site in step.sites:
            a = site.matrix * site.stat("input_mean")
            off.append((a * ~masks[site.name].keep).sum(1).abs())
    with attach(model, masks):
        loss = loss_of(model, x, y, batch=64)
    return {"delta": float(torch.cat(off).mean()), "loss": loss}


def _arm(method: OneShot | None):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _run(method, seed, scale)


_ON: dict[str, Any] = {"density": DENSITY, "stat": "mean", "threshold": 0.0}
CLAIM = Claim(
    arms={
        "dense": _arm(None),
        "random": _arm(get("random")(density=DENSITY)),
        "magnitude": _arm(get("magnitude")(density=DENSITY)),
        "wanda": _arm(get("wanda")(density=DENSITY)),
        "sparsegpt": _arm(get("sparsegpt")(density=DENSITY, within="row")),
        "magnitude_dsnot": _arm(Dsnot(initial="magnitude", **_ON)),
        "dsnot": _arm(Dsnot(**_ON)),
        "random_swaps": _arm(RandomSwaps(density=DENSITY)),
    },
    method="dsnot",
    twin="random_swaps",
    effects=(
        Effect("swaps lower the rows' expected error below Wanda's", "dsnot", "wanda", "delta", higher=False),
        Effect("from magnitude: lower validation loss", "magnitude_dsnot", "magnitude", "loss", "quality", higher=False),
        Effect("from Wanda: lower validation loss", "dsnot", "wanda", "loss", "quality", higher=False),
        Effect("SparseGPT beats Wanda", "sparsegpt", "wanda", "loss", "quality", higher=False),
    ),
    seeds=(0, 1, 2),
    paper="LLaMA-7B at 60%: Wanda 10.79 -> 10.22 perplexity with DSnoT",
    needs=("lab:char_lm_relu",),
)
