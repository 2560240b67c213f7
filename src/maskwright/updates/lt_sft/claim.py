"""LT-SFT's claim: the entries that moved most learn a rare language better than as many others, and add up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.budget import whole
from maskwright.core.method import Claim, Effect
from maskwright.core.pattern import Unstructured
from maskwright.core.select import select
from maskwright.lab import guides, text
from maskwright.lab import train as loop
from maskwright.lab.encoder import CLS, LENGTH, SPECIAL, Encoder, Reader, masked_rows, stream, token_ids
from maskwright.lab.made import made
from maskwright.updates import Deltas, add, delta
from maskwright.updates.lt_sft import LtSft
from maskwright.updates.twophase import Phase

METHOD, SOURCE, TARGETS = "lt_sft", "en", ("da", "pt")  # the targets are a hundredth of the base's training rows each
NAMES, DENSITY = (SOURCE, *TARGETS), 0.01  # the sheet's "small k"
# Half the rate that the base was trained at. Decay moves an entry of which only the gradient is masked.
ADAM: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "clip": 1.0}
# Embeddings are maskable, norms are not, and the masked LM's output is frozen: it is its head.
WHERE = tuple(f"encoder.{part}" for part in ("positions", "inlet.weight", "blocks.*.attention.*", "blocks.*.mlp.*"))
LANGUAGE = LtSft(density=DENSITY, where=WHERE, full_l1=0.1, sparse_l1=0.1)  # the pull is the paper's for languages
TASK = LtSft(density=DENSITY, where=WHERE, full=("head.*",))
Rows = tuple[Tensor, Tensor]
Figures = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Side:
    """Texts by language: `streams` to learn it from, `held` to tell its loss on, and `rows(language, side)` of the task."""

    streams: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    rows: Callable[[str, str], Rows]
    classes: int
    language: tuple[int, int]  # steps of a phase, rows a batch
    task: tuple[int, int]


class FrozenOutput(nn.Module):
    """The masked LM with the base's own output, as in the paper's recipes. Tied to the embedding, every step would push
    all tokens of all other languages away, and those entries move most."""

    def __init__(self, encoder: Encoder, output: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("output", output.detach().clone())

    def forward(self, x: Rows) -> Tensor:
        hidden = self.encoder(x[0])
        at = hidden.gather(1, x[1][..., None].expand(-1, -1, hidden.shape[-1]))
        return F.linear(at, self.output, self.encoder.bias)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Fit:
    """What came of two phases. dense: all that the full phase changed (nothing for Rand-SFT, which has none).

    off: how far the number of selected entries is from what was asked. strayed: others that are not theta_0's to the bit.
    """

    deltas: Deltas
    dense: Deltas
    off: int
    strayed: int


@cache
def _side(scale: str) -> Side:
    if scale == "full":

        def chapters(language: str, side: str) -> Rows:
            texts, y = guides.chapter_rows(language, side)
            return token_ids(texts), torch.tensor(y)

        streams, held = ({name: stream(name, side) for name in NAMES} for side in ("train", "test"))
        return Side(streams, held, cache(chapters), len(guides.CHAPTERS), (120, 16), (150, 16))
    # Python's help topics, and ciphers of them for the other languages: nothing is fetched.
    letters, body = "abcdefghijklmnopqrstuvwxyz", "".join(body[:400] for _, body in text.python_topics()[:8])
    turned = {name: body.translate(str.maketrans(letters, letters[k:] + letters[:k])) for k, name in enumerate(NAMES)}
    streams = {name: torch.tensor([len(SPECIAL) + byte for byte in found.encode()]) for name, found in turned.items()}

    pieces = {name: F.pad(ids[: 16 * (LENGTH - 1)].view(16, -1), (1, 0), value=CLS) for name, ids in streams.items()}
    return Side(streams, streams, lambda language, side: (pieces[language], torch.arange(16) % 3), 3, (2, 4), (2, 4))


@cache
def _base(scale: str) -> Encoder:
    """One for all seeds: the seed steers the fine-tuning."""
    return cast(Encoder, made("guide_encoder")) if scale == "full" else Encoder(layers=1, width=16, heads=2).eval()


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where two float32 tensors are not the same to the bit."""
    return one.view(torch.int32) != other.view(torch.int32)


