"""A small grammar for the claim: a rule decides every preference, and few tokens carry it.

A prompt `the NOUN` is followed by one of four endings; the words of a class are equally likely. The score of a sentence is
the number of its liked adjectives less that of its disliked ones, each a quarter of the adjectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD, PROMPT, LENGTH = 0, 2, 16  # the longest sentence has 14 words
CLASSES = {
    "N": "cat dog horse farmer child teacher river garden boat letter piano window".split(),
    "V": "sees likes follows finds paints carries guards mends".split(),
    "P": "near behind under beside".split(),
    "R": "today slowly again alone quietly twice".split(),
    "A": "good kind bright lovely bad cruel dull ugly old young small tall wet round grey plain".split(),
}
LIKED, DISLIKED = CLASSES["A"][:4], CLASSES["A"][4:8]
ENDINGS = (
    "was A and the N V the N P the N .",
    "V the N while the N seemed A R .",
    "V P the N because it felt A and V R .",
    "said the N was A but the N was A R .",
)
_FIXED = sorted({word for ending in ENDINGS for word in ending.split()} - set(CLASSES))
WORDS = ["<pad>", *_FIXED, *(word for group in CLASSES.values() for word in group)]
NUMBER = {word: number for number, word in enumerate(WORDS)}
END = NUMBER["."]


def worth() -> Tensor:
    """(vocabulary,) what a word adds to the score."""
    return torch.tensor([float(word in LIKED) - float(word in DISLIKED) for word in WORDS])


def sentences(count: int, rng: torch.Generator) -> Tensor:
    """(count, LENGTH) word numbers, PAD behind the full stop."""
    out = torch.full((count, LENGTH), PAD)
    for row in out:
        ending = ENDINGS[_one_of(len(ENDINGS), rng)]
        groups = [CLASSES.get(word, [word]) for word in ["the", "N", *ending.split()]]
        row[: len(groups)] = torch.tensor([NUMBER[group[_one_of(len(group), rng)]] for group in groups])
    return out


def _one_of(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))
