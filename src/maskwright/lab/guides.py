"""Debian's installation guide in 19 languages: the same numbered sections in each. Imports no torch.

Section numbers align over the languages, so one split by number keeps a section's translations on one side, and a
section is its own translation's only relevant document.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from maskwright.core.errors import BadInput
from maskwright.lab.sources import fetch_debian

PACKAGE = "installation-guide-amd64"
NEEDS = f"debian:{PACKAGE}"
LANGUAGES = tuple("ca cs da de el en es fr id it ja ko nl pt ro ru sv vi zh_CN".split())
CHAPTERS = ("1", "2", "3", "4", "5", "6", "7", "8", "A", "B", "C", "D", "E")  # F is the licence, left in English by many
SIDES = ("train", "val", "test")
_UNSPACED = ("ja", "zh_CN")  # no blank between words: lines are joined without one
_TITLE = re.compile(r"([1-9]|[A-F])(\.\d+)+\. (?=\S)")
_MARK = re.compile(r"^(?:[•*-]|\d{1,2}\.|\([a-z\d]\))\s+")  # of a list item
_BOX = re.compile("[─━│┌├└]|^[+|]")
_SHARES = (70, 80)  # per cent of a chapter's sections: train to 70, val to 80, test the rest


@dataclass(frozen=True)
class Section:
    """One section in one language: `number` like "5.3.1.", `heading`, and its own `paragraphs` (subsections' apart)."""

    language: str
    number: str
    heading: str
    paragraphs: tuple[str, ...]

    @property
    def chapter(self) -> str:
        """The chapter: 1 to 8, or A to F for an appendix."""
        return self.number.partition(".")[0]

    @property
    def text(self) -> str:
        """The paragraphs, one a line."""
        return "\n".join(self.paragraphs)


@cache
def raw(language: str) -> str:
    """The whole guide as text. Raises BadInput for an unknown language, SourceMissing without the package."""
    if language not in LANGUAGES:
        raise BadInput(f"no guide in {language!r}; languages are {', '.join(LANGUAGES)}")
    path = fetch_debian(PACKAGE) / f"usr/share/doc/{PACKAGE}/{language}/install.{language}.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("koi8-r" if language == "ru" else "utf-8")


@cache
def sections(language: str) -> tuple[Section, ...]:
    """The sections in the order of the guide, those left in English dropped.

    Paragraphs of which more than half the word triples stand in the English guide are dropped (so are commands and
    paths that stand alone); a section stays when half its characters do. A paragraph that stands in two sections is
    dropped from both: it says nothing of where it stands.
    """
    found = parse(raw(language), language)
    if language != "en":
        found = _translated(found, _english())
    often = Counter(p for section in found for p in set(section.paragraphs))
    kept = (
        Section(language, s.number, s.heading, tuple(dict.fromkeys(p for p in s.paragraphs if often[p] == 1))) for s in found
    )
    return tuple(section for section in kept if section.paragraphs)


def parse(text: str, language: str = "en") -> list[Section]:
    """Sections of one guide's text with those paragraphs that are prose: no contents, tables, notes or commands."""
    glue = "" if language in _UNSPACED else " "
    found: dict[str, tuple[str, list[str]]] = {}
    blocks = [block for block in re.split(r"\n[ \t]*\n+", text.replace("\r", "").replace("\xa0", " ")) if block.strip()]
    lines = [block.strip("\n").split("\n") for block in blocks]
    inside: list[str] | None = None
    for index, block in enumerate(lines):
        title = _TITLE.match(block[0])
        after = lines[index + 2] if index + 2 < len(lines) else [""]
        if _contents(after) or _contents(block):
            inside = None  # a new chapter's title stands two blocks before its contents; its preface is in no section
        elif title is not None and len(block) <= 3:
            number = title.group().strip()
            inside = []
            found[number] = (_joined([block[0][title.end() :], *block[1:]], glue), inside)
        elif inside is not None and _prose(block, language):
            inside.append(_MARK.sub("", _joined(block, glue)))
    return [Section(language, number, heading, tuple(paragraphs)) for number, (heading, paragraphs) in found.items()]


def _contents(block: list[str]) -> bool:
    """A list of contents: several numbered lines in one block, or one with an indented line below."""
    numbered = sum(_TITLE.match(line.strip()) is not None for line in block)
    return numbered > 1


def _joined(block: Iterable[str], glue: str) -> str:
    """One paragraph of its lines; a break between two Latin words is a blank in every language."""
    text = ""
    for line in block:
        piece = " ".join(line.split())
        latin = bool(text) and text[-1].isascii() and piece[:1].isascii()
        text += (" " if latin else glue if text else "") + piece
    return re.sub(r"\^\[\d+\]", "", text).strip()


def _prose(block: list[str], language: str) -> bool:
    text = "".join(block).strip()
    if text[:1] in "#$<[" or text.startswith("d-i ") or any(_BOX.search(line.strip()) for line in block):
        return False
    solid = "".join(text.split())
    least = 15 if language in (*_UNSPACED, "ko") else 40
    return len(solid) >= least and sum(c.isalpha() for c in solid) >= 0.75 * len(solid)


def _triples(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(words, words[1:], words[2:], strict=False)) or [tuple(words)]


@cache
def _english() -> frozenset[tuple[str, ...]]:
    return frozenset(_triples(raw("en")))


def _translated(found: Iterable[Section], english: frozenset[tuple[str, ...]]) -> list[Section]:
    kept = []
    for section in found:
        own = tuple(p for p in section.paragraphs if sum(t in english for t in _triples(p)) <= 0.5 * len(_triples(p)))
        if own and 2 * sum(map(len, own)) >= sum(map(len, section.paragraphs)):
            kept.append(Section(section.language, section.number, section.heading, own))
    return kept


@cache
def sides() -> dict[str, str]:
    """Side ("train", "val" or "test") of every section number of the English guide, the same for all languages.

    Within each chapter the numbers are ordered by a hash and cut at 70 and 80 per cent, so that every chapter has
    sections on every side.
    """
    return split(section.number for section in parse(raw("en")))


def split(numbers: Iterable[str]) -> dict[str, str]:
    """The same for any numbers."""
    chapters: dict[str, list[str]] = {}
    for number in numbers:
        chapters.setdefault(number.partition(".")[0], []).append(number)
    found = {}
    for members in chapters.values():
        members.sort(key=lambda number: hashlib.sha256(number.encode()).hexdigest())
        for rank, number in enumerate(members):
            share = 100 * (rank + 0.5) / len(members)
            found[number] = SIDES[sum(share >= border for border in _SHARES)]
    return found


def side(language: str, name: str) -> tuple[Section, ...]:
    """A language's sections on one side, chapters A-E and 1-8 only. Raises BadInput for another side."""
    if name not in SIDES:
        raise BadInput(f"no side {name!r} of the guides; sides are {', '.join(SIDES)}")
    where = sides()
    return tuple(s for s in sections(language) if s.chapter in CHAPTERS and where.get(s.number) == name)


def chapter_rows(language: str, name: str) -> tuple[tuple[str, ...], list[int]]:
    """(paragraphs, chapters as indices into CHAPTERS) of one side: the task "which chapter is this from?"."""
    rows = [(p, CHAPTERS.index(s.chapter)) for s in side(language, name) for p in s.paragraphs]
    return tuple(p for p, _ in rows), [chapter for _, chapter in rows]


def titled(language: str, name: str) -> tuple[Section, ...]:
    """The sections of one side whose heading is a query: translated too, and of no other section of the language."""
    english = {s.number: s.heading for s in parse(raw("en"))}
    often = Counter(s.heading for s in sections(language))
    return tuple(
        s for s in side(language, name) if often[s.heading] == 1 and (language == "en" or s.heading != english.get(s.number))
    )


def told() -> str:
    """A hash of the package's texts: a lab model's `data`."""
    known = hashlib.sha256()
    for language in LANGUAGES:
        known.update(raw(language).encode())
    return known.hexdigest()
