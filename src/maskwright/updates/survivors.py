"""What survives of a chunk's deltas, counted: kept entries, overlap, conflict, L1 norms. Slower than merging itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskwright.kernels.merge import Keep, Piece, Side, difference, kept
from maskwright.updates.parts import TensorReport


def norms(base: Piece, tuned: Piece, keep: Keep) -> tuple[float, float]:
    """The L1 norms of a chunk's delta and of what stays of it."""
    delta = difference(base, tuned)
    after = torch.where(kept(delta, keep), delta, 0.0).abs_()
    return float(delta.abs_().sum(dtype=torch.float64)), float(after.sum(dtype=torch.float64))


def sparse(base: Piece, tuned: Sequence[Piece], sides: Sequence[Side]) -> list[tuple[Tensor, Tensor]]:
    """Of each model the sparse, rescaled delta, and what is kept."""
    out = []
    for piece, side in zip(tuned, sides, strict=True):
        delta = difference(base, piece)
        stays = kept(delta, side.keep)
        out.append((torch.where(stays, delta, 0.0).mul_(side.factor), stays))
    return out


def count(models: Sequence[tuple[Tensor, Tensor]]) -> TensorReport:
    deltas, keeps = zip(*models, strict=True)
    number = torch.stack(list(keeps)).sum(0)
    up, down = (torch.stack([d > 0 if up else d < 0 for d in deltas]).any(0) for up in (True, False))
    return TensorReport(
        len(number), [int(keep.sum()) for keep in keeps], int((number > 1).sum()), int((up & down).sum())
    )  # fmt: skip
