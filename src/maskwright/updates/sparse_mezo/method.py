"""Sparse MeZO: fine-tuning by two forwards along random noise that lies on a part of the weights only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates.method import Tuning
from maskwright.updates.sparse_mezo.run import Run
from maskwright.updates.sparse_mezo.sites import find


@final
@dataclass(frozen=True)
class SparseMezo(Tuning):
    """g = (L(w + eps m z) - L(w - eps m z)) / (2 eps), then w -= lr (g m z + weight_decay m w); z from a seed, never stored.

    arXiv 2402.15751 (the mask m) and 2305.17333 (MeZO, `mask="dense"`). m takes, per tensor, the round(density * n)
    entries of smallest |w| ("small"; "large", or "random"), ties to the lower index. `refresh` "start" keeps the mask
    of the first weights; "step" is the paper's: the threshold of the first weights on the weights of each step
    ("random": drawn anew). The step that a mask of density d allows is about 1/d of the dense one (the noise of the
    estimate grows with the entries moved): choose `lr` for each mask. `n` directions are averaged. `snapshot` keeps a
    copy of the trained entries so that the way back is exact to the bit; without it the weights may move by a last
    bit, and no more memory is used than one bit an entry. `vectors`: tensors of one dim are trained "full", "masked"
    like the others, or "skipped". `where` names tensors (maskwright.weights.sites.matches); none: all that require
    gradients. Weight decay spares tensors of one dim.
    Differs: the mask is held at one bit an entry instead of made anew in each forward, and the first mask has the
    exact count; ties at the level fall to the lower index at every step.
    Raises BadInput for settings that cannot be.
    """

    density: float = 0.25
    eps: float = 1e-3
    lr: float = 1e-6
    weight_decay: float = 0.0
    mask: Literal["small", "large", "random", "dense"] = "small"
    refresh: Literal["start", "step"] = "start"
    vectors: Literal["full", "masked", "skipped"] = "full"
    n: int = 1
    snapshot: bool = False
    where: tuple[str, ...] = ()

    def validate(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput(f"sparse_mezo needs density in (0, 1], got {self.density}")
        if not (0 < self.eps < math.inf and 0 <= self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise BadInput(
                f"sparse_mezo needs eps > 0, lr and weight_decay >= 0, got {self.eps}, {self.lr}, {self.weight_decay}"
            )
        if self.n < 1:
            raise BadInput(f"sparse_mezo averages at least one direction, got n = {self.n}")
        words = {"mask": ("small", "large", "random", "dense"), "refresh": ("start", "step")}
        words["vectors"] = ("full", "masked", "skipped")
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"sparse_mezo: {name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @contextmanager
    def attach(self, model: nn.Module, *, seed: int = 0) -> Iterator[Run]:
        """Yields a Run: call `run.step(closure)` in your loop. The weights are trained in place; nothing hangs on the model.

        Raises BadInput naming a tensor that cannot be trained (not contiguous, not finite, meta), or when none is left.
        """
        found = find(model, self.mask, self.density, self.vectors, self.where)
        half = {str(site.parameter.dtype) for site in found if torch.finfo(site.parameter.dtype).bits < 32}
        if half:
            told = (
                f"sparse_mezo: in {', '.join(sorted(half))} noise and steps below a weight's last bit are lost; use float32"
            )
            warnings.warn(told, stacklevel=3)
        yield Run(self, model, found, seed)
