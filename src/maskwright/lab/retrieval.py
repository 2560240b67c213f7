"""Retrieval on the installation guides, whose judgements come free over languages, and English pairs to train on.

A query is a section's heading, its one relevant document the section of the same number in any language; the other
candidates are sections of the same chapter and of others. Training pairs are English: word and example against
definition (WordNet), and words or the heading of a training section against its text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab import guides, wordnet
from maskwright.lab.encoder import CLS, LENGTH, PAD, SEP, padded, tokenizer

QUERY = 16  # places of a query in a pair, its marks counted; the document begins behind them
NEGATIVES = 4  # a positive pair comes with four negative ones
Pair = tuple[str, str]


@dataclass(frozen=True)
class Retrieval:
    """`queries` and `documents`: id -> text; by query id `candidates` (in no telling order) and `qrels` (relevant ones)."""

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    candidates: Mapping[str, tuple[str, ...]]
    qrels: Mapping[str, frozenset[str]]


@cache
def guide_retrieval(queries: str, documents: str, candidates: int = 50) -> Retrieval:
    """Headings of the validation and test sections in one language, against sections in another or the same one.

    Ids are section numbers. Half of a query's other candidates are of its own chapter, as far as there are as many;
    which ones, and their order, hangs on the query's number alone.
    """
    asked = [s for name in ("val", "test") for s in guides.titled(queries, name)]
    answers = {s.number: s for s in guides.sections(documents) if s.chapter in guides.CHAPTERS}
    return judged(
        {s.number: s.heading for s in asked if s.number in answers},
        {number: s.text for number, s in answers.items()},
        candidates,
    )


def judged(queries: Mapping[str, str], documents: Mapping[str, str], candidates: int) -> Retrieval:
    """The same for any texts; an id begins with its chapter and a dot. Raises BadInput for too few documents."""
    if not 2 <= candidates <= len(documents) or not set(queries) <= set(documents):
        raise BadInput(f"{candidates} candidates from {len(documents)} documents, {len(queries)} queries")
    listed = {}
    for number in queries:
        rng = generator(0, number)
        others = [name for name in documents if name != number]
        others = [others[i] for i in torch.randperm(len(others), generator=rng).tolist()]
        near = [name for name in others if name.partition(".")[0] == number.partition(".")[0]]
        chosen = dict.fromkeys([*near[: candidates // 2], *others])
        members = [number, *list(chosen)[: candidates - 1]]
        listed[number] = tuple(members[i] for i in torch.randperm(candidates, generator=rng).tolist())
    return Retrieval(queries, documents, listed, {number: frozenset({number}) for number in queries})


def bm25(documents: Mapping[str, str], k1: float = 1.2, b: float = 0.75) -> Callable[[str, Sequence[str]], Tensor]:
    """The lexical reference: score(query, document texts) -> (documents,), term statistics from `documents`."""
    counts = {text: Counter(_words(text)) for text in documents.values()}
    mean = sum(sum(c.values()) for c in counts.values()) / len(counts)
    often = Counter(word for c in counts.values() for word in c)

    def score(query: str, texts: Sequence[str]) -> Tensor:
        found = []
        for text in texts:
            count, total = counts[text], 0.0
            long = k1 * (1 - b + b * sum(count.values()) / mean)
            for word in _words(query):
                rare = math.log(1 + (len(counts) - often[word] + 0.5) / (often[word] + 0.5))
                total += rare * count[word] * (k1 + 1) / (count[word] + long)
            found.append(total)
        return torch.tensor(found)

    return score


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def pair_ids(queries: Sequence[str], documents: Sequence[str], length: int = LENGTH) -> Tensor:
    """(pairs, length) int64: CLS query SEP padded to QUERY places, then the document and SEP.

    A document is cut to what is left; it never cuts the query. Raises BadInput for lists of different lengths.
    """
    if len(queries) != len(documents):
        raise BadInput(f"{len(queries)} queries and {len(documents)} documents make no pairs")
    encode = tokenizer().encode_batch
    rows = []
    for query, document in zip(encode(list(queries)), encode(list(documents)), strict=True):
        left = [CLS, *query.ids[: QUERY - 2], SEP]
        rows.append([*left, *[PAD] * (QUERY - len(left)), *document.ids[: length - QUERY - 1], SEP])
    return padded(rows, length)


@cache
def wordnet_pairs() -> tuple[Pair, ...]:
    """(word and example, definition) of every WordNet synset that has an example."""
    every = (s for pos in ("noun", "verb", "adj", "adv") for s in wordnet.synsets(pos))  # type: ignore[arg-type]
    return tuple((f"{s.lemmas[0]}: {s.examples[0]}", s.definition) for s in every if s.examples)


@cache
def guide_pairs() -> tuple[Pair, ...]:
    """(heading, paragraph) of the English training sections, whose test sections are never seen."""
    return tuple((s.heading, p) for s in guides.side("en", "train") for p in s.paragraphs)


def pair_rows(pairs: Sequence[Pair], known_item: float = 0.0) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Draw (ids (batch, length), labels (batch, 1) float): each positive pair comes with NEGATIVES other documents.

    With chance `known_item` a query is replaced by 3 to 8 words of its document in a random order.
    Raises BadInput for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise BadInput(f"{len(pairs)} pairs: negatives need another document")

    def draw(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        queries: list[str] = []
        documents: list[str] = []
        labels: list[float] = []
        while len(queries) < batch:
            query, document = pairs[int(torch.randint(len(pairs), (), generator=rng))]
            if float(torch.rand((), generator=rng)) < known_item:
                words = document.split()
                count = int(torch.randint(3, 9, (), generator=rng))
                query = " ".join(words[i] for i in torch.randperm(len(words), generator=rng)[:count].tolist())
            others = [pairs[i][1] for i in torch.randint(len(pairs), (NEGATIVES,), generator=rng).tolist()]
            others = [other for other in others if other != document]
            queries += [query] * (1 + len(others))
            documents += [document, *others]
            labels += [1.0, *[0.0] * len(others)]
        ids = pair_ids(queries[:batch], documents[:batch])
        return ids, torch.tensor(labels[:batch])[:, None]

    return draw
