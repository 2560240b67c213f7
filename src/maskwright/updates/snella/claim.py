"""SNELLA's claim: updates of high rank at LoRA's number of parameters, shared out unevenly; few-shot accuracy beside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.budget import whole
from maskwright.core.method import Claim, Effect
from maskwright.core.pattern import Unstructured
from maskwright.core.select import draw, generator
from maskwright.lab import images, minilm, recogniser, tasks
from maskwright.lab.made import made
from maskwright.lab.models import Vit
from maskwright.lab.train import accuracy, train
from maskwright.updates.branch import Branch, branched, linears
from maskwright.updates.lora import Lora, LowRank
from maskwright.updates.snella import Snella

RANK, SHOTS, EPOCHS, BATCH = 4, 10, 30, 20
RATES = (1e-3, 3e-3, 1e-2)
Rows = tuple[Tensor, Tensor]
# Gives (parameters, called before each epoch, called before each step, figures at the end) of a model under a method.
Attached = tuple[list[nn.Parameter], Callable[[int], Any], Callable[[], Any], Callable[[], dict[str, float]]]


@cache
def _digits(full: bool) -> images.Images:
    return images.mnist5k() if full else images.digits()


@cache
def _world(seed: int, full: bool) -> tuple[nn.Module, Rows, Rows, Rows]:
    """A ViT that knows garments, with a new head for digits; a few of them, as many again to choose a rate by, and test."""
    data = _digits(full)
    if full:
        model = made("recogniser_garments", seed)
    else:
        model = Vit(8, 4, layers=2, width=16, heads=2, seed=seed)
        train(model, (data.train_x, data.train_y % 2), steps=5, lr=3e-3, optimizer="adamw", seed=seed)
    head = model.get_submodule("head")
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator(seed, "head")))  # type: ignore[operator,arg-type]
        head.bias.zero_()  # type: ignore[operator]
    shots = SHOTS if full else 2
    picks = []
    for label in range(10):
        mine = (data.train_y == label).nonzero().flatten()
        picks.append(mine[torch.randperm(len(mine), generator=generator(seed, f"shots {label}"))[: 3 * shots]])
    few, val = (torch.cat([p[part] for p in picks]) for part in (slice(shots), slice(shots, 3 * shots)))
    x, y = data.train
    test = data.test if full else (data.test_x[:40], data.test_y[:40])
    return model, (x[few], y[few]), (x[val], y[val]), test


@final
class RandomlyMasked(Branch):
    """A low-rank product seen through a fixed random mask: as sparse as SNELL, with no competition."""

    def __init__(self, shape: tuple[int, int], density: float, seed: int, name: str) -> None:
        super().__init__()
        self.pair = LowRank(shape, RANK, seed=seed, name=name)
        count = whole(density, shape[0] * shape[1])
        self.keep = draw(Unstructured(), shape, count, rng=generator(seed, f"mask {name}")).keep

    def delta(self) -> Tensor:
        return torch.where(self.keep, self.pair.delta(), 0)


def _rank(matrices: list[Tensor]) -> float:
    return sum(int(torch.linalg.matrix_rank(m.detach())) for m in matrices) / len(matrices)


def _fit(world: tuple[nn.Module, Rows, Rows, Rows], attach: Any, rate: float, full: bool, seed: int) -> dict[str, float]:
    """Train at one rate; figures of the attached model: accuracy on validation and test rows, and the method's own."""
    model, few, val, test = world
    model = copy.deepcopy(model)
    order = generator(seed, "order")
    epochs = EPOCHS if full else 2
    with attach(model, epochs, seed) as (trainable, on_epoch, on_step, told):
        optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        model.train()
        for epoch in range(epochs):
            on_epoch(epoch)
            for part in torch.randperm(len(few[1]), generator=order).split(BATCH if full else 10):
                optimizer.zero_grad()
                F.cross_entropy(model(few[0][part]), few[1][part]).backward()
                on_step()
                optimizer.step()
            schedule.step()
        return {"accuracy": accuracy(model, *test), "validation": accuracy(model, *val), **told()}


def _arm(attach: Any) -> Callable[[int, str], dict[str, float]]:
    """Each arm takes the rate that is best on its validation rows."""

    def run(seed: int, scale: str) -> dict[str, float]:
        full = scale == "full"
        world = _world(seed, full)
        rows = [{**_fit(world, attach, rate, full, seed), "rate": rate} for rate in (RATES if full else RATES[-1:])]
        return max(rows, key=lambda row: row["validation"])

    return run


class _Plain:
    """The whole model, or its head alone."""

    def __init__(self, whole_model: bool) -> None:
        self.whole = whole_model

    def __call__(self, model: nn.Module, epochs: int, seed: int) -> _Plain:
        part = model if self.whole else model.get_submodule("head")
        model.requires_grad_(False)
        self.parameters = list(part.requires_grad_(True).parameters())
        return self

    def __enter__(self) -> Attached:
        return self.parameters, lambda epoch: None, lambda: None, dict

    def __exit__(self, *error: object) -> None:
        return None


