"""Which rooms do a few words point at? Search over cards and README headings, without an index and without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from maskwright.core.method import Card

# What turns words into a question ("which paper does N:M from scratch?") and stands in no card.
_FILLER = frozenset("a an and are do does for how in is of on paper papers room that the to what which who with".split())


def search(asked: str, cards: Sequence[Card]) -> tuple[list[Card], bool]:
    """The rooms whose text holds every word, best first, and whether the first is named exactly by the words.

    A question's filler ("which paper does ...?") does not count.

    Case does not matter; hyphen and underscore are alike and may be left out ("sr-ste" finds SR-STE and SrSte).
    """
    told = re.sub(r"[?!,;.]+(?=\s|$)", "", asked).split()
    words = [word for word in told if word.casefold() not in _FILLER] or told
    if not words:
        return [], False
    scored = [(_score(words, card), card) for card in cards]
    found = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: (-pair[0], pair[1].slug))
    name = _joined("".join(words))
    exact = bool(found) and name in (_joined(found[0][1].slug), found[0][1].arxiv)
    return [card for _, card in found], exact


def _score(words: Sequence[str], card: Card) -> float:
    """0 unless every word is found; a word counts by the best field it stands in."""
    if _joined("".join(words)) in (_joined(card.slug), card.arxiv):
        return 1000.0
    fields = (
        (8.0, card.slug + " " + card.entry),
        (4.0, card.title),
        (3.0, f"{card.arxiv} {card.repo} {' '.join(card.also)}"),
        (2.0, card.claim),
        (1.0, f"{card.place} {card.pattern} {card.when} {card.year} {'baseline' if card.baseline else ''}"),
        (1.0, headings(card)),
    )
    total = 0.0
    for word in words:
        best = max((weight for weight, text in fields if _holds(text, word)), default=0.0)
        if not best:
            return 0.0
        total += best
    return total


def headings(card: Card) -> str:
    """The headings of the room's README, one text; empty where there is none."""
    try:
        text = (card.path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "\n".join(re.findall(r"^#+\s+(.*)$", text, flags=re.MULTILINE))


def _holds(text: str, word: str) -> bool:
    spaced = re.sub(r"[-_]", " ", text.casefold())
    return re.sub(r"[-_]", " ", word.casefold()) in spaced or _joined(word) in _joined(text)


def _joined(text: str) -> str:
    """Case folded, without hyphen and underscore; spaces stay, so that words of a text do not grow together."""
    return re.sub(r"[-_]", "", text.casefold())
