"""SparsePO's claim: the learned mask falls on the tokens that carry the preference, at no cost in reward at matched KL."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Claim, Effect, get
from maskwright.core.select import generator
from maskwright.inputs.pairs import Pairs, PreferenceRun, TokenWeights, logits_of, still
from maskwright.inputs.sparsepo import SparsePo, grammar
from maskwright.inputs.sparsepo.frontier import Attach, Point, World, edge, pairs_of, point, train
from maskwright.lab import text
from maskwright.lab.decoder import llama
from maskwright.lab.train import train as fit

BETA, STEPS, BROWN_STEPS = 0.3, (30, 60, 90), (20, 40, 60)
LR, MASK_LR, L1, BROWN_L1 = 2e-3, 1e-2, 0.003, 0.0
PROMPTS, BROWN_PROMPTS, SAMPLES, LOOKED_AT = 2000, 600, 512, 200
VOCABULARY, CARRIERS, PROMPT, LENGTH = 1200, 40, 4, 20  # of the Brown world
FICTION = {"adventure", "fiction", "mystery", "romance", "science_fiction"}
DENSE = {"government", "learned", "news"}
SPARSE = SparsePo(beta=BETA, l1_u=L1, l1_d=L1)


def reference(vocabulary: int, rows: Tensor, pad: int, steps: int, seed: int, width: int) -> nn.Module:
    """A small language model of the rows (n, length), frozen."""
    model = llama(vocabulary, layers=2, width=width, heads=4, kv_heads=2, hidden=2 * width, context=32, seed=seed)

    def loss(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out.logits.flatten(0, 1), y.flatten(), ignore_index=pad)

    fit(model, (rows[:, :-1], rows[:, 1:]), steps=steps, batch=64, lr=3e-3, optimizer="adamw", warmup=steps // 10,
        seed=seed, loss_fn=loss)  # fmt: skip
    return model.requires_grad_(False)


def _world(model: nn.Module, prompts: Tensor, worth: Tensor, pad: int, end: int, length: int, sizes: tuple[int, ...],
           rng: torch.Generator) -> World:  # fmt: skip
    """Prompts are cut in three: for pairs, for pairs to look at, for samples."""
    for_pairs, for_looks, for_samples = prompts.split(sizes)
    pairs, looked_at = (pairs_of(model, p, worth, length, pad, end, rng) for p in (for_pairs, for_looks))
    return World(model, pairs, looked_at, for_samples, worth, pad, end, length)


@cache
def grammar_world(seed: int, scale: str) -> World:
    full, rng = scale == "full", generator(seed, "grammar")
    rows = grammar.sentences(4000 if full else 64, rng)
    model = reference(len(grammar.WORDS), rows, grammar.PAD, 400 if full else 2, seed, 64 if full else 16)
    sizes = (PROMPTS, LOOKED_AT, SAMPLES) if full else (16, 16, 8)
    prompts = grammar.sentences(sum(sizes), rng)[:, : grammar.PROMPT]
    return _world(model, prompts, grammar.worth(), grammar.PAD, grammar.END, grammar.LENGTH, sizes, rng)


@cache
def _brown() -> tuple[Tensor, Tensor, Tensor]:
    """(rows to learn from, prompts of other files, worth): Brown in lower case, its commonest words, 0 = pad, 1 = others.

    worth: a logistic regression tells sentences of fiction from those of news, government and learned prose by their
    words; the CARRIERS words of greatest weight keep it, the others are worth 0. The greatest weight is 1.
    """
    files = [(file.genre, [re.findall(r"[a-z']+|[.,;?!]", line.lower()) for line in file.text.split("\n")])
             for file in text.brown()]  # fmt: skip
    common = Counter(word for _, lines in files for line in lines for word in line).most_common(VOCABULARY - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(common)}
    told = [[(genre, torch.tensor([number.get(word, 1) for word in line])) for line in lines if len(line) > PROMPT]
            for genre, lines in files]  # fmt: skip
    kept, held = ([line for i, lines in enumerate(told) if (i % 4 == 3) == side for line in lines] for side in (False, True))
    stream = torch.cat([line for _, line in kept])
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    prompts = torch.stack([line[:PROMPT] for _, line in held])
    return rows, prompts[(prompts != 1).all(1)], _judge([pair for pair in kept if pair[0] in FICTION | DENSE])


def _judge(lines: list[tuple[str, Tensor]]) -> Tensor:
    x = torch.stack([torch.bincount(line, minlength=VOCABULARY).clamp_max(1).float() for _, line in lines])
    x[:, :2] = 0
    y = torch.tensor([float(genre in FICTION) for genre, _ in lines])
    weight, bias = torch.zeros(VOCABULARY, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=30)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + 1e-3 * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = weight.detach()
    least = found.abs().sort(descending=True).values[CARRIERS - 1]
    return torch.where(found.abs() >= least, found, 0.0) / found.abs().max()


@cache
def brown_world(seed: int, scale: str) -> World:
    """Full scale only: a smoke run takes the grammar's."""
    _, prompts, worth = _brown()
    rng = generator(seed, "brown")
    sizes = (BROWN_PROMPTS, LOOKED_AT, SAMPLES // 2)
    chosen = prompts[torch.randperm(len(prompts), generator=rng)[: sum(sizes)]]
    return _world(_brown_model(), chosen, worth, 0, -1, LENGTH, sizes, rng)


@cache
def _brown_model() -> nn.Module:
    """One for all seeds, which move the pairs, the batches and the samples."""
    return reference(VOCABULARY, _brown()[0], 0, 600, 0, 96)


@contextmanager
def _oracle(world: World, policy: nn.Module, model: nn.Module) -> Iterator[PreferenceRun]:
    """The mask is 1 on the tokens that carry the preference and 0 elsewhere."""

    def read(pairs: Pairs) -> tuple[Tensor, TokenWeights]:
        carries = (world.worth[pairs.ids[:, 1:]] != 0).float()
        with torch.no_grad():
            return logits_of(model, pairs).logits, TokenWeights(carries, carries)

    with still(model, policy):
        yield PreferenceRun(policy, read, BETA)


@cache
def _curve(arm: str, brown: bool, seed: int, scale: str) -> tuple[list[Point], dict[str, float]]:
    """The reference's own point, then the policy's after each number of steps; what its mask looks like after the last."""
    full = scale == "full"
    world = (brown_world if brown and full else grammar_world)(seed, scale)
    steps = (1,) if not full else BROWN_STEPS if brown else STEPS
    attach = _method("brown" if brown and arm == "common" else arm, world, seed)
    points, looked = train(world, attach, steps, seed, lr=LR, mask_lr=MASK_LR, flip=arm == "flipped")
    return [point(world, world.reference, seed), *points], looked


def _method(arm: str, world: World, seed: int) -> Attach:
    if arm == "oracle":
        return partial(_oracle, world)
    if arm in ("dpo", "tdpo1"):
        return get("dpo")(beta=BETA, form=arm).attach  # type: ignore[no-any-return]
    method = {
        "common": SPARSE, "flipped": replace(SPARSE, l1_u=0.0, l1_d=0.0, ceiling=4.0),
        "more_l1": replace(SPARSE, l1_u=3 * L1, l1_d=3 * L1),
        "brown": replace(SPARSE, l1_u=BROWN_L1, l1_d=BROWN_L1), "independent": replace(SPARSE, mask="independent"),
        "mapo": SparsePo(mask="mapo", beta=BETA), "random": SparsePo(mask="random", beta=BETA),
    }[arm]  # fmt: skip
    return partial(method.attach, seed=seed)


def _arm(arm: str, seed: int, scale: str, *, brown: bool = False) -> dict[str, float]:
    """edge: lead in score over DPO at the same divergence. kl, reward: after the last step."""
    points, looked = _curve(arm, brown, seed, scale)
    kl, reward = points[-1]
    return {"edge": edge(points, _curve("dpo", brown, seed, scale)[0]), "kl": kl, "reward": reward, **looked}


def _bound(seed: int, scale: str) -> dict[str, float]:
    """What the sheet asks of a mask; zeros: more than a rounding."""
    return {"auc": 0.6, "zeros": 0.01}


NAMES = ("dpo", "tdpo1", "oracle", "random", "mapo", "independent", "more_l1")
CLAIM = Claim(
    arms={
        **{name: partial(_arm, name) for name in NAMES},
        "sparsepo": partial(_arm, "common"),
        "flipped": partial(
            _arm, "flipped"
        ),  # the mask network climbs where it should descend, bounded so that nothing overflows
        "brown_dpo": partial(_arm, "dpo", brown=True),
        "brown_sparsepo": partial(_arm, "common", brown=True),
        "bound": _bound,
    },
    method="sparsepo",
    twin="flipped",
    effects=(
        Effect("the mask falls on the tokens that carry the preference: AUC above 0.6", "sparsepo", "bound", "auc"),
        Effect("weights are exactly 0 for some tokens", "sparsepo", "bound", "zeros"),
        Effect("reward at matched KL no worse than DPO's, by 0.05 of the score", "sparsepo", "dpo", "edge", margin=-0.05),
        Effect("three times the penalty, more zeros", "more_l1", "sparsepo", "zeros", "quality"),
        Effect("reward at matched KL no worse than TDPO1's", "sparsepo", "tdpo1", "edge", "quality", margin=-0.05),
        Effect("the regime is right: a mask that knows the tokens beats DPO", "oracle", "dpo", "edge", "quality"),
        Effect("a random mask is not better than DPO", "dpo", "random", "edge", "quality", margin=-0.05),
        Effect("two networks: AUC above 0.6", "independent", "bound", "auc", "quality"),
        Effect("two networks: no worse than DPO", "independent", "dpo", "edge", "quality", margin=-0.05),
        Effect("MaPO: AUC above 0.6", "mapo", "bound", "auc", "quality"),
        Effect("MaPO: no worse than DPO", "mapo", "dpo", "edge", "quality", margin=-0.05),
        Effect("Brown: AUC above 0.6", "brown_sparsepo", "bound", "auc", "quality"),
        Effect("Brown: no worse than DPO", "brown_sparsepo", "brown_dpo", "edge", "quality", margin=-0.05),
    ),
    paper="GPT-2 large, IMDB sentiment: reward against KL no worse than DPO's; TL;DR +10, HH +3 points of win rate",
    needs=(f"npm:{text.BROWN}",),
    trains=True,
)
