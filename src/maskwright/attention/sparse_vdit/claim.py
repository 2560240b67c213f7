"""Sparse-vDiT's claim on a small video denoiser: searched patterns beat other plans that read as many pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import inf, log10
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State, use
from maskwright.attention.method import Direction
from maskwright.attention.sparse_vdit import SparseVDiT
from maskwright.attention.sparse_vdit.patterns import PATTERNS, Bands, Grid, pairs
from maskwright.attention.sparse_vdit.plan import Patterns, plan_of, read
from maskwright.attention.sparse_vdit.search import Profile, grid_of, measure
from maskwright.core.method import Claim, Effect, get
from maskwright.core.select import generator
from maskwright.lab import images, video
from maskwright.lab.made import made

BANDS = Bands(diagonal=65, multi=9, stripe=1)  # about an eighth of the keys each
WEIGHT, TARGET = 0.5, 0.45  # the paper's weight; its FLOP reductions are 1.67 to 2.38 times
EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, inf)
NOISE, CLIPS = (0.25, 0.5, 0.75), 4
Figures = Mapping[str, float]
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all arms of a seed share: two disjoint calibration sets, held-out batches with their clips, and the plan."""

    model: video.VideoDenoiser
    grid: Grid
    tables: tuple[Profile, Profile, Profile]  # calibration, the other calibration, held-out
    held_out: list[tuple[Batch, Tensor]]
    words: Tensor  # of the held-out clips, to sample from
    plan: Patterns
    other: Patterns
    steps: int


@cache
def _setting(seed: int, scale: str) -> Setting:
    full = scale == "full"
    if full:
        model: Any = made("video_denoiser", seed)
    else:
        model = video.VideoDenoiser(layers=1, width=32, heads=4, seed=seed).eval()
    grid, draw = grid_of(model), torch.Generator().manual_seed(1000 + seed)
    data, noise = images.digits(), NOISE if full else NOISE[:1]
    sets = [_batches(data.train, noise, draw) for _ in range(2)]
    held_out = [batch for _ in range(3 if full else 1) for batch in _batches(data.test, noise, draw)]
    tables = [measure(model, [batch for batch, _ in part], grid, BANDS) for part in (*sets, held_out)]
    plan, other = (_chosen(table) for table in tables[:2])
    words = torch.cat([batch[1] for batch, _ in held_out[:: len(noise)]])
    return Setting(model, grid, (tables[0], tables[1], tables[2]), held_out, words, plan, other, 8 if full else 1)


def _batches(digits: tuple[Tensor, Tensor], noise: Sequence[float], draw: torch.Generator) -> list[tuple[Batch, Tensor]]:
    """CLIPS clips at every level of noise, as the model's arguments and the clean clips."""
    clips = video.draw_clips(digits, CLIPS, draw)
    levels = [torch.full((CLIPS,), level) for level in noise]
    return [((video.noised(clips.video, level, draw), clips.words, level), clips.video) for level in levels]


def _chosen(table: Profile) -> Patterns:
    """The plan at the smallest of EPSILONS that leaves out enough; the last one if none does."""
    for epsilon in EPSILONS:
        plan = read(table.choose(WEIGHT, epsilon, relative=True))
        if plan.share <= TARGET:
            break
    return plan


@torch.no_grad()
def _outputs(told: Setting, method: AttentionMethod | None) -> list[Tensor]:
    if method is None:
        return [told.model(*batch) for batch, _ in told.held_out]
    with use(told.model, method):
        return [told.model(*batch) for batch, _ in told.held_out]


def _sample(told: Setting, method: AttentionMethod | None, seed: int) -> Tensor:
    words, draw = told.words, generator(seed, "sample")
    if method is None:
        return video.sample(told.model, words, told.steps, draw)
    with use(told.model, method) as run:
        return video.sample(told.model, words, told.steps, draw, tell=run.tell)


@cache
def _dense(seed: int, scale: str) -> tuple[list[Tensor], Tensor]:
    told = _setting(seed, scale)
    return _outputs(told, None), _sample(told, None, seed)


def _decibel(error: float, size: float) -> float:
    return 10 * log10(size / max(error, 1e-12))


def _figures(method: AttentionMethod | None, seed: int, scale: str) -> dict[str, float]:
    """snr: of the model's output against the dense one; psnr: of whole samples from the same noise (range 2)."""
    told, (outs, clip) = _setting(seed, scale), _dense(seed, scale)
    mine = _outputs(told, method)
    loss = sum(float(F.mse_loss(a, b)) for a, (_, b) in zip(mine, told.held_out, strict=True)) / len(mine)
    error = sum(float(F.mse_loss(a, b)) for a, b in zip(mine, outs, strict=True))
    size = sum(float(b.var()) for b in outs)
    psnr = _decibel(float(F.mse_loss(_sample(told, method, seed), clip)), 4.0)
    return {"loss": loss, "snr": _decibel(error, size), "psnr": psnr}


def _of_plan(found: Patterns, seed: int, scale: str) -> dict[str, float]:
    told = _setting(seed, scale)
    figures = _figures(SparseVDiT(plan_of(found.names, found.grid, found.bands)), seed, scale)
    same = [a == b for x, y in zip(found.names, told.other.names, strict=True) for a, b in zip(x, y, strict=True)]
    seen, held = (_loss(table, found) for table in (told.tables[0], told.tables[2]))
    return {
        **figures, "share": found.share, "agreement": sum(same) / len(same), "transfer": held / max(seen, 1e-12),
        **{name: float(count) for name, count in found.counts.items()},
    }  # fmt: skip


