"""Ask a causal language model the questions of lab/recall.py and lab/haystack.py, in one pass or on its cache.

An answer counts only as a whole, which teacher forcing tells: greedy decoding gives exactly the answer if and only if
every token of it is the greatest after the right ones before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.lab.haystack import Haystack
from maskwright.lab.recall import Recall

Way = Literal["prefill", "decode", "late"]


@torch.no_grad()
def correct(
    model: Any, recall: Recall, way: Way = "prefill", *, batch: int = 32, begin: Callable[[], None] | None = None
) -> Tensor:
    """(n,) bool: whether the model's greedy answer is exactly right.

    way "prefill": prompt and answer in one pass without a cache; "decode": the prompt in one pass, the answer token by
    token on the cache; "late": the question too comes token by token, after the context. `begin()` is called before
    every batch (for a run that keeps state).
    """
    found = []
    for first in range(0, len(recall), batch):
        part = recall.take(slice(first, first + batch))
        if begin is not None:
            begin()
        found.append((_said(model, part, way) == part.answer).all(-1))
    return torch.cat(found)


def accuracy(model: Any, recall: Recall, way: Way = "prefill", *, batch: int = 32) -> float:
    """Share of exactly right answers."""
    return float(correct(model, recall, way, batch=batch).double().mean())


def _said(model: Any, recall: Recall, way: Way) -> Tensor:
    """(n, a) the greatest token at each place of the answer, after the right ones before it."""
    ids, count = torch.cat([recall.prompt, recall.answer[:, :-1]], 1), recall.answer.shape[1]
    if way == "prefill":
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=count).logits
        return logits.argmax(-1)
    if way not in ("decode", "late"):
        raise BadInput(f"way is {way!r}, not one of prefill, decode, late")
    whole = recall.prompt.shape[1] - (recall.question if way == "late" else 0)
    out = model(input_ids=ids[:, :whole], use_cache=True, logits_to_keep=1)
    steps = [out.logits[:, -1].argmax(-1)]  # the first is the answer's own only when the whole prompt was read
    for at in range(whole, ids.shape[1]):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[:, -1].argmax(-1))
    return torch.stack(steps[-count:], 1)


@torch.no_grad()
def retrieved(model: Any, hay: Haystack, *, stepwise: bool = False, limit: int | None = None) -> Tensor:
    """(questions,) bool: one prefill of the context, then every question on a copy of its cache.

    stepwise: the question and the answer come token by token, as in decoding; else in one pass on the cache.
    limit: only the first so many questions.
    """
    cache = model(input_ids=hay.context, use_cache=True, logits_to_keep=1).past_key_values
    found = []
    for question, answer in list(zip(hay.questions, hay.answers, strict=True))[:limit]:
        ids = torch.cat([question, answer[:-1]])[None]
        past = copy.deepcopy(cache)
        if stepwise:
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True) for i in range(ids.shape[1])]
            logits = torch.cat([step.logits for step in steps[-len(answer) :]], 1)
        else:
            logits = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=len(answer)).logits
        found.append(bool((logits[0].argmax(-1) == answer).all()))
    return torch.tensor(found)