def _fit(method: LtSft, model: nn.Module, draw: Any, sizes: tuple[int, int], seed: int, least: Deltas | None = None) -> Fit:
    """Both phases on a model (changed in place). least: the full phase's changes, to select the least of (the twin)."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    full: dict[str, Tensor] = {}

    def train(phase: Phase) -> None:
        loop.train(
            phase.model, draw, steps=sizes[0], batch=sizes[1], seed=2 * seed + (phase.name == "sparse"), **ADAM,
            warmup=max(1, sizes[0] // 20), loss_fn=lambda out, y: loop.cross_entropy(out, y) + phase.penalty(),
            context=lambda _, optimizer: phase.restrict(optimizer),
        )  # fmt: skip
        if phase.name == "full":
            full.update({name: value.clone() for name, value in phase.model.state_dict().items()})

    with method.attach(model, seed=seed) as run:
        if least is None:
            deltas = run.fit(train, l1=(method.full_l1, method.sparse_l1))
        else:
            still = -torch.cat([least[name].dense().abs().flatten() for name in run.maskable])
            keep = select(still, Unstructured(), run.count).keep.split([weight.numel() for weight in run.maskable.values()])
            run.kept = {n: part.view_as(weight) for (n, weight), part in zip(run.maskable.items(), keep, strict=True)}
            train(Phase("sparse", run, method.sparse_l1))
            deltas = run.deltas()
        masks, head = run.masks(), set(run.whole)
    strayed = 0
    for name, value in model.state_dict().items():
        if name not in head:
            moved = _differ(value, start[name])
            strayed += int((moved & ~masks[name].keep if name in masks else moved).sum())
    dense = delta(full, start, full=method.full) if full else Deltas({})
    return Fit(deltas, dense, abs(masks.count - whole(DENSITY, masks.total)), strayed)


@cache
def _language(arm: str, name: str, seed: int, scale: str) -> Fit:
    """A language's delta: by the method, by chance (Rand-SFT), or of the entries that moved least (the twin)."""
    side, base = _side(scale), _base(scale)
    model, draw = FrozenOutput(copy.deepcopy(base), base.inlet.weight), masked_rows({name: side.streams[name]}, {name: 1.0})
    least = _language(METHOD, name, seed, scale).dense if arm == "least_moved" else None
    own = 10 * seed + NAMES.index(name)  # or chance would draw the same entries for two languages
    return _fit(replace(LANGUAGE, chance=arm == "chance"), model, draw, side.language, own, least)


def _reader(seed: int, scale: str) -> Reader:
    return Reader(copy.deepcopy(_base(scale)), _side(scale).classes, seed=seed).eval()


@cache
def _task(seed: int, scale: str) -> Fit:
    """The task's delta, trained on English rows on top of English's delta: it goes on any other language's."""
    side, model = _side(scale), _reader(seed, scale)
    add(model, _language(METHOD, SOURCE, seed, scale).deltas)
    return _fit(TASK, model, side.rows(SOURCE, "train"), side.task, 10 * seed + 9)


@torch.no_grad()
def _loss(model: Reader, name: str, scale: str) -> float:
    """Masked-LM loss (nats a hidden token) on held-out text: the same rows and places for every arm and seed."""
    draw = masked_rows({name: _side(scale).held[name]}, {name: 1.0})
    (ids, where), target = draw(256 if scale == "full" else 8, torch.Generator().manual_seed(0))  # type: ignore[misc]
    return float(loop.cross_entropy(FrozenOutput(model.encoder, _base(scale).inlet.weight)((ids, where)), target))


