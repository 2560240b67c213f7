"""Needles in real prose for a model with a tokenizer: contexts of exactly so many tokens, many questions each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.lab.text import topics_split

WORDS = tuple(
    "amber anchor apple arrow autumn bamboo basket beacon berry bottle bridge bronze butter button candle canyon carpet "
    "castle cedar cherry circle clover cobalt copper coral cotton crystal desert diamond dragon eagle ember falcon feather "
    "forest garden ginger glacier hammer harbor honey island ivory jacket jasmine kettle ladder lantern lemon magnet maple "
    "marble meadow mirror needle nickel ocean olive orchid oyster paper pearl pepper piano pillow planet pocket prairie "
    "quartz rabbit river rocket saddle salmon shadow silver spider summer thunder tiger tunnel valley velvet violet walnut "
    "whale willow window winter yellow zebra".split()
)


@dataclass(frozen=True, eq=False)
class Haystack:
    """One context (1, length) int64 and what is asked of it: questions[i] (q,) and answers[i] (a,), int64.

    spans[i]: half-open place of the i-th question's needle in the context.
    """

    context: Tensor
    questions: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    spans: tuple[tuple[int, int], ...]


def haystack(
    tokenizer: Any, length: int, *, needles: int = 32, digits: int = 4, seed: int = 0, text: str | None = None
) -> Haystack:
    """Prose of exactly `length` tokens with `needles` sentences at borders of lines, each asked for once.

    text: the held-out help topics unless given. Raises BadInput when the needles do not fit or the text is too short.
    """
    if not 1 <= needles <= len(WORDS):
        raise BadInput(f"a haystack can hold 1 to {len(WORDS)} needles, not {needles}")
    rng = np.random.default_rng([seed, length, needles])

    def ids(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])

    words = [WORDS[i] for i in rng.permutation(len(WORDS))[:needles]]
    numbers = [int(rng.integers(10 ** (digits - 1), 10**digits)) for _ in words]
    sentences = [ids(f"The special magic number for {w} is {v}.\n") for w, v in zip(words, numbers, strict=True)]
    prose = _prose(tokenizer, topics_split()[1] if text is None else text)
    room = length - sum(map(len, sentences))
    if room < 1 or room >= len(prose):
        raise BadInput(f"{needles} needles in {length} tokens leave {room} for prose, of which there are {len(prose)}")
    # Needles stand between lines: a place in the middle of a word would be no prose any more.
    breaks = _breaks(tokenizer, prose)
    starts = breaks[breaks < len(prose) - room]
    start = int(starts[rng.integers(len(starts))]) if len(starts) else 0
    inside = breaks[(breaks >= start) & (breaks < start + room)] - start
    if not len(inside):
        raise BadInput(f"the text has no line break in {room} tokens")
    cuts = np.sort(rng.choice(inside, needles, replace=len(inside) < needles))
    row: list[int] = []
    spans, before = [], 0
    for cut, sentence in zip(cuts.tolist(), sentences, strict=True):
        row += prose[start + before : start + cut]
        spans.append((len(row), len(row) + len(sentence)))
        row += sentence
        before = cut
    row += prose[start + before : start + room]
    order = rng.permutation(needles)
    # A question and the beginning of its answer: of the forms tried, SmolLM2-135M answers most of these.
    asked = [ids(f"\nWhat is the special magic number for {w}? The special magic number for {w} is ") for w in words]
    told = [ids(str(v)) for v in numbers]
    return Haystack(
        torch.tensor([row]),
        tuple(torch.tensor(asked[i]) for i in order),
        tuple(torch.tensor(told[i]) for i in order),
        tuple(spans[i] for i in order),
    )


def _prose(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _breaks(tokenizer: Any, ids: list[int]) -> np.ndarray:
    """Places right after a token that ends a line."""
    ends = {i for i in set(ids) if tokenizer.decode([i]).endswith("\n")}
    return np.array([at + 1 for at, i in enumerate(ids) if i in ends])
