"""One request at a time, measured: its prefill, questions on copies of its cache, text decoded after it, its pairs.

Nothing here decides what is compared; `attend` and benchmarks/attention_model.py do.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Record, Run, State, use
from maskwright.core.errors import BadInput
from maskwright.lab.haystack import Haystack
from maskwright.models.evaluate import loss

HEAD_ROWS = 128  # logits made at a time
STEPS = 4  # decoded tokens whose reads are counted


@dataclass(frozen=True)
class Way:
    """How a model attends: by a method, or (None) dense, as it was loaded."""

    name: str
    method: AttentionMethod | None = None
    impl: str = "auto"
    seed: int = 0

    @contextmanager
    def on(self, model: Any, record: bool = False) -> Iterator[Run | None]:
        """Attend this way inside the context."""
        if self.method is None:
            yield None
            return
        with use(model, self.method, impl=self.impl, seed=self.seed, record=record) as run:
            yield run


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor, float]:
    """(cache, logits of the last position (1, vocabulary), seconds to the first token) of a request ids (1, length)."""
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    logits = out.logits[:, -1]
    int(logits.argmax())
    return out.past_key_values, logits, time.perf_counter() - start


@torch.no_grad()
def needles(model: Any, way: Way, hay: Haystack, stepwise: bool = False) -> dict[str, Any]:
    """One prefill of the context, then every question on a copy of its cache, answered greedily.

    All but a question's last token come in one pass (stepwise: one by one too); that one is decoded, so that a method
    which masks decoding alone has its say in the whole answer. An answer counts as a whole; what follows its first
    wrong token is not decoded. -> {"prefill": seconds, "right": [bool a question], "first": [seconds from the question
    to its first token], "stored": bytes of keys and values}.
    """
    with way.on(model):
        cache, _, seconds = prefill(model, hay.context)
        right, first = [], []
        for question, answer in zip(hay.questions, hay.answers, strict=True):
            past = copy.deepcopy(cache)
            start = time.perf_counter()
            for part in question[:-1].split(1 if stepwise else max(len(question) - 1, 1)):
                model(input_ids=part[None], past_key_values=past, use_cache=True, logits_to_keep=1)
            good = _next(model, past, question[-1]) == int(answer[0])
            first.append(time.perf_counter() - start)
            for before, token in pairwise(answer):
                good = good and _next(model, past, before) == int(token)
            right.append(good)
    return {"prefill": seconds, "right": right, "first": first, "stored": stored_bytes(cache)}


def _next(model: Any, cache: Any, token: Tensor) -> int:
    out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())


@torch.no_grad()
def prose(model: Any, way: Way, ids: Tensor, tail: int) -> dict[str, Any]:
    """One prefill of all but the last `tail` tokens of ids (1, length); these are then decoded one by one, as given.

    -> {"prefill": seconds, "loss": mean over the prefilled tokens, "tail_loss": mean over the decoded ones, "steps":
    [seconds a decoded token], "stored": bytes}. Raises BadInput when a loss is not finite.
    """
    head = ids[:, :-tail]
    with way.on(model):
        hidden: list[Tensor] = []
        body = _body(model)
        handle = body.register_forward_hook(lambda module, args, out: hidden.append(out[0])) if body else None
        try:
            cache, logits, seconds = prefill(model, head)
        finally:
            if handle:
                handle.remove()
        stored = stored_bytes(cache)
        losses, steps = followed(model, cache, logits, ids[0, -tail:])
        del cache
        whole = _chunked(model, hidden[0], head) if hidden else loss(model, [head]).mean
    after = sum(losses) / len(losses)
    if not math.isfinite(whole + after):
        raise BadInput(f"{way.name}: the model's loss is not finite")
    return {"prefill": seconds, "loss": whole, "tail_loss": after, "steps": steps, "stored": stored}


@torch.no_grad()
def followed(model: Any, cache: Any, logits: Tensor, tokens: Tensor) -> tuple[list[float], list[float]]:
    """Losses of `tokens` (n,), each given after it was asked for, and the seconds of the n - 1 steps between."""
    losses, steps = [float(F.cross_entropy(logits.float(), tokens[:1]))], []
    for before, token in pairwise(tokens):
        start = time.perf_counter()
        out = model(input_ids=before.view(1, 1), past_key_values=cache, use_cache=True)
        int(out.logits[0, -1].argmax())
        steps.append(time.perf_counter() - start)
        losses.append(float(F.cross_entropy(out.logits[:, -1].float(), token.view(1))))
    return losses, steps


def _body(model: Any) -> Any:
    """The part under the head where head(body) is all the model does to its logits, else None."""
    body, head = getattr(model, "base_model", None), model.get_output_embeddings()
    if head is None or body is None or body is model:
        return None
    ids = torch.arange(8)[None] % head.weight.shape[0]
    whole = model(input_ids=ids, use_cache=False).logits
    same = torch.allclose(whole, head(body(input_ids=ids, use_cache=False)[0]), rtol=1e-4, atol=1e-4)
    return body if same else None


def _chunked(model: Any, hidden: Tensor, ids: Tensor) -> float:
    head, total, last = model.get_output_embeddings(), 0.0, ids.shape[1] - 1
    for start in range(0, last, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, last)
        logits = head(hidden[0, start:stop]).float()
        total += float(F.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum"))
    return total / last


def stored_bytes(cache: Any) -> int:
    """Bytes of keys and values that a Hugging Face cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


