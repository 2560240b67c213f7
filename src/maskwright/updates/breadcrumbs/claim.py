"""Breadcrumbs' claim: settings found on two tasks bear eight, where the whole sum of deltas overshoots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Claim, Effect, get
from maskwright.lab import minilm
from maskwright.lab.images import digits, fashion_mnist
from maskwright.lab.models import Vit
from maskwright.lab.tasks import NEEDS, TASKS
from maskwright.lab.train import accuracy, train
from maskwright.updates import MergeMethod, merge
from maskwright.updates.breadcrumbs.method import Breadcrumbs

State = Mapping[str, Tensor]
Family = Callable[[float], MergeMethod]  # a method by its density, at scale 1
COUNTS = (2, 4, 6, 8)  # tasks merged (most arms: 2 and 8); settings are tuned on validation rows of the first two alone
# One ladder of scales for every arm, up to 3: a method that keeps little may make up for it.
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
RATE = 2e-4  # of the fine-tuning on images: a tenth of the base's
OUTLIERS = 0.006  # drop_top, the paper's starting value


@dataclass(frozen=True, eq=False)
class Side:
    """Models of one base, and `score(state, task, part)`, the accuracy of weights on a task's "val" or "test"."""

    base: State
    tuned: tuple[State, ...]
    score: Callable[[State, int, str], float]
    ceiling: tuple[float, ...]


