"""Sparse MeZO's claim: a mask of density 1/4 takes about four times the dense rate and ends close to it.

A character MLP trained on the standard library's source and then rescaled unit by unit (its function unchanged, its small
weights now the steep ones) is adapted to prose by zeroth-order steps. Each mask has its own rate, searched on validation
text over steps of 2 until the best lies inside. Which mask wins at its own rate is listed, not gated: see README.
So is all that worlds.py finds on MiniLM and on a ViT of the lab.
"""

import importlib.util
import math
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Claim, Effect
from maskwright.core.select import generator
from maskwright.lab import images, minilm, recogniser, tasks
from maskwright.lab.made import made
from maskwright.lab.models import seeded
from maskwright.lab.text import Chars, python_chars
from maskwright.lab.train import char_windows, cross_entropy, loss_of, train
from maskwright.updates.sparse_mezo import Log, SparseMezo
from maskwright.updates.sparse_mezo.worlds import TopLayers, World, arms, effects, search

CONTEXT, DENSITY, UNIT = 16, 0.25, 1e-5
EQUAL = 0  # the shared small rate of effect (b), UNIT * 2^0: half the dense best or less (one pilot), as in the sheet
START = {"dense": 1, "random": 3, "small": 2, "large": 6}  # where each search begins, in octaves: the sheet's ratios
MODULES = """argparse ast bdb calendar cmd codecs configparser copy csv datetime decimal difflib doctest enum fractions
ftplib functools gettext heapq inspect locale mailbox optparse pathlib pdb pickle plistlib platform pydoc random
shutil smtplib statistics subprocess tarfile tempfile textwrap threading tokenize traceback typing uuid zipfile""".split()