def _loss(table: Profile, found: Patterns) -> float:
    """Summed error of the plan's patterns in a table, each against the size of its head's output."""
    loss = table.mse / table.size[..., None].clamp(min=1e-30)
    index = torch.tensor([[PATTERNS.index(name) for name in row] for row in found.names])
    return float(loss.gather(-1, index[..., None]).sum())


def _searched(seed: int, scale: str) -> Figures:
    """The plan, and along a sweep of the weight without fallback the share of neighbouring points where the output
    gets no better as pairs get fewer."""
    told = _setting(seed, scale)
    points: list[tuple[float, float]] = []
    for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 8.0) if scale == "full" else (0.0, 8.0):
        found = read(told.tables[0].choose(weight, relative=True))
        if not points or found.share < points[-1][0]:
            points.append((found.share, _snr(found, seed, scale)))
    falls = [b[1] <= a[1] for a, b in pairwise(points)]
    return {**_of_plan(told.plan, seed, scale), "monotone": sum(falls) / len(falls) if falls else 0.0}


def _snr(found: Patterns, seed: int, scale: str) -> float:
    outs, told = _dense(seed, scale)[0], _setting(seed, scale)
    mine = _outputs(told, SparseVDiT(plan_of(found.names, found.grid, found.bands)))
    error = sum(float(F.mse_loss(a, b)) for a, b in zip(mine, outs, strict=True))
    return _decibel(error, sum(float(b.var()) for b in outs))


def _uniform(name: str) -> Callable[[int, str], Figures]:
    """One pattern for every head, the narrowest band that reads as many pairs as the plan."""

    def run(seed: int, scale: str) -> Figures:
        told = _setting(seed, scale)
        wanted = told.plan.share * told.grid.tokens**2
        bands = (Bands(**{name: width}) for width in range(1, 2 * told.grid.tokens + 2, 2))
        wide = next(b for b in bands if pairs(name, told.grid, b) >= wanted)
        names = tuple((name,) * len(row) for row in told.plan.names)
        return _of_plan(Patterns(names, told.grid, wide), seed, scale)

    return run


def _random(seed: int, scale: str) -> Figures:
    """The plan's patterns dealt out to any heads: the mean of five draws."""
    told = _setting(seed, scale)
    every = [name for row in told.plan.names for name in row]
    heads = len(told.plan.names[0])
    rows = []
    for draw in range(5 if scale == "full" else 1):
        order = torch.randperm(len(every), generator=generator(seed, f"draw {draw}")).tolist()
        dealt = [every[i] for i in order]
        names = tuple(tuple(dealt[i : i + heads]) for i in range(0, len(dealt), heads))
        rows.append(_of_plan(Patterns(names, told.grid, BANDS), seed, scale))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _misplaced(seed: int, scale: str) -> Figures:
    """The broken twin: every layer gets the plan of the layer opposite, its heads in reverse order."""
    told = _setting(seed, scale)
    names = tuple(tuple(reversed(row)) for row in reversed(told.plan.names))
    return {**_of_plan(Patterns(names, told.grid, BANDS), seed, scale), "monotone": 0.0}


@final
@dataclass(frozen=True)
class Dynamic(AttentionMethod):
    """Each head's best key blocks of this very input, found from full attention: what no static plan can know."""

    share: float
    block: int = 8
    direction: ClassVar[Direction] = "bidirectional"

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return get("sparsed")(select=self.share, block=self.block, isolated="none").freeze(site, 1)  # type: ignore[no-any-return]


def _dynamic(seed: int, scale: str) -> Figures:
    return _figures(Dynamic(_setting(seed, scale).plan.share), seed, scale)


def _full(seed: int, scale: str) -> Figures:
    return {**_figures(None, seed, scale), "share": 1.0}


def _bound(seed: int, scale: str) -> Figures:
    return {"agreement": 0.8, "transfer": 1.3, "share": 0.5, "monotone": 0.99}


CLAIM = Claim(
    arms={
        "dense": _full,
        "searched": _searched,
        "diagonal": _uniform("diagonal"),
        "multi": _uniform("multi"),
        "random": _random,
        "dynamic": _dynamic,
        "misplaced": _misplaced,
        "bound": _bound,
    },
    method="searched",
    twin="misplaced",
    effects=(
        Effect("at least half of all pairs are left out", "searched", "bound", "share", higher=False),
        Effect("output 1 dB nearer to dense than a diagonal in all heads", "searched", "diagonal", "snr", margin=1.0),
        Effect("output 1 dB nearer than a multi-diagonal in all heads", "searched", "multi", "snr", margin=1.0),
        Effect("output 1 dB nearer than the patterns dealt at random", "searched", "random", "snr", margin=1.0),
        Effect("samples 3 dB nearer to dense than random's", "searched", "random", "psnr", margin=3.0),
        Effect("another calibration gives 80% of heads the same", "searched", "bound", "agreement"),
        Effect("held-out error within 1.3 of calibration's", "searched", "bound", "transfer", "quality", higher=False),
        Effect("fewer pairs never come nearer to dense", "searched", "bound", "monotone", "quality"),
        Effect("lower denoising loss than a diagonal", "searched", "diagonal", "loss", "quality", higher=False),
        Effect("lower denoising loss than a multi-diagonal", "searched", "multi", "loss", "quality", higher=False),
        Effect("lower denoising loss than random", "searched", "random", "loss", "quality", higher=False),
        Effect("nearer than blocks chosen per input", "searched", "dynamic", "snr", "quality"),
    ),
    seeds=(0, 1, 2),
    needs=("lab:video_denoiser",),
    paper="CogVideoX1.5, HunyuanVideo, Wan2.1: FLOPs 2.09, 2.38, 1.67 times fewer; PSNR to dense 24.1, 27.1, 22.6",
)