def _copy(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@cache
def _text(seed: int) -> Side:
    """Eight text tasks on MiniLM, each class answered by a frozen label vector; the six layers are merged."""
    names = list(TASKS)
    host = minilm.label_model(names[0])
    layers, base = host.encoder.get_submodule("encoder"), _copy(host.encoder.get_submodule("encoder"))
    limits = {"val": 100, "test": 150}
    rows = {(n, part): minilm.rows(TASKS[n](), part, limit) for n in names for part, limit in limits.items()}
    tuned = tuple(_copy(minilm.fine_tuned(name, seed).encoder.get_submodule("encoder")) for name in names)

    def score(state: State, task: int, part: str) -> float:
        layers.load_state_dict(state)
        return minilm.accuracy(minilm.label_model(names[task], host.encoder), *rows[names[task], part])

    return Side(base, tuned, score, tuple(score(state, task, "test") for task, state in enumerate(tuned)))


def _turned(x: Tensor, degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    rows = [[float(angle.cos()), float(-angle.sin()), 0.0], [float(angle.sin()), float(angle.cos()), 0.0]]
    grid = F.affine_grid(torch.tensor([rows]).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _noisy(x: Tensor) -> Tensor:
    return x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


# The eight tasks: the same ten classes seen through one fixed change each.
CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: _turned(x, 15),
    lambda x: 1 - x,
    lambda x: x.roll(x.shape[-1] // 7, -1),
    lambda x: F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 5, 1),
    _noisy,
    lambda x: _turned(x, 30),
    lambda x: _turned(x, 45),
    lambda x: _turned(x, -30),
)


@cache
def _images(seed: int, scale: str) -> Side:
    """Fashion-MNIST (smoke: digits) through eight changes on a small Vit whose head is frozen after the base."""
    full = scale == "full"
    data = fashion_mnist() if full else digits()
    rows, held = (12_000, 500) if full else (200, 40)
    parts = {
        "train": (data.train_x[:rows], data.train_y[:rows]),
        "val": (data.train_x[rows : rows + held], data.train_y[rows : rows + held]),
        "test": (data.test_x[: 2 * held], data.test_y[: 2 * held]),
    }
    changes = CHANGES if full else CHANGES[:3]
    seen = {(t, part): (change(x), y) for t, change in enumerate(changes) for part, (x, y) in parts.items()}
    size: dict[str, Any] = {"patch": 7} if full else {"size": 8, "layers": 1, "width": 16, "heads": 2}
    host = Vit(seed=seed, **size)
    first, more, batch = (1_000, 250, 64) if full else (5, 2, 16)
    train(
        host, parts["train"], steps=first, batch=batch, lr=2e-3, optimizer="adamw", warmup=first // 20, clip=1.0, seed=seed
    )
    host.head.requires_grad_(False)  # all tasks share it, or merging would mean nothing
    base, tuned = _copy(host), []
    for task in range(len(changes)):
        host.load_state_dict(base)
        settings = {"steps": more, "batch": batch, "lr": RATE, "optimizer": "adamw", "warmup": more // 10, "clip": 1.0}
        train(host, seen[task, "train"], seed=100 * seed + task, **settings)  # type: ignore[arg-type]
        tuned.append(_copy(host))

    def score(state: State, task: int, part: str) -> float:
        host.load_state_dict(state)
        return accuracy(host, *seen[task, part])

    return Side(base, tuple(tuned), score, tuple(score(state, task, "test") for task, state in enumerate(tuned)))


@cache
def _side(name: str, seed: int, scale: str) -> Side:
    return _text(seed) if name == "text" else _images(seed, scale)


def _sum(side: Side, method: MergeMethod, count: int, seed: int) -> State:
    """The combined delta of the first `count` tasks at scale 1: every scale of the ladder is then one addition."""
    merged = merge(side.base, side.tuned[:count], method, seed=seed).state
    return {name: merged[name] - value for name, value in side.base.items()}


def _scaled(side: Side, delta: State, scale: float) -> State:
    return {name: value + scale * delta[name] for name, value in side.base.items()}


def _mean(side: Side, state: State, count: int, part: str) -> float:
    """Accuracy over the fine-tuned model's own, mean over the first `count` tasks."""
    own = (max(ceiling, 0.01) for ceiling in side.ceiling)  # a smoke run's models may know nothing
    return sum(side.score(state, task, part) / most for task, most in zip(range(count), own, strict=False)) / count


def _best_scale(side: Side, delta: State, count: int, scales: tuple[float, ...]) -> tuple[float, float]:
    """(value, scale) of the best scale on the validation rows of `count` tasks; of equals the smallest."""
    return max((_mean(side, _scaled(side, delta, s), count, "val"), -s) for s in scales)


@cache
def _tuned(name: str, arm: str, seed: int, scale: str) -> tuple[float, float]:
    """(density, scale) that an arm does best with on two tasks; of equals the first density."""
    family, densities = ARMS[arm]
    side = _side(name, seed, scale)
    if not densities:  # the method's own density, so that only the choice of entries differs
        densities = (_tuned(name, "breadcrumbs", seed, scale)[0],)
    scales, densities = (SCALES, densities) if scale == "full" else (SCALES[2:3], densities[-1:])
    tried = [(*_best_scale(side, _sum(side, family(d), 2, seed), 2, scales), d) for d in densities]
    _, negative, density = max(tried, key=lambda found: found[:1])
    return density, -negative


def _ladder(side: Side, state_of: Callable[[int], State], arm: str, scale: str) -> dict[str, float]:
    counts = COUNTS if scale == "full" and arm in ("base", "breadcrumbs", "task_arithmetic") else COUNTS[::3]
    most = len(side.tuned)  # a smoke run has fewer models
    return {f"k{count}": _mean(side, state_of(min(count, most)), min(count, most), "test") for count in counts}


def _run(arm: str, name: str, seed: int, scale: str) -> dict[str, float]:
    side = _side(name, seed, scale)
    if arm == "fine_tuned":
        return {"accuracy": sum(side.ceiling) / len(side.ceiling)}
    if arm == "base":
        return _ladder(side, lambda count: side.base, arm, scale)
    if arm == "average":
        mean = get("task_arithmetic")(normalise=True)
        return _ladder(side, lambda count: merge(side.base, side.tuned[:count], mean).state, arm, scale)
    density, factor = _tuned(name, arm, seed, scale)
    method = ARMS[arm][0](density)
    most = len(side.tuned)
    final = _sum(side, method, most, seed)

    def state_of(count: int) -> State:
        return _scaled(side, final if count == most else _sum(side, method, count, seed), factor)

    figures = {"density": density, "scale": factor, **_ladder(side, state_of, arm, scale)}
    if arm in (
        "breadcrumbs",
        "task_arithmetic",
        "outliers_alone",
    ):  # the scale tuned anew on all eight, every second of the ladder
        again = -_best_scale(side, final, most, SCALES[::2] if scale == "full" else SCALES[2:3])[1]
        figures |= {"own_scale": again, "own_k8": _mean(side, _scaled(side, final, again), most, "test")}
    return figures


def _arm(arm: str):  # type: ignore[no-untyped-def]
    def both(seed: int, scale: str) -> dict[str, float]:
        images = _run(arm, "images", seed, scale)
        text = _run(arm, "text", seed, scale) if scale == "full" else images  # smoke needs no packages
        return {f"{name}_{key}": v for name, found in (("images", images), ("text", text)) for key, v in found.items()}

    return both


METHOD = Breadcrumbs(scale=1.0, drop_top=OUTLIERS)
TIES, DARE, WHOLE = get("ties"), get("dare"), get("task_arithmetic")
# Each arm's family and the densities it is tuned over: the papers' ranges; () = the density found for breadcrumbs.
ARMS: dict[str, tuple[Family, tuple[float, ...]]] = {
    "task_arithmetic": (lambda d: WHOLE(), (1.0,)),
    "ties": (lambda d: TIES(density=d), (0.1, 0.2)),
    "dare": (lambda d: DARE(density=d), (0.1, 0.5)),
    "breadcrumbs": (lambda d: replace(METHOD, density=d), (0.1, 0.2)),
    "top_alone": (lambda d: replace(METHOD, density=d, drop_top=0.0), ()),
    "random": (lambda d: DARE(density=d, rescale="none"), ()),
    "bottom_alone": (lambda d: replace(METHOD, density=d, drop_top=1.0 - d), ()),
    # The twin keeps what the method drops first: the outliers, and nothing of the middle.
    "outliers_alone": (lambda d: replace(METHOD, density=d, drop_top=0.0), (OUTLIERS,)),
}


def _effects(side: str) -> tuple[Effect, ...]:
    def effect(told: str, worse: str, margin: float, figure: str = "k8", kind: str = "mechanism") -> Effect:
        return Effect(f"{side}: {told}", "breadcrumbs", worse, f"{side}_{figure}", kind, margin)  # type: ignore[arg-type]

    return (
        effect("with settings of 2 tasks, 8 tasks 2 points above their whole sum", "task_arithmetic", 0.02),
        effect("a random mask of equal density is no more than a point better", "random", -0.01),
        effect("with the scale tuned on 8, no more than a point below the whole sum", "task_arithmetic", -0.01, "own_k8"),
        effect("dropping the outliers costs at most a point", "top_alone", -0.01),
        effect("above the smallest entries of equal density", "bottom_alone", 0.0, kind="quality"),
        effect("above the weight average", "average", 0.0, kind="quality"),
        effect("above TIES", "ties", 0.0, kind="quality"),
        effect("above DARE", "dare", 0.0, kind="quality"),
    )


CLAIM = Claim(
    arms={arm: _arm(arm) for arm in ("base", "fine_tuned", "average", *ARMS)},
    method="breadcrumbs",
    twin="outliers_alone",
    effects=(*_effects("images"), *_effects("text")),
    seeds=(0, 1, 2),
    paper="CLIP on 8 tasks and more: above task arithmetic at every number of tasks, the gap grows with the number",
    needs=(
        minilm.NEEDS, "debian:dataset-fashion-mnist", *dict.fromkeys(NEEDS.values()),
        *(f"lab:{name}" for name in minilm.RECIPES),
    ),
    trains=True,
)  # fmt: skip
