"""GS-LoRA's claim: a ViT of 20 classes forgets three times four of them, keeps the rest, and few blocks are touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Claim, Effect
from maskwright.core.select import generator
from maskwright.lab import images, minilm, recogniser, tasks
from maskwright.lab.made import made
from maskwright.lab.models import Vit
from maskwright.lab.train import accuracy, train
from maskwright.updates.gs_lora import GsLora, forget, harmonic, prototypes

# A pilot on seed 7 with 10 epochs: ALPHA 0 left no block alone (H 0.893), 0.01 44 % (0.884), 0.02 67 % (0.878), 0.03 72 %
# (0.800). On MiniLM an LR of 0.01 (ALPHA 0.03) cost the other classes 23 points more than 0.003 did (0.015). Nothing else
# was tuned.
ALPHA, BETA, BOUND, LR, TEXT_LR = 1.5e-2, 0.15, 10.0, 1e-2, 3e-3
GRID = (1e-3, 1e-2, 3e-2, 1e-1, 10.0)
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class World:
    """A trained recogniser, what it may be asked with (10 % of its data), its test rows, and the classes of each task."""

    model: nn.Module
    train: Rows
    test: Rows
    requests: tuple[tuple[int, ...], ...]
    epochs: int
    batch: int
    lr: float = LR


@cache
def _images(full: bool) -> images.Images:
    return recogniser.twenty() if full else images.digits()


@cache
def _world(seed: int, full: bool) -> World:
    data = _images(full)
    if full:
        model = made("recogniser", seed)
        kept = torch.cat([recogniser.first(data.train_y, [c], 120 if c < 10 else 40) for c in range(recogniser.CLASSES)])
    else:
        model = Vit(8, 4, layers=3, width=16, heads=2, seed=seed)
        train(model, data.train, steps=10, lr=3e-3, optimizer="adamw", seed=seed)
        kept = torch.arange(80)
    order = [torch.randperm(10, generator=generator(seed, side)).tolist() for side in ("garments", "digits")]
    # Two garments and two digits a request.
    requests = tuple((*order[0][2 * t : 2 * t + 2], *(10 + c for c in order[1][2 * t : 2 * t + 2])) for t in range(3))
    if not full:
        requests = ((0, 1), (2, 3))
    return World(model.eval(), (data.train_x[kept], data.train_y[kept]), data.test, requests, 10 if full else 1, 48)


def _of(rows: Rows, classes: set[int], shots: int | None = None) -> Rows:
    x, y = rows
    chosen = recogniser.first(y, sorted(classes), len(y) if shots is None else shots)
    return x[chosen], y[chosen]


def _batches(rows: Rows, size: int, seed: int) -> list[Rows]:
    order = torch.randperm(len(rows[1]), generator=generator(seed, "batches"))
    return [(rows[0][part], rows[1][part]) for part in order.split(size)]


def _right(model: nn.Module, rows: Rows) -> float:
    return minilm.accuracy(model, *rows) if isinstance(model, minilm.LabelModel) else accuracy(model, *rows)


def _requests(method: GsLora | None, seed: int, world: World, tasks_done: int | None = None) -> dict[str, float]:
    """Forget one request after the other (None: nothing is done); figures are means over requests."""
    model, found = copy.deepcopy(world.model), []
    classes: set[int] = set(world.train[1].tolist())
    gone: set[int] = set()
    for number, wanted in enumerate(world.requests[:tasks_done]):
        bad, rest = set(wanted), classes - set(wanted) - gone
        before = _right(model, _of(world.test, bad))
        share = 0.0
        if method is not None:
            remain = _batches(_of(world.train, rest), world.batch, seed)
            told = forget(
                model, method, remain, _batches(_of(world.train, bad), world.batch, seed), epochs=world.epochs, lr=world.lr,
                seed=100 * seed + number,
            )  # fmt: skip
            share = told.zero_share
        acc_f, acc_r = _right(model, _of(world.test, bad)), _right(model, _of(world.test, rest))
        row = {"acc_f": acc_f, "acc_r": acc_r, "h": harmonic(before - acc_f, acc_r), "zero_share": share}
        row["acc_o"] = _right(model, _of(world.test, gone)) if gone else 0.0
        found.append(row)
        gone |= bad
    figures = {name: sum(row[name] for row in found) / len(found) for name in found[0]}
    if tasks_done is None:
        figures["recovered"] = _recovered(model, world, set(world.requests[-1]), classes - gone)
    return figures


def _recovered(model: nn.Module, world: World, bad: set[int], rest: set[int], *, shots: int = 4, steps: int = 50) -> float:
    """Accuracy on the classes of the last request after the head alone learned them again, from `shots` images of each
    class, the remaining ones too. Their rows of the head are emptied first, so that only the features can tell: of the
    untouched model this is forgetting in the head and nowhere else.
    """
    model = copy.deepcopy(model).eval()
    head = model.get_submodule("head")
    with torch.no_grad():
        for label in bad:
            head.weight[label], head.bias[label] = 0.0, 0.0  # type: ignore[index,operator]
    x, y = _of(world.train, bad | rest, shots)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return _right(model, _of(world.test, bad))


def _arm(method: GsLora | None):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _requests(method, seed, _world(seed, scale == "full"))


def _target(seed: int, scale: str) -> dict[str, float]:
    """The bars of the claim, as an arm to be beaten."""
    return {"acc_f": 0.10, "zero_share": 1 / 3, "never_falls": 0.5, "last_share": 0.999, "last_acc_f": 0.5}


def _grid(seed: int, scale: str) -> dict[str, float]:
    """The first request at five weights of the lasso: the share of zero groups rises to 1, where nothing is forgotten."""
    world = _world(seed, scale == "full")
    grid = GRID if scale == "full" else GRID[-2:]
    rows = [_requests(GsLora(alpha=alpha, beta=BETA, bound=BOUND), seed, world, 1) for alpha in grid]
    shares = [row["zero_share"] for row in rows]
    told = {f"zero_share_{alpha:g}": row["zero_share"] for alpha, row in zip(grid, rows, strict=True)}
    told |= {f"acc_f_{alpha:g}": row["acc_f"] for alpha, row in zip(grid, rows, strict=True)}
    never_falls = float(all(a <= b for a, b in pairwise(shares)))
    return told | {"never_falls": never_falls, "last_share": shares[-1], "last_acc_f": rows[-1]["acc_f"]}


def _few(plus: bool):  # type: ignore[no-untyped-def]
    """The first request with 4 images a class, both of the classes to forget and of the others."""

    def run(seed: int, scale: str) -> dict[str, float]:
        world = _world(seed, scale == "full")
        epochs = 30 if scale == "full" else 1
        more = {"forget_weight": 0.015, "ema_decay": 0.9, "ema_epoch": epochs * 3 // 10} if plus else {}
        model = copy.deepcopy(world.model)
        bad = set(world.requests[0])
        rest = set(world.train[1].tolist()) - bad
        few = [_batches(_of(world.train, part, 4), 4, seed) for part in (rest, bad)]
        before = _right(model, _of(world.test, bad))
        centres = prototypes(model, [*few[0], *few[1]]) if plus else None
        method = GsLora(alpha=ALPHA, beta=0.3, bound=BOUND, **more)  # type: ignore[arg-type]
        forget(model, method, *few, epochs=epochs, lr=world.lr, centres=centres, seed=seed)
        acc_f, acc_r = _right(model, _of(world.test, bad)), _right(model, _of(world.test, rest))
        return {"acc_f": acc_f, "acc_r": acc_r, "h": harmonic(before - acc_f, acc_r)}

    return run


def _text(method: GsLora | None):  # type: ignore[no-untyped-def]
    """MiniLM over WordNet's 26 noun classes: four are forgotten. At smoke scale the images stand in."""

    def run(seed: int, scale: str) -> dict[str, float]:
        if scale != "full":
            return _requests(method, seed, _world(seed, False), 1)
        task = tasks.TASKS["noun_class"]()
        model = minilm.fine_tuned("noun_class", seed)
        chosen = torch.randperm(len(task.labels), generator=generator(seed, "nouns"))[:4].tolist()
        rows = minilm.rows(task, "train", 1200), minilm.rows(task, "test")
        return _requests(method, seed, World(model, *rows, (tuple(chosen),), 1, 16, TEXT_LR), 1)

    return run