class _Hung:
    """A method's context around what the loop asks for."""

    def __init__(self, make: Callable[[nn.Module, int, int], Any], ask: Callable[[Any], Attached]) -> None:
        self.make, self.ask = make, ask

    def __call__(self, model: nn.Module, epochs: int, seed: int) -> _Hung:
        self.context = self.make(model, epochs, seed)
        return self

    def __enter__(self) -> Attached:
        return self.ask(self.context.__enter__())

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def _snella(**settings: Any) -> _Hung:
    def make(model: nn.Module, epochs: int, seed: int) -> Any:
        chosen = {"rank": RANK, "train": ("head",), "recompute": False, "epochs": epochs, **settings}
        return Snella(**chosen).attach(model, seed=seed)

    def ask(run: Any) -> Attached:
        def told() -> dict[str, float]:
            shares = torch.tensor([layer.count / run.sizes[name] for name, layer in run.layers.items()])
            wanted = run.budget(run.method.epochs - 1) if run.method.allocate else sum(
                whole(run.method.density, n) for n in run.sizes.values())  # fmt: skip
            with torch.no_grad():
                rank = _rank([layer.values() for layer in run.layers.values()])
            return {"rank": rank, "spread": float(shares.std()), "off": abs(run.masks().count - wanted)}

        return run.trainable, run.epoch, run.observe, told

    return _Hung(make, ask)


def _lora(model: nn.Module, epochs: int, seed: int) -> Any:
    sites = linears(model)
    pairs = {n: LowRank(s.shape, RANK, seed=seed, name=n) for n, s in sites.items()}
    return branched(model, sites, pairs, train=("head",))


def _random(model: nn.Module, epochs: int, seed: int) -> Any:
    sites = linears(model)
    return branched(model, sites, {n: RandomlyMasked(s.shape, 0.2, seed, n) for n, s in sites.items()}, train=("head",))


def _of_branches(run: Any) -> Attached:
    return (
        run.trainable,
        lambda epoch: None,
        lambda: None,
        lambda: {"rank": _rank([b.delta() for b in run.branches.values()])},
    )


def _text(sparse: bool) -> Callable[[int, str], dict[str, float]]:
    """MiniLM, 8 shots of WordNet's 15 verb classes, queries and values tuned. At smoke scale the images stand in."""

    def run(seed: int, scale: str) -> dict[str, float]:
        if scale != "full":
            return _arm(_snella(density=0.5) if sparse else _Hung(_lora, _of_branches))(seed, scale)
        task = tasks.TASKS["verb_class"]()
        model = minilm.label_model(task)
        texts, y = task.few(8, seed)
        ids, test = minilm.token_ids(texts), minilm.rows(task, "test")
        figures = {"before": minilm.accuracy(model, *test)}
        where, epochs = ("query", "value"), 8
        method: Any = Snella(where=where, rank=RANK, epochs=epochs, recompute=False) if sparse else Lora(RANK, RANK, where)
        with method.attach(model, seed=seed) as run:
            optimizer = torch.optim.AdamW(run.trainable, lr=1e-3, weight_decay=0.01)
            order = generator(seed, "order")
            for epoch in range(epochs):
                if sparse:
                    run.epoch(epoch)
                for part in torch.randperm(len(y), generator=order).split(16):
                    optimizer.zero_grad()
                    F.cross_entropy(model(ids[part]), y[part]).backward()
                    if sparse:
                        run.observe()
                    optimizer.step()
            return {**figures, "accuracy": minilm.accuracy(model, *test)}

    return run


def _target(seed: int, scale: str) -> dict[str, float]:
    """The bars of the claim, as an arm to be beaten."""
    return {"off": 0.5}


SNELL: dict[str, Any] = {"kernel": "distance", "allocate": False}
CLAIM = Claim(
    arms={
        "target": _target,
        "probe": _arm(_Plain(False)),
        "full": _arm(_Plain(True)),
        "lora": _arm(_Hung(_lora, _of_branches)),
        "random_mask": _arm(_Hung(_random, _of_branches)),
        "dense_kernel": _arm(_snella(**SNELL, density=1.0)),
        "snell_50": _arm(_snella(**SNELL, density=0.5)),
        "snell_80": _arm(_snella(**SNELL, density=0.2)),
        "snell_90": _arm(_snella(**SNELL, density=0.1)),
        "snella": _arm(_snella(density=0.2)),
        # The twin's kernel is the plain product: as sparse, as many parameters, shared out alike.
        "product": _arm(_snella(density=0.2, kernel="lora")),
        "text_lora": _text(False),
        "text_snella": _text(True),
    },
    method="snella",
    twin="product",
    effects=(
        Effect("its kernel's rank is 8 above LoRA's, of as many parameters", "snella", "lora", "rank", margin=8),
        Effect("layers keep unequal shares", "snella", "snell_80", "spread", margin=0.01),
        Effect("which sum to the budget exactly", "snella", "target", "off", higher=False),
        Effect("SNELLA is no less accurate than LoRA, to a point", "snella", "lora", "accuracy", "quality", -0.01),
        Effect("SNELL at 0.2 is no less accurate than LoRA, to a point", "snell_80", "lora", "accuracy", "quality", -0.01),
        Effect("SNELLA is better than SNELL at the same density", "snella", "snell_80", "accuracy", "quality"),
        Effect("sparse is better than dense", "snell_80", "dense_kernel", "accuracy", "quality"),
        Effect("competition is better than a random mask", "snella", "random_mask", "accuracy", "quality"),
        Effect("better than a new head alone", "snella", "probe", "accuracy", "quality"),
        Effect("on MiniLM no less accurate than LoRA, to a point", "text_snella", "text_lora", "accuracy", "quality", -0.01),
    ),
    seeds=(0, 1, 2),
    paper="FGVC, ViT-B/16: SNELLA 91.9, SPT-LoRA 90.1",
    needs=(*recogniser.NEEDS, "lab:recogniser_garments", minilm.NEEDS, tasks.NEEDS["verb_class"]),
    trains=True,
)
