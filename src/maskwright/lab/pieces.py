"""What a check is made of: one arm for one seed, saved as it ends and read back by the next run."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from maskwright.core.cache import write_atomic
from maskwright.core.method import Card, Claim
from maskwright.lab import record

Scale = Literal["smoke", "full"]
Progress = Callable[[str], None]


def load_claim(card: Card) -> Claim:
    """CLAIM of `maskwright.<place>.<slug>.claim`. Raises LookupError for a room without one (baselines have none)."""
    if not (card.path / "claim.py").is_file():
        raise LookupError(f"{card.slug} has no claim{' (it is a baseline)' if card.baseline else ''}")
    return cast(Claim, importlib.import_module(f"{card.module}.claim").CLAIM)


@dataclass(frozen=True)
class Piece:
    """What one arm gave for one seed, in how many seconds, and whether it was read back from an earlier run."""

    figures: dict[str, float]
    seconds: float
    read_back: bool = False


def one_seed(card: Card, claim: Claim, seed: int, scale: Scale, store: Path | None, say: Progress) -> dict[str, Piece]:
    """Every arm for one seed, read back from `store` where it is there, else run now and saved."""
    code, told = record.piece_hash(card), dict[str, Piece]()
    for arm in claim.arms:
        path = store / card.slug / f"{arm}-{seed}-{scale}-{code}.json" if store is not None else None
        piece = _read(path) or _arm(claim, arm, seed, scale)
        if path is not None and not piece.read_back:
            write_atomic(path, json.dumps({"figures": piece.figures, "seconds": piece.seconds}).encode())
        told[arm] = piece
        say(f"{arm}, seed {seed}: {'read back' if piece.read_back else f'{piece.seconds:.1f} s'}")
    return told


def _arm(claim: Claim, arm: str, seed: int, scale: str) -> Piece:
    from maskwright.lab.models import seeded

    start = time.perf_counter()
    try:
        with seeded(seed):  # an arm that forgets a generator is still the same from run to run
            row = {name: float(value) for name, value in claim.arms[arm](seed, scale).items()}
    except Exception as error:
        error.add_note(f"in arm {arm!r}, seed {seed}, scale {scale}")
        raise
    return Piece(row, time.perf_counter() - start)


def _read(path: Path | None) -> Piece | None:
    if path is None:
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        figures = {str(name): float(value) for name, value in told["figures"].items()}
        return Piece(figures, float(told["seconds"]), read_back=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or not readable: run it again