@dataclass
class Counts:
    """What one recorded request read: query-key pairs over all layers and heads, and bytes.

    causal: what the model itself allows; kept: what rows see; computed: whole groups of rows. kept_share[layer][head].
    read and dense_read: bytes of keys and values a decoded token reads with the method and without it.
    pictures: per shown layer and head a (rows, columns) bool tensor of tiles that are read, or per layer one of keys
    kept in the cache (key heads, keys); `what` says which of the three.
    """

    causal: int = 0
    kept: int = 0
    computed: int = 0
    read: float = 0.0
    dense_read: float = 0.0
    kept_share: list[list[float]] = field(default_factory=list)
    what: str = "prefill"
    pictures: dict[int, Tensor] = field(default_factory=dict)


class _Watched(AttentionMethod):
    """A method whose evictions are remembered."""

    def __init__(self, method: AttentionMethod) -> None:
        self.method = method
        self.kept: dict[int, Tensor] = {}

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        return self.method.plan(site, state)

    def evict(self, site: AttentionSite, state: State) -> Tensor | None:
        keep = self.method.evict(site, state)
        if keep is not None:
            self.kept[site.layer] = keep[0].clone()
        return keep


@torch.no_grad()
def counted(model: Any, way: Way, ids: Tensor, tail: int, shown: int = 4) -> Counts:
    """Count what a request reads: prefill of all but `tail` tokens of ids, then a few decoded ones. Slow; not timed.

    Raises BadInput where a method's pairs cannot be counted.
    """
    assert way.method is not None
    watched = _Watched(way.method)
    with way.on(model, record=True) as run:
        assert run is not None
        run.method = watched
        cache, logits, _ = prefill(model, ids[:, :-tail])
        first, run.records = run.records, []
        followed(model, cache, logits, ids[0, -tail:][: STEPS + 1])
        later = run.records
    return counts(first, later, watched.kept, shown)


def counts(first: Sequence[Record], later: Sequence[Record], evicted: dict[int, Tensor], shown: int) -> Counts:
    """The sums over the records of a prefill (one a layer) and of some decoded tokens (layers a token)."""
    told = Counts()
    for record in first:
        heads = len(record.kept)
        told.causal += record.allowed * heads
        told.kept += round(float(record.kept.sum()))
        told.computed += round(float(record.computed.sum()))
        told.kept_share.append([float(kept) / max(record.allowed, 1) for kept in record.kept])
    if later:
        steps = len(later) // len(first)
        told.read = sum(r.kv_read for r in later) / steps
        each = sum(r.kv_stored / r.keys for r in first)  # bytes of one key in all layers
        told.dense_read = each * (first[0].keys + (steps + 1) / 2)
    chosen = [first[round(i * (len(first) - 1) / max(shown - 1, 1))] for i in range(min(shown, len(first)))]
    layers = list(dict.fromkeys(record.layer for record in chosen))
    if evicted:
        told.what, told.pictures = "cache", {layer: evicted[layer] for layer in layers if layer in evicted}
    elif told.kept == told.causal and later:
        told.what = "decode"
        for layer in layers:
            rows = [r.picture[:, -1] for r in later if r.layer == layer]
            width = max(row.shape[-1] for row in rows)
            told.pictures[layer] = torch.stack([F.pad(row, (0, width - row.shape[-1])) for row in rows], 1)
    else:
        told.pictures = {record.layer: record.picture for record in chosen}
    return told
