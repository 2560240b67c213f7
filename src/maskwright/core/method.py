"""Method, Card, Claim and the registry: how a room plugs in. Imports no torch, so that `list` starts at once.

A room is a folder `<place>/<slug>/` with a `card.toml`; nothing registers it and no list names it.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

PLACES = ("weights", "updates", "attention", "inputs")
_REQUIRED = ("title", "year", "arxiv", "repo", "place", "also", "pattern", "when", "claim", "entry")
_KINDS = ("mask", "merge", "loss", "collection", "signature")
_SELECTS = ("score", "learned", "random", "own")
_GRADIENTS = ("hard", "ste", "frozen", "none")
_TOML = {str: "string", int: "whole number", list: "list", bool: "boolean", dict: "table"}
_WHEN = ("one-shot", "training", "inference")


class CardError(ValueError):
    """A card.toml that is not complete; the message names the file and the field."""


@dataclass(frozen=True)
class Contract:
    """What the contract test may expect of a room (card table `[contract]`)."""

    kind: str = "mask"
    selects: str = "score"
    gradient: str = "none"
    empty_ok: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """One room's card: everything the command, the docs and the contract test know without importing it."""

    slug: str
    path: Path
    title: str
    year: int
    arxiv: str
    repo: str
    place: str
    also: tuple[str, ...]
    pattern: str
    when: str
    claim: str
    entry: str
    baseline: bool = False
    soft: bool = False
    data: str = "real"
    contract: Contract = Contract()

    @property
    def module(self) -> str:
        return f"maskwright.{self.place}.{self.slug}"

    def load(self) -> Any:
        """Import the room and return its public class or function."""
        return getattr(importlib.import_module(self.module), self.entry)


@dataclass(frozen=True)
class Effect:
    """One stated effect: arm `better` beats arm `worse` on `figure` by more than `margin`.

    `kind` is "mechanism" (decides the verdict of the room) or "quality" (listed beside it).
    `higher` says whether more of the figure is better. The verdict is a paired comparison over seeds.
    """

    name: str
    better: str
    worse: str
    figure: str
    kind: Literal["mechanism", "quality"] = "mechanism"
    margin: float = 0.0
    higher: bool = True


@dataclass(frozen=True)
class Claim:
    """A room's claim check. `arms[name](seed, scale) -> figures`, scale "smoke" or "full".

    `method` names the arm of the method, `twin` the arm of its deliberately broken twin. The twin fails when
    at least one mechanism effect, with the twin in the method's seat, does not hold.
    `paper` holds the paper's own figures for the report, `needs` the data sources a full run cannot do without.
    """

    arms: Mapping[str, Callable[[int, str], Mapping[str, float]]]
    method: str
    twin: str
    effects: tuple[Effect, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    paper: str = ""
    needs: tuple[str, ...] = ()
    trains: bool = False


def read_card(path: Path) -> Card:
    """Read one `card.toml`. Raises CardError naming the file and the field."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: not a TOML file: {error}") from None
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise CardError(f"{path}: missing {', '.join(missing)}")
    kinds = {"year": int, "also": list, "baseline": bool, "soft": bool, "contract": dict}
    for key, value in raw.items():
        kind = kinds.get(key, str)
        if type(value) is not kind:
            raise CardError(f"{path}: {key} is {value!r}, not a {_TOML[kind]}")
    contract = raw.pop("contract", {})
    allowed = {"kind": _KINDS, "selects": _SELECTS, "gradient": _GRADIENTS}
    for key, values in allowed.items():
        if key in contract and contract[key] not in values:
            raise CardError(f"{path}: contract.{key} is {contract[key]!r}, not one of {', '.join(values)}")
    if raw["when"] not in _WHEN:
        raise CardError(f"{path}: when is {raw['when']!r}, not one of {', '.join(_WHEN)}")
    slug, place = path.parent.name, path.parent.parent.name
    if raw["place"] != place or place not in PLACES:
        raise CardError(f"{path}: place is {raw['place']!r} but the folder lies in {place!r}")
    if raw["arxiv"] and not re.fullmatch(r"\d{4}\.\d{4,5}", raw["arxiv"]):
        raise CardError(f"{path}: arxiv {raw['arxiv']!r} is not of the form 2102.04010")
    unknown = set(raw) - set(Card.__dataclass_fields__)
    if unknown:
        raise CardError(f"{path}: unknown field {', '.join(sorted(unknown))}")
    raw["also"] = tuple(raw["also"])
    try:
        return Card(slug=slug, path=path.parent, contract=Contract(**contract), **raw)
    except TypeError as error:
        raise CardError(f"{path}: {error}") from None


@cache
def _cards() -> dict[str, Card]:
    root = Path(__file__).resolve().parent.parent
    cards = [read_card(p) for place in PLACES for p in sorted((root / place).glob("*/card.toml"))]
    found: dict[str, Card] = {}
    for card in cards:
        if found.setdefault(card.slug, card) is not card:
            raise CardError(f"{card.path}: {found[card.slug].path} has the same slug; a slug names one room")
    return found


def methods(place: str | None = None) -> list[Card]:
    """Every room's card, in the order of places and slugs. Reads cards only; imports no room."""
    if place is not None and place not in PLACES:
        raise ValueError(f"unknown place {place!r}; places are {', '.join(PLACES)}")
    return [card for card in _cards().values() if place is None or card.place == place]


def card(slug: str) -> Card:
    """The card of one room; hyphens count as underscores. Raises KeyError listing the known slugs."""
    found = _cards().get(slug.replace("-", "_"))
    if found is None:
        raise KeyError(f"unknown method {slug!r}; known: {', '.join(sorted(_cards()))}")
    return found


def get(slug: str) -> Any:
    """The public class (or function) of a room, imported now: `get("wanda")`."""
    return card(slug).load()
