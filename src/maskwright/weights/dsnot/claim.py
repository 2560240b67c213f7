"""DSnoT's claim: swaps lower each row's expected output error at the same count. Gated on |delta|."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskwright.core.mask import Mask
from maskwright.core.method import Claim, Effect, get
from maskwright.core.pattern import Unstructured
from maskwright.core.score import force
from maskwright.core.select import draw, generator, select
from maskwright.lab.made import made
from maskwright.lab.models import CharLM
from maskwright.lab.text import python_chars
from maskwright.lab.train import char_rows, loss_of
from maskwright.weights import OneShot, Solved, WeightSite, input_weighted, sites
from maskwright.weights.dsnot import Dsnot
from maskwright.weights.walk import walk

DENSITY = 0.3
FEW = 2  # of 38 kept in a row of 128: the share that the paper's 50 swaps are of LLaMA's rows (50 of 1,638 at 60%)


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
        right = Dsnot(density=self.density).solve(site, counts).mask.keep
        moved = (start & ~right).sum(1)
        rows = Unstructured((0,))
        none = torch.zeros(start.shape)
        stay = draw(rows, site.shape, counts - moved, rng=generator(1, site.name), score=force(none, drop=~start)).keep
        grown = draw(rows, site.shape, moved, rng=generator(2, site.name), score=force(none, drop=start)).keep
        return Solved(Mask(stay | grown, site.pattern))


def _model(seed: int, scale: str) -> nn.Module:
    if scale == "full":
        return made("char_lm_relu", seed)
    letters = len(python_chars().vocabulary)
    return CharLM(letters, layers=2, width=32, heads=2, context=32, activation=nn.ReLU, seed=seed)


def _run(method: OneShot | None, seed: int, scale: str) -> dict[str, float]:
    chars, model, full = python_chars(), _model(seed, scale), scale == "full"
    length, count = (128, 64) if full else (32, 4)
    rng = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(chars.train) - length, (count,), generator=rng).tolist()
    batches = [torch.stack([chars.train[s : s + length] for s in starts[i : i + 8]]) for i in range(0, count, 8)]
    x, y = char_rows(chars.val, length, limit=200 if full else 4)
    if method is None:
        return {"delta": 0.0, "loss": loss_of(model, x, y, batch=64)}
    method.prune(model, batches, seed=seed)
    return {"delta": _delta(_model(seed, scale), model, batches), "loss": loss_of(model, x, y, batch=64)}


@torch.no_grad()
def _delta(dense: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> float:
    """Mean over rows of |E[dense output - sparse output]|, each block on the inputs that the pruned ones before it give."""
    new, off = sites(pruned), []
    for step in walk(dense, batches, sites(dense), frozenset({"input_mean"}), sample_rows=0):
        for site in step.sites:
            off.append(((site.matrix - new[site.name].matrix) @ site.stat("input_mean")).abs())
            site.parameter.copy_(new[site.name].value)
    return float(torch.cat(off).mean())


def _arm(method: OneShot | None):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _run(method, seed, scale)


CLAIM = Claim(
    arms={
        "dense": _arm(None),
        "random": _arm(get("random")(density=DENSITY)),
        "magnitude": _arm(get("magnitude")(density=DENSITY)),
        "wanda": _arm(get("wanda")(density=DENSITY)),
        "sparsegpt": _arm(get("sparsegpt")(density=DENSITY, within="row")),
        "magnitude_dsnot": _arm(Dsnot(initial="magnitude", density=DENSITY)),
        "dsnot": _arm(Dsnot(density=DENSITY)),
        "magnitude_dsnot_few": _arm(Dsnot(initial="magnitude", density=DENSITY, cycles=FEW)),
        "dsnot_few": _arm(Dsnot(density=DENSITY, cycles=FEW)),
        "random_swaps": _arm(RandomSwaps(density=DENSITY)),
    },
    method="dsnot",
    twin="random_swaps",
    effects=(
        Effect("swaps lower the rows' expected error below Wanda's", "dsnot", "wanda", "delta", higher=False),
        Effect("from magnitude: lower validation loss", "magnitude_dsnot", "magnitude", "loss", "quality", higher=False),
        Effect("from Wanda: lower validation loss", "dsnot", "wanda", "loss", "quality", higher=False),
        Effect("from magnitude, few swaps: lower loss", "magnitude_dsnot_few", "magnitude", "loss", "quality", higher=False),
        Effect("from Wanda, few swaps: lower loss", "dsnot_few", "wanda", "loss", "quality", higher=False),
        Effect("SparseGPT beats Wanda", "sparsegpt", "wanda", "loss", "quality", higher=False),
    ),
    seeds=(0, 1, 2),
    paper="LLaMA-7B at 60%: Wanda 10.79 -> 10.22 perplexity with DSnoT",
    needs=("lab:char_lm_relu",),
)
