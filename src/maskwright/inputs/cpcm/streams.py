"""Two views of the same point clouds, and the divergence that compares what a network says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput


@dataclass(frozen=True, eq=False)
class Stream:
    """Points of one or more scenes: coords (n, 3), feats (n, channels), labels (n,) and scene (n,) whole numbers."""

    coords: Tensor
    feats: Tensor
    labels: Tensor
    scene: Tensor

    def check(self, name: str, ignore: int) -> Stream:
        """Itself. Raises BadInput for shapes that do not fit, values that are not finite, and no label at all."""
        n = len(self.coords)
        if self.coords.shape != (n, 3) or self.feats.ndim != 2 or len(self.feats) != n:
            told = f"coords {tuple(self.coords.shape)} and feats {tuple(self.feats.shape)}"
            raise BadInput(f"{name} stream needs coords (n, 3) and feats (n, channels), got {told}")
        for what, each in (("labels", self.labels), ("scene", self.scene)):
            if each.shape != (n,) or each.dtype != torch.int64:
                raise BadInput(f"{name} stream needs {what} int64 ({n},), got {each.dtype} {tuple(each.shape)}")
        for what, each in (("coords", self.coords), ("feats", self.feats)):
            if not bool(each.isfinite().all()):
                raise BadInput(f"{name} stream of {n} points: {what} are NaN or infinite at {_first(~each.isfinite())}")
        if not bool((self.labels != ignore).any()):
            raise BadInput(f"{name} stream: all {n} labels are {ignore} (ignored), there is no supervised loss")
        return self


@dataclass(frozen=True, eq=False)
class Batch:
    """Two augmentations of the same scenes; a row of `pairs` (m, 2) names one point: its row in `one`, and in `two`."""

    one: Stream
    two: Stream
    pairs: Tensor

    def check(self, ignore: int) -> Batch:
        """Itself. Raises BadInput as Stream does, and for pairs that are no rows of the streams."""
        self.one.check("first", ignore), self.two.check("second", ignore)
        if self.pairs.ndim != 2 or self.pairs.shape[1] != 2 or self.pairs.dtype != torch.int64:
            raise BadInput(f"pairs are int64 (m, 2), got {self.pairs.dtype} {tuple(self.pairs.shape)}")
        sizes = torch.tensor([len(self.one.coords), len(self.two.coords)])
        if bool(((self.pairs < 0) | (self.pairs >= sizes)).any()):
            raise BadInput(f"a row of pairs lies outside the streams' {sizes.tolist()} points")
        return self


def divergence(first: Tensor, second: Tensor, *, exact: bool = False, small: float = 1e-4) -> Tensor:
    """Mean over points of the sum over classes of p1 log(p1 / q) + p2 log(p2 / q), q = (p1 + p2) / 2; logits (n, classes).

    Twice the usual Jensen-Shannon divergence, 2 ln 2 at most. As the released code has it, log(p / (q + small) + small)
    stands for log(p / q): of equal predictions it gives about -2 small (classes - 1), not 0. `exact` has neither.
    Raises BadInput for shapes that differ and for no point.
    """
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise BadInput(f"divergence compares logits (n, classes), got {tuple(first.shape)} and {tuple(second.shape)}")
    if exact:
        one, two = first.log_softmax(1), second.log_softmax(1)
        half = F.softplus(one.new_zeros(()))  # ln 2 to the same bits as below, so that equal predictions give exactly 0
        each = one.exp() * (half - F.softplus(two - one)) + two.exp() * (half - F.softplus(one - two))
        return each.sum(1).mean()
    p, r = first.softmax(1), second.softmax(1)
    q = (p + r) / 2
    return (p * (p / (q + small) + small).log() + r * (r / (q + small) + small).log()).sum(1).mean()


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(part) for part in bad.nonzero()[0])
