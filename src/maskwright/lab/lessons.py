"""What the lab's recall models learn from: repeated snatches first, then the recall tasks in text, short rows first.

Copying what followed the same characters before is the one skill all families rest on. Rows of nothing else show it
hundreds of times each; records in text, where one character in ten answers a question, would take far longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.lab.recall import CAPITALS, LETTERS, Sheet, chains_sheet, encode, lay, needles_sheet, pairs_sheet

# (length, rows, share of the steps, share of rows that are snatches)
STAGES = ((64, 32, 0.15, 1.0), (128, 16, 0.3, 0.1), (256, 8, 0.25, 0.0), (520, 4, 0.3, 0.0))
_TEXT_WEIGHT = 0.3


def curriculum(text: Tensor, steps: int, seed: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Draw lessons step by step through STAGES. text (length,) is what records are laid into."""
    rng, ends = np.random.default_rng(seed), np.cumsum([stage[2] for stage in STAGES])
    done = 0

    def draw(batch: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal done
        length, rows, _, copies = STAGES[min(int(np.searchsorted(ends, done / steps, side="right")), len(STAGES) - 1)]
        done += 1
        return lessons(length, rows, rng, text, copies)

    return draw


def lessons(length: int, batch: int, rng: np.random.Generator, text: Tensor, copies: float = 0.0) -> tuple[Tensor, Tensor]:
    """A batch: x (batch, length) and y (batch, length, 2), the next character and whether it answers (0 or 1)."""
    filler = text.numpy()
    rows = [_snatches(length + 1, rng) if rng.random() < copies else _tasks(length + 1, rng, filler) for _ in range(batch)]
    ids, answers = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return ids[:, :-1], torch.stack([ids[:, 1:], answers[:, 1:]], dim=-1)


def lesson_loss(output: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' characters, and 0.3 of the mean over all characters."""
    each = F.cross_entropy(output.logits.flatten(0, 1), y[..., 0].flatten(), reduction="none")
    told = y[..., 1].flatten().to(each.dtype)
    return _TEXT_WEIGHT * each.mean() + (each * told).sum() / told.sum().clamp(min=1.0)


def _snatches(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chance characters, then snatches of 5 to 11 from anywhere before: all but a snatch's first two can be known.

    Rows have 6 to 39 different characters; with few of them one character does not tell where a snatch comes from.
    """
    few = rng.choice(encode(LETTERS + CAPITALS + "@=;%>?()"), int(rng.integers(6, 40)))
    row, mark = rng.choice(few, length // 3), np.zeros(length // 3, dtype=np.int64)
    while len(row) < length:
        size = int(rng.integers(5, 12))
        start = int(rng.integers(max(1, len(row) - size)))
        snatch = row[start : start + size]
        row, mark = np.concatenate([row, snatch]), np.concatenate([mark, np.arange(len(snatch)) >= 2])
    return row[:length], mark[:length]


def _tasks(length: int, rng: np.random.Generator, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row of text, one in eight of nothing else; in the others records and, at the end, as many questions as fit."""
    kind = int(rng.integers(8))
    if kind < 3:
        sheet = pairs_sheet(int(rng.integers(2, 3 + min(14, length // 18))), rng)
    elif kind < 4:
        sheet = needles_sheet(int(rng.integers(1, 2 + min(4, length // 64))), rng)
    elif kind < 7:
        sheet = chains_sheet(int(rng.integers(1, 2 + min(3, length // 64))), 1 if length < 96 else 2, rng)
    else:
        sheet = Sheet((), (), (), "")
    room, marks, tail = length - sum(map(len, sheet.records)), [], ""
    for one in rng.permutation(len(sheet.asks)).tolist():
        ask, answer = sheet.asks[one]
        if len(tail) + len(ask) + len(answer) + 1 > room:
            break
        tail += ask
        marks.append((len(tail), len(tail) + len(answer)))
        tail += answer + sheet.end
    row, _ = lay(rng, sheet, tail, length, text)
    mark = np.zeros(length, dtype=np.int64)
    for first, last in marks:
        mark[length - len(tail) + first : length - len(tail) + last] = 1
    return row, mark