class CharMlp(nn.Module):
    """(batch, CONTEXT) character numbers -> (batch, letters) logits of the next; two hidden ReLU layers, no skip."""

    def __init__(self, letters: int, width: int, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.inlet = nn.Embedding(letters, 16)
            self.first, self.second = nn.Linear(16 * CONTEXT, width), nn.Linear(width, width)
            self.head = nn.Linear(width, letters)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.relu(self.first(self.inlet(ids).flatten(1)))
        return self.head(torch.relu(self.second(hidden)))

    @torch.no_grad()
    def rescale(self, seed: int) -> None:
        """Each hidden unit times exp(0.8 N(0, 1)), the next layer's column by the inverse: the same function."""
        for layer, after in ((self.first, self.second), (self.second, self.head)):
            scale = torch.exp(0.8 * torch.randn(layer.out_features, generator=generator(seed, "rescale")))
            layer.weight.mul_(scale[:, None])
            layer.bias.mul_(scale)
            after.weight.div_(scale)


@cache
def _prose() -> Chars:
    return python_chars()


@cache
def _source(scale: str) -> Tensor:
    """Python's own source as character numbers, letters that the prose lacks left out."""
    vocabulary = {letter: number for number, letter in enumerate(_prose().vocabulary)}
    numbers: list[int] = []
    for name in MODULES if scale == "full" else MODULES[:1]:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            text = Path(spec.origin).read_text(encoding="utf-8")
            numbers += [vocabulary[letter] for letter in text if letter in vocabulary]
    return torch.tensor(numbers)


def _next(draw):  # type: ignore[no-untyped-def]
    """Windows and the one character after them."""

    def of(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = draw(batch, rng)
        return x, y[:, -1]

    return of


@cache
def _made(seed: int, scale: str) -> tuple[dict[str, Tensor], int]:
    width, steps = (256, 3000) if scale == "full" else (16, 5)
    model = CharMlp(len(_prose().vocabulary), width, seed)
    draw = _next(char_windows(_source(scale), CONTEXT))
    train(model, draw, steps=steps, batch=256, lr=2e-3, optimizer="adamw", warmup=steps // 20, seed=seed)
    model.rescale(seed)
    return model.state_dict(), width


def _model(seed: int, scale: str) -> CharMlp:
    state, width = _made(seed, scale)
    model = CharMlp(len(_prose().vocabulary), width, seed)
    model.load_state_dict(state)
    return model.eval()


@cache
def _held_out(scale: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(validation, test): windows of the two halves of the held-out prose."""
    ids, rng, count = _prose().val, torch.Generator().manual_seed(0), 8192 if scale == "full" else 64
    halves = (ids[: len(ids) // 2], ids[len(ids) // 2 :])
    first, second = (_next(char_windows(half, CONTEXT))(count, rng) for half in halves)
    return first, second


def _measure(model: CharMlp, scale: str) -> tuple[float, float]:
    val, test = (loss_of(model, *part, batch=2048) for part in _held_out(scale))
    return tuple(loss if math.isfinite(loss) else math.inf for loss in (val, test))  # type: ignore[return-value]


def _tuned(mask: str, octave: float, seed: int, scale: str) -> tuple[CharMlp, Log]:
    """The model after a run at rate UNIT * 2^octave. All runs of a seed see the same batches, directions and noise."""
    model, rng = _model(seed, scale), torch.Generator().manual_seed(seed)
    draw = _next(char_windows(_prose().train, CONTEXT))
    method = SparseMezo(density=DENSITY, lr=UNIT * 2.0**octave, mask=mask)  # type: ignore[arg-type]
    with method.attach(model, seed=seed) as run:
        for _ in range(2000 if scale == "full" else 2):
            x, y = draw(128, rng)
            run.step(lambda x=x, y=y: cross_entropy(model(x), y))  # type: ignore[misc]
    return model, run.log


def _searched(mask: str, seed: int, scale: str) -> dict[str, float]:
    found: dict[int, tuple[float, float]] = {}
    replayed: list[float] = []

    def at(octave: int) -> float:
        if octave not in found:
            model, log = _tuned(mask, octave, seed, scale)
            found[octave] = _measure(model, scale)
            if octave == START[mask]:
                replayed.append(_replayed(log, model, seed, scale))
        return found[octave][0]

    full = scale == "full"  # at least five rates, two on each side of the best
    best = search(at, START[mask], reach=2 if full else 1, moves=8 if full else 1)
    low, mid, high = at(best - 1), at(best), at(best + 1)
    # The parabola's lowest point between the neighbours, so that the figure is finer than the grid.
    bend = low - 2 * mid + high
    shift = 0.5 * (low - high) / bend if math.isfinite(bend) and bend > 0 else 0.0
    at(EQUAL)
    told = {"octave": best + shift, "loss": found[best][1], "equal_loss": found[EQUAL][1]}
    return {**told, "rates": float(len(found)), "replayed": replayed[0]}


def _replayed(log: Log, model: CharMlp, seed: int, scale: str) -> float:
    """1 when the log of all steps makes the trained weights again from the first ones, to the bit."""
    again = _model(seed, scale)
    log.replay(again)
    return float(all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)))


def _before(seed: int, scale: str) -> dict[str, float]:
    loss = _measure(_model(seed, scale), scale)[1]
    return {"loss": loss, "equal_loss": loss, "replayed": 0.0}


def _adamw(seed: int, scale: str) -> dict[str, float]:
    """The ceiling: as many batches with gradients, the rate chosen the same way."""
    found = []
    draw = _next(char_windows(_prose().train, CONTEXT))
    for lr in (3e-4, 1e-3, 3e-3) if scale == "full" else (1e-3,):
        model, steps = _model(seed, scale), 2000 if scale == "full" else 2
        train(model, draw, steps=steps, batch=128, lr=lr, optimizer="adamw", seed=seed)
        found.append(_measure(model, scale))
    return {"loss": min(found)[1]}


TEXT, IMAGES, LAYERS = "verb_class", "recogniser", 1
# Where the searches begin: a pilot of seed 0; large an octave above small, as in the sheet. A forward of MiniLM is dear:
# no random mask there.
TEXT_START = {"dense": 4, "small": 5, "large": 6}
IMAGES_START = {"dense": 1, "random": 1, "small": 1, "large": 2}


@cache
def _states(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of a part of the text task, what goes into MiniLM's last layer for them, and their classes."""
    ids, y = minilm.rows(tasks.TASKS[TEXT](), part)
    return ids, TopLayers.states(minilm.base()[0].eval(), ids, LAYERS), y


def _text(seed: int) -> World:
    """MiniLM's last layer on WordNet's 15 verb classes; the seed moves batches, directions and the random mask."""
    (ids, *train), val, test = _states("train"), _states("val")[1:], _states("test")[1:]
    model = TopLayers(minilm.base()[0], minilm.label_head(TEXT), minilm.SCALE, LAYERS)

    def order():  # type: ignore[no-untyped-def]
        draw = minilm.draw(ids, torch.arange(len(ids)))  # texts of like length
        return lambda batch, rng: draw(batch, rng)[1]

    return World(model, (train[0], train[1]), val, test, 150, order)


def _images(seed: int) -> World:
    """The lab's ViT, which knows garments and MNIST, on scikit-learn's digits in MNIST's frame; one ViT for all seeds."""
    data = images.digits()
    x, test = (F.pad(F.interpolate(p, size=(20, 20), mode="bilinear"), (4,) * 4) for p in (data.train_x, data.test_x))
    y, held = data.train_y + 10, torch.arange(len(x)) % 4 == 0  # classes 10 to 19 of the recogniser
    return World(made(IMAGES, 0), (x[~held], y[~held]), (x[held], y[held]), (test, data.test_y + 10), 90)


CLAIM = Claim(
    arms={
        "before": _before,
        "dense": partial(_searched, "dense"),
        "random": partial(_searched, "random"),
        "small": partial(_searched, "small"),
        "large": partial(_searched, "large"),  # the broken twin: the threshold turned round
        "adamw": _adamw,
        **arms("text", _text, TEXT_START),
        **arms("vit", _images, IMAGES_START),
    },
    method="small",
    twin="large",
    effects=(
        Effect(
            "a random quarter's best rate is more than 2 x the dense one (4 x expected)",
            "random",
            "dense",
            "octave",
            margin=1,
        ),
        Effect("a random quarter ends within 0.01 nats of dense", "random", "dense", "loss", margin=-0.01, higher=False),
        Effect("rescaled, at one small rate: small before random", "small", "random", "equal_loss", higher=False),
        Effect("rescaled, at one small rate: random before large", "random", "large", "equal_loss", higher=False),
        Effect("lowers the held-out loss at its own rate", "small", "before", "loss", higher=False),
        Effect("the log makes the same weights again", "small", "before", "replayed", margin=0.5),
        Effect("gradients lower the loss further", "adamw", "small", "loss", higher=False),
        Effect("small before dense, each at its own rate", "small", "dense", "loss", "quality", higher=False),
        Effect("small before large, each at its own rate", "small", "large", "loss", "quality", higher=False),
        Effect("small before random, each at its own rate", "small", "random", "loss", "quality", higher=False),
        *effects("text", "MiniLM", TEXT_START),
        *effects("vit", "ViT", IMAGES_START),
    ),
    seeds=(0, 1, 2, 3, 4),
    paper="LLaMA-7B, RTE: 9 points and 3.5 x the speed of MeZO (density 0.25); not expected at this scale",
    needs=(*recogniser.NEEDS, minilm.NEEDS, tasks.NEEDS[TEXT]),  # no `lab:`: that makes a model for each seed
    trains=True,
)
