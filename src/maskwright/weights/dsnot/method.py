"""DSnoT: better masks from any one-shot mask by swapping weights in and out, without training."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import NM, Pattern, Unstructured
from maskwright.core.score import magnitude
from maskwright.core.select import select
from maskwright.weights import OneShot, Solved, WeightSite, input_weighted
from maskwright.weights.hessian import inverse_factor


@final
@dataclass(frozen=True)
class Dsnot(OneShot):
    """Per row, regrow what cancels the expected output error, drop what costs least (arXiv 2310.08915).

    a = w x E[x]; delta = sum of a over the dropped = expected dense output minus sparse output. Swaps go on
    while |delta| > threshold, at most `cycles`; a weight changes state at most once and row counts never change.
    initial: the score of the starting mask. stat: E[x] as the mean, or summed over a sequence as in the code
    (`threshold` is on that scale). same_sign: stop a row whose delta would change sign (None: on for N:M, off
    otherwise, as in the code). refine: name patterns of the sites to refine, empty = all (Differs: the code
    refines attention only by default; `refine=("*attn*",)` gives that).
    """

    initial: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    gamma: float = 1.0
    stat: Literal["sum", "mean"] = "sum"
    same_sign: bool | None = None
    refine: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial not in ("wanda", "magnitude", "sparsegpt") or self.stat not in ("sum", "mean"):
            raise BadInput(
                f"dsnot knows initial wanda, magnitude, sparsegpt and stat sum, mean; got {self.initial}, {self.stat}"
            )
        if self.cycles < 0 or self.threshold < 0:
            raise BadInput(f"dsnot needs cycles >= 0 and threshold >= 0, got {self.cycles} and {self.threshold}")

    @property
    def needs(self) -> frozenset[str]:
        gram = {"gram"} if self.initial == "sparsegpt" else set()
        return frozenset({"input_norm", "input_mean", "input_variance"} | gram)

    def rank(self, site: WeightSite) -> Tensor:
        if self.initial == "sparsegpt":
            upper, _, _ = inverse_factor(site.stat("gram"), 0.01)
            return site.tensor((site.matrix.double() / upper.diagonal()).square().float())
        return (input_weighted if self.initial == "wanda" else magnitude)(site)

    def solve(self, site: WeightSite, counts: Tensor) -> Solved:
        start = select(self.rank(site), site.pattern, counts)
        if self.refine and not any(site.named(pattern) for pattern in self.refine):
            return Solved(start)
        scale = float(site.stat("rows") / site.stat("sequences")) if self.stat == "sum" else 1.0
        keep, note = self.swap(
            site.matrix * (site.stat("input_mean") * scale),
            site.stat("input_variance").expand_as(site.matrix),
            # The drop order is always Wanda's score, whatever the start.
            site.layout.matrix(input_weighted(site)),
            site.layout.matrix(start.keep),
            site.pattern,
        )
        return Solved(Mask(site.tensor(keep), site.pattern), note=note)

    def swap(self, a: Tensor, var: Tensor, score: Tensor, start: Tensor, pattern: Pattern) -> tuple[Tensor, str]:
        """The swaps on one matrix, all rows in parallel: new keep and a note with mean |delta| before and after.

        a, var, score, start: (rows, columns). Raises BadInput for patterns other than unstructured and N:M.
        """
        if not isinstance(pattern, NM | Unstructured):
            raise BadInput(f"dsnot offers unstructured and N:M, not {pattern}")
        keep, rows = start.clone(), torch.arange(len(a))
        delta = (a * ~start).sum(1)
        first = delta.clone()
        strict = isinstance(pattern, NM) if self.same_sign is None else self.same_sign
        growable = ~start & (var > 0)  # dead inputs have no variance to divide by
        growth = torch.where(growable, a / var.clamp(min=torch.finfo(a.dtype).tiny) ** self.gamma, -torch.inf)
        grow = growth.sort(dim=1, descending=True, stable=True).indices
        top, bottom = torch.zeros(len(a), dtype=torch.long), growable.sum(1) - 1
        cheap = {}  # per sign of a: kept columns, cheapest first, how many, and how many are used
        for sign in (-1, 1):
            mine = start & (a.sign() == sign)
            order = torch.where(mine, score, torch.inf).sort(dim=1, stable=True).indices
            cheap[sign] = (order, mine.sum(1), torch.zeros(len(a), dtype=torch.long))
        active = torch.ones(len(a), dtype=torch.bool)
        for _ in range(self.cycles):
            up = delta > 0
            active &= (delta.abs() > self.threshold) & (top <= bottom)
            i = grow[rows, torch.where(up, top, bottom).clamp(min=0)]
            able = active
            if isinstance(pattern, NM):
                group = (i // pattern.m * pattern.m)[:, None] + torch.arange(pattern.m)
                free = (keep & start).gather(1, group)  # kept from the start, so not used before
                j = group[rows, torch.where(free, score.gather(1, group), torch.inf).argmin(1)]
                able = active & free.any(1)  # a group with nothing left to drop: this i is passed over
            else:
                (down_order, down_n, down_at), (up_order, up_n, up_at) = cheap[-1], cheap[1]
                active &= torch.where(up, down_at < down_n, up_at < up_n)
                last = a.shape[1] - 1
                j = torch.where(up, down_order[rows, down_at.clamp(max=last)], up_order[rows, up_at.clamp(max=last)])
            new = delta + a[rows, j] - a[rows, i]
            if strict:
                active &= ~able | (new.sign() == first.sign())
            able = able & active
            if not bool(active.any()):
                break
            keep[rows[able], i[able]], keep[rows[able], j[able]] = True, False
            delta = torch.where(able, new, delta)
            top += (active & up).long()
            bottom -= (active & ~up).long()
            if not isinstance(pattern, NM):
                cheap[-1][2].add_((able & up).long())
                cheap[1][2].add_((able & ~up).long())
        return keep, f"mean |delta| {float(first.abs().mean()):.4g} -> {float(delta.abs().mean()):.4g}"
