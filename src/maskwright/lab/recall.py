"""Recall tasks with exact lengths: records scattered in real text, one question at the end, a short answer.

Three families on characters: key_value, needle, tracking. What the lab's recall models learn from stands in
lab/lessons.py, how a model is asked in lab/ask.py, and needles in prose for a tokenizer in lab/haystack.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.lab.text import Chars, python_chars

Ask = tuple[str, str]
LETTERS, CAPITALS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, eq=False)
class Recall:
    """Samples of one family, all of one length.

    prompt (n, length) int64 ends with the question, its last `question` characters (or tokens); answer (n, a) int64
    follows it. facts (n, f, 2): half-open spans of the records in the prompt that the answer rests on.
    """

    family: str
    prompt: Tensor
    answer: Tensor
    question: int
    facts: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: slice) -> Recall:
        """Some of the samples."""
        return replace(self, prompt=self.prompt[rows], answer=self.answer[rows], facts=self.facts[rows])


@dataclass(frozen=True)
class Sheet:
    """What one sample says before it is laid into text: its records, what may be asked, which records it rests on."""

    records: tuple[str, ...]
    asks: tuple[Ask, ...]
    facts: tuple[tuple[int, ...], ...]
    end: str


def key_value(length: int, n: int = 64, *, pairs: int = 8, seed: int = 0, text: Tensor | None = None) -> Recall:
    """`@kx=QTB;` pairs in text; asked is `@kx=` of one of them, answered its three capitals."""
    return _draw("key_value", partial(pairs_sheet, pairs), length, n, seed, text)


def needle(length: int, n: int = 64, *, needles: int = 1, seed: int = 0, text: Tensor | None = None) -> Recall:
    """Sentences `(the code of kx is QTB)` in text, the question its beginning: a record 23 characters wide."""
    return _draw("needle", partial(needles_sheet, needles), length, n, seed, text)


def tracking(
    length: int, n: int = 64, *, chains: int = 2, hops: int = 2, seed: int = 0, text: Tensor | None = None
) -> Recall:
    """Chains `%ab>QTB; %cd>ab; %ef>cd;` in text, asked `?ef>`: all names down to the value, `cd>ab>QTB`."""
    return _draw("tracking", partial(chains_sheet, chains, hops), length, n, seed, text)


FAMILIES: dict[str, Callable[..., Recall]] = {"key_value": key_value, "needle": needle, "tracking": tracking}


def _names(rng: np.random.Generator, count: int) -> list[str]:
    # Both letters of every name are its own among the sample's names, so that either of them tells it apart.
    if not 1 <= count <= len(LETTERS):
        raise BadInput(f"a sample can hold 1 to {len(LETTERS)} names, not {count}")
    first, second = (rng.permutation(len(LETTERS))[:count] for _ in range(2))
    return [LETTERS[a] + LETTERS[b] for a, b in zip(first, second, strict=True)]


def _code_word(rng: np.random.Generator) -> str:
    return "".join(CAPITALS[i] for i in rng.integers(26, size=3))


def pairs_sheet(count: int, rng: np.random.Generator) -> Sheet:
    """What key_value lays out."""
    asks = tuple((f"@{name}=", _code_word(rng)) for name in _names(rng, count))
    return Sheet(tuple(f"{ask}{answer};" for ask, answer in asks), asks, tuple((i,) for i in range(count)), ";")


def needles_sheet(count: int, rng: np.random.Generator) -> Sheet:
    """What needle lays out."""
    asks = tuple((f"(the code of {name} is ", _code_word(rng)) for name in _names(rng, count))
    return Sheet(tuple(f"{ask}{answer})" for ask, answer in asks), asks, tuple((i,) for i in range(count)), ")")


def chains_sheet(chains: int, hops: int, rng: np.random.Generator) -> Sheet:
    """What tracking lays out: every chain in its own order, the value first, the chains mixed."""
    names, each = _names(rng, chains * (hops + 1)), hops + 1
    records: list[tuple[int, str]] = []  # the record's chain and text
    asks = []
    for chain in range(chains):
        mine = [*names[chain * each : chain * each + each], _code_word(rng)]  # asked name, ..., last name, value
        records += [(chain, f"%{a}>{b};") for a, b in reversed(list(pairwise(mine)))]
        asks.append((f"?{mine[0]}>", ">".join(mine[1:])))
    left = [[i for i, (chain, _) in enumerate(records) if chain == c] for c in range(chains)]
    laid = [left[int(chain)].pop(0) for chain in rng.permutation(np.repeat(np.arange(chains), each))]
    facts = tuple(tuple(at for at, i in enumerate(laid) if records[i][0] == chain) for chain in range(chains))
    return Sheet(tuple(records[i][1] for i in laid), tuple(asks), facts, ";")


def lay(
    rng: np.random.Generator, sheet: Sheet, tail: str, length: int, text: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(length,) characters: a window of the text with the records at chance places, then `tail`; the records' spans."""
    coded = [encode(record) for record in sheet.records]
    end = encode(tail)
    room = length - len(end) - sum(map(len, coded))
    if room < 0:
        raise BadInput(f"{len(coded)} records and the question need {length - room} characters, but the length is {length}")
    if room >= len(text):
        raise BadInput(f"a sample of {length} characters needs {room} of text, but it has {len(text)}")
    start = int(rng.integers(len(text) - room))
    cuts = np.sort(rng.integers(room + 1, size=len(coded)))
    parts, spans, at, before = [], [], 0, 0
    for cut, record in zip(cuts.tolist(), coded, strict=True):
        parts += [text[start + before : start + cut], record]
        at += cut - before
        spans.append((at, at + len(record)))
        at, before = at + len(record), cut
    parts += [text[start + before : start + room], end]
    return np.concatenate(parts), spans


def _draw(
    family: str, make: Callable[[np.random.Generator], Sheet], length: int, n: int, seed: int, text: Tensor | None
) -> Recall:
    rng = np.random.default_rng([seed, length, *family.encode()])
    filler = (_chars().val if text is None else text).numpy()
    prompts, answers, facts, question = [], [], [], 0
    for _ in range(n):
        sheet = make(rng)
        ask, answer = sheet.asks[one := int(rng.integers(len(sheet.asks)))]
        row, spans = lay(rng, sheet, ask, length, filler)
        prompts.append(row)
        answers.append(encode(answer))
        facts.append([spans[i] for i in sheet.facts[one]])
        question = len(ask)
    prompt, told = (torch.from_numpy(np.stack(rows)) for rows in (prompts, answers))
    return Recall(family, prompt, told, question, torch.tensor(facts))


@cache
def _chars() -> Chars:
    return python_chars()


@cache
def _numbers() -> dict[str, int]:
    return {character: index for index, character in enumerate(_chars().vocabulary)}


def encode(text: str) -> np.ndarray:
    """(length,) int64 numbers of a text's characters, as python_chars numbers them."""
    numbers = _numbers()
    return np.array([numbers[character] for character in text], dtype=np.int64)
