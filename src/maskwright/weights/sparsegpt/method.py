"""SparseGPT: prune column by column, and make up for each dropped weight in the columns to come."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import NM, Unstructured
from maskwright.core.select import select
from maskwright.weights import OneShot, Solved, WeightSite
from maskwright.weights.hessian import inverse_factor
from maskwright.weights.oneshot import Within


@final
@dataclass(frozen=True)
class SparseGpt(OneShot):
    """One-shot pruning with least-squares compensation (arXiv 2301.00774).

    Score w^2 / U_jj^2 with H^-1 = U^T U; the mask of `block` columns is chosen when the pass reaches them, over
    all rows jointly (within="tensor", as in the paper) or per row; N:M group by group on compensated weights.
    Differs: a row's or tensor's count is spread over the column blocks in exact whole numbers; factors in float64;
    weights on dead inputs are dropped first, where the code zeroes them whatever the density.
    """

    within: Within = "tensor"
    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.damping <= 0:
            raise BadInput(f"sparsegpt needs block >= 1 and damping > 0, got {self.block} and {self.damping}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def rank(self, site: WeightSite) -> Tensor:
        upper, _, _ = inverse_factor(site.stat("gram"), self.damping)
        return site.tensor((site.matrix.double() / upper.diagonal()).square().float())

    def solve(self, site: WeightSite, counts: Tensor) -> Solved:
        upper, dead, used = inverse_factor(site.stat("gram"), self.damping)
        weight = site.matrix.to(torch.float64 if site.value.dtype == torch.float64 else torch.float32).clone()
        upper = upper.to(weight.dtype)
        alive = (~dead).to(weight.dtype)  # a dead input's weights count for nothing, so they go first
        keep = torch.ones(weight.shape, dtype=torch.bool)
        # In the matrix's own terms: N:M along inputs, else groups are rows or everything.
        pattern = site.pattern
        if isinstance(pattern, NM):
            width = pattern.m * max(1, self.block // pattern.m)
        elif isinstance(pattern, Unstructured) and len(counts) in (1, len(weight)):
            width = self.block
        else:
            raise BadInput(f"{site.name}: sparsegpt offers unstructured (row or tensor) and N:M, not {pattern}")
        for start in range(0, weight.shape[1], width):
            stop = min(start + width, weight.shape[1])
            part, factor = weight[:, start:stop], upper[start:stop, start:stop]
            diagonal = factor.diagonal()
            errors = torch.zeros_like(part)
            if isinstance(pattern, Unstructured):
                # Cumulative rounding: after every block the kept counts so far are the nearest whole numbers.
                due = [torch.round(counts.double() * edge / weight.shape[1]).long() for edge in (start, stop)]
                groups = Unstructured((0,)) if len(counts) == len(weight) > 1 else Unstructured()
                keep[:, start:stop] = select((part / diagonal).square() * alive[start:stop], groups, due[1] - due[0]).keep
            for j in range(stop - start):
                if isinstance(pattern, NM) and j % pattern.m == 0:
                    span = slice(j, j + pattern.m)
                    score = (part[:, span] / diagonal[span]).square() * alive[start:stop][span]
                    keep[:, start + j : start + j + pattern.m] = select(score, NM(pattern.n, pattern.m)).keep
                column = part[:, j]
                error = torch.where(keep[:, start + j], 0, column) / diagonal[j]
                part[:, j:] -= error[:, None] * factor[j, j:]
                errors[:, j] = error
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        note = f"damping raised to {used:g}" if used > self.damping else ""
        return Solved(Mask(site.tensor(keep), pattern), site.tensor(weight.masked_fill(~keep, 0)), note)