def _measure(seed: int, scale: str, languages: Mapping[str, Deltas], task: Deltas | None = None) -> dict[str, float]:
    """Figures with each of `languages` alone on the base, and with `task` beside; means over the targets. Then what is
    `left_behind`: entries that are not what they were, to the bit."""
    model, found = _reader(seed, scale), {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in languages or TARGETS:
        terms = [languages[name]] if languages else []
        with add(model, *terms):
            found[f"loss_{name}"] = _loss(model, name, scale)
        if task is not None:
            # The task's delta was made for the base with English on it, so the bases cannot be compared.
            with add(model, task, *terms, check="none"):
                found[f"accuracy_{name}"] = loop.accuracy(model, *_side(scale).rows(name, "test"))
                found[f"composed_loss_{name}"] = _loss(model, name, scale)
    kinds = dict.fromkeys(key.rpartition("_")[0] for key in found)
    found |= {kind: sum(found[f"{kind}_{name}"] for name in TARGETS) / len(TARGETS) for kind in kinds}
    found["left_behind"] = sum(int(_differ(value, before[name]).sum()) for name, value in model.state_dict().items())
    return found


def _sparse(arm: str, seed: int, scale: str) -> Figures:
    """A way of choosing a language's entries. The task's delta that goes on top is the method's own in all of them."""
    task = _task(seed, scale)
    fits = {name: _language(arm, name, seed, scale) for name in (NAMES if arm == METHOD else TARGETS)}
    found = _measure(seed, scale, {name: fit.deltas for name, fit in fits.items()}, task.deltas)
    found["overlap"] = fits[TARGETS[0]].deltas.overlap(fits[TARGETS[1]].deltas)
    all_of = [*fits.values(), *([task] if arm == METHOD else [])]
    return {**found, "off": max(fit.off for fit in all_of), "strayed": sum(fit.strayed for fit in all_of)}


def _in_language(seed: int, scale: str) -> Figures:
    """The ceiling: all weights tuned on the target's own rows, as many steps as a phase of the task's."""
    found, side, (steps, batch) = {}, _side(scale), _side(scale).task
    for name in TARGETS:
        model, known = _reader(seed, scale), side.rows(name, "train")
        loop.train(model, known, steps=steps, batch=batch, warmup=max(1, steps // 20), seed=seed, **ADAM)
        found[f"accuracy_{name}"] = loop.accuracy(model, *side.rows(name, "test"))
    return {**found, "accuracy": sum(found.values()) / len(TARGETS)}


def _majority(seed: int, scale: str) -> Figures:
    """Always the class that most English rows have."""
    side = _side(scale)
    most = side.rows(SOURCE, "train")[1].mode().values
    return {"accuracy": sum(float((side.rows(n, "test")[1] == most).float().mean()) for n in TARGETS) / len(TARGETS)}


CLAIM = Claim(
    arms={
        METHOD: partial(_sparse, METHOD),
        "chance": partial(_sparse, "chance"),
        "least_moved": partial(_sparse, "least_moved"),  # the twin selects as many that moved least
        "base": partial(_measure, languages={}),
        "full": lambda seed, scale: _measure(
            seed, scale, {n: _language(METHOD, n, seed, scale).dense for n in TARGETS}, _task(seed, scale).dense
        ),
        "task_alone": lambda seed, scale: _measure(seed, scale, {}, _task(seed, scale).deltas),
        "in_language": _in_language,
        "majority": _majority,
        "target": lambda seed, scale: {"off": 0.5, "strayed": 0.5, "left_behind": 0.5},  # between 0 and 1
    },
    method=METHOD, twin="least_moved",
    effects=(
        Effect("guesses a rare language's held-out words better than the base", METHOD, "base", "loss", higher=False),
        Effect("and better than entries drawn by chance, as many", METHOD, "chance", "loss", higher=False),
        Effect("exactly the asked entries are selected", METHOD, "target", "off", higher=False),
        Effect("no other entry moves by a bit", METHOD, "target", "strayed", higher=False),
        Effect("added and taken off, every bit is back", METHOD, "target", "left_behind", higher=False),
        Effect("two languages share more entries than by chance", METHOD, "chance", "overlap"),
        Effect("the task with the target's delta is better than without", METHOD, "task_alone", "accuracy", "quality"),
        Effect("and above the most frequent class", METHOD, "majority", "accuracy", "quality"),
        Effect("sparse deltas add up no worse than dense ones, to a point", METHOD, "full", "accuracy", "quality", -0.01),
        Effect("with it words are guessed better", METHOD, "task_alone", "composed_loss", "quality", higher=False),
        Effect("tuning all weights on the target's own rows is better", "in_language", METHOD, "accuracy", "quality"),
    ),
    paper="zero-shot POS, mBERT, low-resource languages: LT-SFT 71.1, Rand-SFT 69.2, MAD-X adapters 68.6",
    seeds=(0, 1, 2), needs=(guides.NEEDS,), trains=True,
)  # fmt: skip
