"""Retrieval on the installation guides, whose judgements come free over languages, and English pairs to train on.

A query is a section's heading, its one relevant document the section of the same number in any language; the other
candidates are sections of the same chapter and of others. Training pairs are English: word and example against
definition (WordNet), and words or the heading of a training section against its text. `PairReader` scores a pair;
`guide_languages` and `topic_languages` are all that a claim over languages needs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab import guides, text, wordnet
from maskwright.lab.encoder import CLS, LENGTH, PAD, SEP, SPECIAL, Encoder, padded, stream, tokenizer
from maskwright.lab.models import seeded
from maskwright.lab.train import Draw

QUERY = 16  # places of a query in a pair, its marks counted; the document begins behind them
NEGATIVES = 4  # a positive pair comes with four negative ones
Pair = tuple[str, str]
Encode = Callable[[list[str]], Sequence[Sequence[int]]]


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
    counts = {document: Counter(_words(document)) for document in documents.values()}
    mean = sum(sum(c.values()) for c in counts.values()) / len(counts)
    often = Counter(word for c in counts.values() for word in c)

    def score(query: str, texts: Sequence[str]) -> Tensor:
        found = []
        for document in texts:
            count, total = counts[document], 0.0
            long = k1 * (1 - b + b * sum(count.values()) / mean)
            for word in _words(query):
                rare = math.log(1 + (len(counts) - often[word] + 0.5) / (often[word] + 0.5))
                total += rare * count[word] * (k1 + 1) / (count[word] + long)
            found.append(total)
        return torch.tensor(found)

    return score


def _words(document: str) -> list[str]:
    return re.findall(r"\w+", document.lower())


def subwords(texts: list[str]) -> list[list[int]]:
    """Tokens of the guides' vocabulary. Raises SourceMissing without the guides."""
    return [found.ids for found in tokenizer().encode_batch(texts)]


def pair_ids(queries: Sequence[str], documents: Sequence[str], length: int = LENGTH, encode: Encode = subwords) -> Tensor:
    """(pairs, length) int64: CLS query SEP padded to QUERY places, then the document and SEP.

    A document is cut to what is left; it never cuts the query. Raises BadInput for lists of different lengths.
    """
    if len(queries) != len(documents):
        raise BadInput(f"{len(queries)} queries and {len(documents)} documents make no pairs")
    rows = []
    for query, document in zip(encode(list(queries)), encode(list(documents)), strict=True):
        left = [CLS, *query[: QUERY - 2], SEP]
        rows.append([*left, *[PAD] * (QUERY - len(left)), *document[: length - QUERY - 1], SEP])
    return padded(rows, length)


@cache
def wordnet_pairs() -> tuple[Pair, ...]:
    """(word and example, definition) of every WordNet synset that has an example."""
    every = (s for pos in ("noun", "verb", "adj", "adv") for s in wordnet.synsets(pos))  # type: ignore[arg-type]
    return tuple((f"{s.lemmas[0]}: {s.examples[0]}", s.definition) for s in every if s.examples)


@cache
def guide_pairs(*sides: str) -> tuple[Pair, ...]:
    """(heading, paragraph) of the English sections of some sides: the training sections unless told otherwise."""
    return tuple((s.heading, p) for side in sides or ("train",) for s in guides.side("en", side) for p in s.paragraphs)


def pair_rows(pairs: Sequence[Pair], known_item: float = 0.0, encode: Encode = subwords) -> Draw:
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
        ids = pair_ids(queries[:batch], documents[:batch], encode=encode)
        return ids, torch.tensor(labels[:batch])[:, None]

    return draw


class PairReader(nn.Module):
    """A pair read together, one logit: ids (batch, length) of `pair_ids` -> (batch, 1).

    The head sees the mean q of the query's places and d of the document's, as q * d and |q - d|. One mean over both sides,
    which is what a large pre-trained encoder needs, tells this small one nothing of whether they agree: it learns its
    training pairs by heart and no others.
    """

    def __init__(self, encoder: Encoder, *, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        with seeded(seed):
            self.head = nn.Linear(2 * encoder.inlet.embedding_dim, 1)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids >= len(SPECIAL))[..., None]
        hidden = self.encoder(ids) * real
        sides = [slice(None, QUERY), slice(QUERY, None)]
        q, d = (hidden[:, s].sum(1) / real[:, s].sum(1).clamp(min=1) for s in sides)
        return self.head(torch.cat([q * d, (q - d).abs()], -1))


def pair_score(model: nn.Module, encode: Encode = subwords) -> Callable[[str, Sequence[str]], Tensor]:
    """score(query, document texts) -> (documents,) of a model as it is at each call; a text is encoded once."""
    known: dict[str, Sequence[int]] = {}

    def remembered(texts: list[str]) -> Sequence[Sequence[int]]:
        new = list(dict.fromkeys(one for one in texts if one not in known))
        known.update(zip(new, encode(new) if new else (), strict=True))
        return [known[one] for one in texts]

    def score(query: str, texts: Sequence[str]) -> Tensor:
        return model(pair_ids([query] * len(texts), texts, encode=remembered))[:, 0]

    return score


@dataclass(frozen=True, eq=False)
class Languages:
    """Texts of English and other languages. `pairs` draws English training pairs, `held` the same kind from other texts.

    `streams` and `apart`: by language the tokens that masked LM is trained and judged on. `asked(queries, documents)`:
    the retrieval between two languages.
    """

    encode: Encode
    pairs: Draw
    held: Draw
    streams: Mapping[str, Tensor]
    apart: Mapping[str, Tensor]
    asked: Callable[[str, str], Retrieval]


def guide_languages(targets: Sequence[str], candidates: int) -> Languages:
    """The guides; half of a batch of training pairs is WordNet's. Raises SourceMissing without them."""
    wordnet_half, guides_half = pair_rows(wordnet_pairs()), pair_rows(guide_pairs(), 0.5)

    def pairs(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        (a, b), (c, d) = guides_half(batch - batch // 2, rng), wordnet_half(batch // 2, rng)
        return torch.cat([a, c]), torch.cat([b, d])

    streams, apart = ({name: stream(name, side) for name in ("en", *targets)} for side in ("train", "test"))
    asked = partial(guide_retrieval, candidates=candidates)
    return Languages(subwords, pairs, pair_rows(guide_pairs("val", "test"), 0.5), streams, apart, asked)


def topic_languages(targets: Sequence[str], candidates: int = 4) -> Languages:
    """Nothing is fetched: eight of Python's help topics in bytes, a shift of the alphabet for each target language."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    english = {f"1.{number}": body[:400] for number, (_, body) in enumerate(text.python_topics()[:8])}
    documents = {}
    for place, name in enumerate(("en", *targets)):
        table = str.maketrans(letters, letters[7 * place % 26 :] + letters[: 7 * place % 26])
        documents[name] = {number: body.translate(table) for number, body in english.items()}

    def encode(texts: list[str]) -> list[list[int]]:
        return [[len(SPECIAL) + byte for byte in one.encode()] for one in texts]

    def asked(queries: str, answers: str) -> Retrieval:
        first = {number: " ".join(body.split()[:3]) for number, body in list(documents[queries].items())[:2]}
        return judged(first, documents[answers], candidates)

    rows = pair_rows([(body[:20], body) for body in english.values()], 0.5, encode)
    streams = {name: torch.tensor(encode(["\n".join(found.values())])[0]) for name, found in documents.items()}
    return Languages(encode, rows, rows, streams, streams, asked)
