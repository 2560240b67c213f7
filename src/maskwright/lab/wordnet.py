"""WordNet 3.0 as data: every synset's words, definition, examples and lexicographer class. Imports no torch.

Definition -> class is a text classification of 26 noun or 15 verb classes; word and example -> definition is a
retrieval with one relevant text a query.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from maskwright.lab.sources import SourceMissing, fetch_debian

WORDNET = "wordnet-base"
Pos = Literal["noun", "verb", "adj", "adv"]

# Lexicographer files 3 to 28 and 29 to 43 in the order of their numbers, and what lexnames(5WN) says is in them.
NOUN_CLASSES = {
    "Tops": "a very general concept", "act": "an act or action", "animal": "an animal",
    "artifact": "a man-made object", "attribute": "an attribute of people or objects", "body": "a body part",
    "cognition": "a thought, idea or field of knowledge", "communication": "something said, written or signalled",
    "event": "a natural event", "feeling": "a feeling or emotion", "food": "a food or drink",
    "group": "a group of people or objects", "location": "a place or location", "motive": "a goal or motive",
    "object": "a natural object, not man-made", "person": "a person", "phenomenon": "a natural phenomenon",
    "plant": "a plant", "possession": "a possession, payment or transfer of possession",
    "process": "a natural process", "quantity": "a quantity or unit of measure",
    "relation": "a relation between people, things or ideas", "shape": "a shape or form",
    "state": "a state or condition", "substance": "a substance", "time": "a time or period",
}  # fmt: skip
VERB_CLASSES = {
    "body": "grooming, dressing and bodily care", "change": "changing in size, degree or state",
    "cognition": "thinking, judging and doubting", "communication": "telling, asking, ordering and singing",
    "competition": "fighting, sports and competing", "consumption": "eating, drinking and consuming",
    "contact": "touching, hitting, tying and digging", "creation": "making, sewing, painting and performing",
    "emotion": "feeling emotions", "motion": "walking, flying and moving", "perception": "seeing, hearing and feeling",
    "possession": "buying, selling, giving and owning", "social": "political and social activities",
    "stative": "being, having and spatial relations", "weather": "raining, snowing, thawing and thundering",
}  # fmt: skip
_FIRST = {"noun": 3, "verb": 29}
_PIECE = re.compile(r'(?:"[^"]*"|[^;])+')  # what stands between semicolons outside quotes


@dataclass(frozen=True)
class Synset:
    """One meaning: its words (`ice cream`), definition, example sentences, and class (`food`; "" for adj and adv)."""

    pos: Pos
    category: str
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


@cache
def synsets(pos: Pos) -> tuple[Synset, ...]:
    """Every synset of one part of speech in the file's order: 82,115 nouns, 13,767 verbs, 18,156 adj, 3,621 adv.

    Fetches the Debian package wordnet-base once. Raises SourceMissing without apt or a network.
    """
    path = fetch_debian(WORDNET) / "usr" / "share" / "wordnet" / f"data.{pos}"
    if not path.is_file():
        raise SourceMissing(f"{WORDNET} has no {path.name}")
    with path.open(encoding="utf-8") as file:
        return tuple(parse(line, pos) for line in file if not line.startswith(" "))  # the licence is indented


def parse(line: str, pos: Pos) -> Synset:
    """One line of a data file (wndb(5WN)): `offset lex_filenum ss_type w_cnt word lex_id ... | gloss`."""
    head, _, gloss = line.partition(" | ")
    fields = head.split(" ")
    number, words = int(fields[1]), int(fields[3], 16)
    lemmas = tuple(re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * words : 2])
    classes = {"noun": NOUN_CLASSES, "verb": VERB_CLASSES}.get(pos)
    category = "" if classes is None else list(classes)[number - _FIRST[pos]]
    pieces = [piece.strip() for piece in _PIECE.findall(gloss)]
    # Differs from the files' own rule (there is none): a piece that begins with a quote is an example, and a word
    # quoted inside a definition stays in it.
    definition = "; ".join(piece for piece in pieces if piece and not piece.startswith('"'))
    examples = tuple(piece[1:].partition('"')[0].strip() for piece in pieces if piece.startswith('"'))
    return Synset(pos, category, lemmas, definition, tuple(example for example in examples if example))