METHOD = GsLora(alpha=ALPHA, beta=BETA, bound=BOUND)
CLAIM = Claim(
    arms={
        "target": _target,
        "original": _arm(None),
        "gs_lora": _arm(METHOD),
        "lora": _arm(GsLora(alpha=0.0, beta=BETA, bound=BOUND)),
        # The twin ascends without a bound and as hard as it holds the rest.
        "unbounded": _arm(GsLora(alpha=ALPHA, beta=1.0, bound=1e6)),
        "grid": _grid,
        "few": _few(False),
        "few_plus": _few(True),
        "text_original": _text(None),
        "text_gs_lora": _text(METHOD),
    },
    method="gs_lora",
    twin="unbounded",
    effects=(
        Effect("at most 10 % right on what it forgot", "gs_lora", "target", "acc_f", higher=False),
        Effect("keeps the other classes to 3 points", "gs_lora", "original", "acc_r", margin=-0.03),
        Effect("a third of the blocks is left alone", "gs_lora", "target", "zero_share"),
        Effect("the lasso costs at most 2 points of H", "gs_lora", "lora", "h", margin=-0.02),
        Effect("more lasso, more blocks left alone", "grid", "target", "never_falls"),
        Effect("very much lasso leaves all blocks alone", "grid", "target", "last_share"),
        Effect("and then nothing is forgotten", "grid", "target", "last_acc_f"),
        Effect("harder to undo in the head than a masked head", "gs_lora", "original", "recovered", higher=False),
        Effect("with 4 images a class, ++ has no lower H", "few_plus", "few", "h", "quality"),
        Effect("MiniLM forgets four noun classes to 10 %", "text_gs_lora", "target", "acc_f", "quality", higher=False),
        Effect("and keeps the others to 3 points", "text_gs_lora", "text_original", "acc_r", "quality", margin=-0.03),
    ),
    seeds=(0, 1, 2),
    paper="CASIA-Face100, ImageNet100: forgotten near 0 %, others within 1-2 points, 1.3 % of the parameters tuned",
    needs=(*recogniser.NEEDS, "lab:recogniser", minilm.NEEDS, tasks.NEEDS["noun_class"], "lab:minilm_noun_class"),
    trains=True,
)
