"""Budgets: how many units each group of each site keeps. Counts are exact whole numbers.

A budget is a function (units per site, density) -> counts (groups,) per site. One rounding rule serves all:
round half to even on units. Shape-only budgets never look at scores, so their counts are known before any
calibration; `needs_scores` marks those that do (global_).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import fsum, prod

import torch
from torch import Tensor

from maskwright.core.errors import BadInput


@dataclass(frozen=True)
class Units:
    """One site as a budget sees it: groups x units, the tensor's shape, and its folded scores on demand."""

    groups: int
    units: int
    shape: tuple[int, ...]
    scores: Callable[[], Tensor] | None = None  # () -> (groups, units), computed anew at each call
    facts: Mapping[str, float] = field(default_factory=dict)  # what a place adds (block, outlier share, role)

    @property
    def total(self) -> int:
        return self.groups * self.units


Sites = Mapping[str, Units]
Counts = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """A budget function and whether it looks at scores."""

    fn: Callable[[Sites, float], Counts]
    needs_scores: bool = False
    needs_facts: tuple[str, ...] = ()

    def __call__(self, sites: Sites, density: float) -> Counts:
        """Counts per group per site. Raises BadInput for a density outside [0, 1]."""
        if not 0 <= density <= 1:
            raise BadInput(f"density lies in [0, 1], got {density}")
        # In the order of names, so that ties and remainders fall alike however the sites come in.
        counts = self.fn({name: sites[name] for name in sorted(sites)}, density)
        return {name: counts[name] for name in sites}


def whole(density: float, units: int) -> int:
    """density x units, rounded half to even, on the decimal the user wrote (0.8 x 100 is 80, never 79)."""
    return round(Fraction(repr(float(density))) * units)


def _share(what: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise BadInput(f"{what}: a density lies in [0, 1], got {share}")
    return share


def _per_group(sites: Sites, densities: Mapping[str, float]) -> Counts:
    return {name: torch.full((u.groups,), whole(densities[name], u.units)) for name, u in sites.items()}


def _spread(sites: Sites, densities: Mapping[str, float], target: int) -> Counts:
    """Counts near densities whose total over all sites is exactly `target` (largest remainder, then site name).

    Inside a site the groups share its count as evenly as whole numbers allow, lower groups first.
    """
    floors = {name: int(densities[name] * u.total + 1e-9) for name, u in sites.items()}
    rest = sorted(sites, key=lambda name: floors[name] - densities[name] * sites[name].total)
    missing = target - sum(floors.values())
    for name in rest:
        if missing <= 0:
            break
        if floors[name] < sites[name].total:
            floors[name] += 1
            missing -= 1
    return {name: _even(floors[name], u.groups) for name, u in sites.items()}


def _even(count: int, groups: int) -> Tensor:
    base, extra = divmod(count, groups) if groups else (0, 0)
    return torch.tensor([base + (group < extra) for group in range(groups)], dtype=torch.int64)


uniform = Budget(lambda sites, density: _per_group(sites, dict.fromkeys(sites, density)))
"""The same density in every group of every site."""


def fixed(densities: Mapping[str, float]) -> Budget:
    """A stated density per site. Raises BadInput when a site has none or a name has no site."""

    def fn(sites: Sites, density: float) -> Counts:
        odd = set(sites) ^ set(densities)
        if odd:
            raise BadInput(f"fixed budget and sites disagree on {', '.join(sorted(odd)[:3])}")
        return _per_group(sites, {name: _share(name, share) for name, share in densities.items()})

    return Budget(fn)


def floor(inner: Budget, share: float) -> Budget:
    """Wrap a budget: no group keeps less than `share` of its units; the total may rise by what that costs."""
    _share("floor", share)

    def fn(sites: Sites, density: float) -> Counts:
        counts = inner(sites, density)
        return {name: counts[name].clamp(min=whole(share, u.units)) for name, u in sites.items()}

    return Budget(fn, inner.needs_scores, inner.needs_facts)


def erk_densities(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    *,
    power: float = 1.0,
    kernel: bool = True,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Erdos-Renyi(-Kernel) densities: density_l = eps (sum of dims / product of dims)^power, capped at 1.

    RigL (arXiv 1911.11134) and SET (1707.04780). `kernel=False` uses the first two dims only (ER). Sites that
    reach 1 are fixed there and eps is solved again, so the mean over entries (or over `sizes`, where units are
    not entries) is exactly `density`. A site without entries has density 1.
    """
    sizes = sizes or {name: prod(shape) for name, shape in shapes.items()}
    dims = {name: (shape if kernel else shape[:2]) or (1,) for name, shape in shapes.items()}
    dense = {name for name in shapes if not sizes[name] or not prod(dims[name])}
    raw = {name: (sum(d) / prod(d)) ** power for name, d in dims.items() if name not in dense}
    while len(dense) < len(shapes):
        free = [name for name in shapes if name not in dense]
        # fsum: the same eps to the last bit, however the sites come in
        budget = fsum(density * sizes[n] for n in free) - fsum((1 - density) * sizes[n] for n in dense)
        eps = budget / fsum(raw[n] * sizes[n] for n in free)
        largest = max(raw[n] for n in free)
        if eps * largest <= 1 + 1e-12:
            return {name: 1.0 if name in dense else min(1.0, eps * raw[name]) for name in shapes}
        dense |= {n for n in free if raw[n] == largest}
    return dict.fromkeys(shapes, 1.0)


def _erk(sites: Sites, density: float, power: float, kernel: bool, given: Mapping[str, float]) -> Counts:
    total = sum(u.total for u in sites.values())
    target = whole(density, total)
    missing = set(given) - set(sites)
    if missing:
        raise BadInput(f"no site named {', '.join(sorted(missing))}")
    stated = {name: whole(_share(name, d), sites[name].total) for name, d in given.items()}
    spent = sum(stated.values())
    free = {name: u.shape for name, u in sites.items() if name not in given}
    room = sum(sites[name].total for name in free)
    if not 0 <= target - spent <= room:
        raise BadInput(
            f"stated densities keep {spent} of {total} units, the budget is {target}: ask {spent / total:.4g} or more"
        )
    # Weighted by units: with Group or Block patterns a unit is many entries, and not as many in every site.
    sizes = {name: sites[name].total for name in free}
    solved = erk_densities(free, (target - spent) / room if room else 1.0, power=power, kernel=kernel, sizes=sizes)
    spread = _spread({name: sites[name] for name in free}, solved, target - spent)
    return {**spread, **{name: _even(count, sites[name].groups) for name, count in stated.items()}}


def er(power: float = 1.0) -> Budget:
    """Erdos-Renyi: the first two dims only."""
    return Budget(lambda sites, density: _erk(sites, density, power, False, {}))


def erk(power: float = 1.0) -> Budget:
    """Erdos-Renyi-Kernel: thin layers keep more; the total is exactly round(density x units)."""
    return Budget(lambda sites, density: _erk(sites, density, power, True, {}))


def erk_plus(given: Mapping[str, float], power: float = 1.0) -> Budget:
    """ERK with stated densities for some sites (the classifier at 1.0, say), solved for the rest.

    Raises BadInput when the stated ones alone exceed the budget, naming the least feasible density.
    """
    return Budget(lambda sites, density: _erk(sites, density, power, True, dict(given)))


def owl_densities(outliers: Mapping[str, float], sizes: Mapping[str, int], density: float, lam: float) -> dict[str, float]:
    """Outlier Weighed Layerwise densities (arXiv 2310.05175): blocks with more outliers keep more.

    outliers: share per block. r = (D - min D) / (max D - min D) * 2 lam; density = r - mean(r) + density.
    Differs: the mean is weighted by block size, so the total is right where blocks differ.
    Raises BadInput when a density leaves (0, 1]. All shares equal, or density 1, gives the uniform density.
    """
    low, high = min(outliers.values()), max(outliers.values())
    if high == low or density == 1:
        return dict.fromkeys(outliers, density)
    lift = {block: (share - low) / (high - low) * 2 * lam for block, share in outliers.items()}
    mean = sum(lift[b] * sizes[b] for b in lift) / sum(sizes[b] for b in lift)
    out = {block: lift[block] - mean + density for block in lift}
    wrong = {block: d for block, d in out.items() if not 0 < d <= 1}
    if wrong:
        block, bad = next(iter(wrong.items()))
        raise BadInput(f"owl asks density {bad:.4g} of block {block}; a smaller lam or another density is needed")
    return out


def owl(lam: float = 0.08) -> Budget:
    """OWL over blocks: each site's `facts["outliers"]` is its block's outlier share, `facts["block"]` its block."""

    def fn(sites: Sites, density: float) -> Counts:
        missing = [name for name, u in sites.items() if "outliers" not in u.facts]
        if missing:
            raise BadInput(f"{missing[0]}: no outlier share was gathered for the owl budget")
        block = {name: str(u.facts["block"]) for name, u in sites.items()}
        shares = {block[name]: u.facts["outliers"] for name, u in sites.items()}
        sizes = {b: sum(u.total for n, u in sites.items() if block[n] == b) for b in shares}
        solved = owl_densities(shares, sizes, density, lam)
        target = whole(density, sum(u.total for u in sites.values()))
        return _spread(sites, {name: solved[block[name]] for name in sites}, target)

    return Budget(fn, needs_facts=("outliers", "block"))


def _global(sites: Sites, density: float) -> Counts:
    """One ranking over all sites: exact counts by a radix search on score bits, one site in memory at a time."""
    target = whole(density, sum(u.total for u in sites.values()))
    prefix, shift, above = 0, 48, 0  # keys > (prefix in its top bits) number `above`, so far
    # Scores are ranked as ordered 64-bit keys; each pass fixes 16 bits of the threshold key.
    while shift >= 0 and target:
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for u in sites.values():
            keys = _keys(u)
            if shift < 48:
                keys = keys[(keys >> (shift + 16)) == prefix]
            histogram += torch.bincount((keys >> shift) & 0xFFFF if shift < 48 else (keys >> 48) + 0x8000, minlength=1 << 16)
        high_first = histogram.flip(0).cumsum(0)
        digit_from_top = int((high_first < target - above).sum())
        above += int(high_first[digit_from_top - 1]) if digit_from_top else 0
        digit = (1 << 16) - 1 - digit_from_top
        prefix = digit - 0x8000 if shift == 48 else (prefix << 16) | digit
        shift -= 16
    counts: Counts = {}
    ties = target - above  # equal to the threshold and still to be kept: lower site name, group and unit first
    for name, u in sites.items():
        if not target:
            counts[name] = torch.zeros(u.groups, dtype=torch.int64)
            continue
        keys = _keys(u).reshape(u.groups, u.units)
        tied = (keys == prefix).sum(1)
        before = tied.cumsum(0) - tied
        counts[name] = (keys > prefix).sum(1) + (ties - before).clamp(min=0).minimum(tied)
        ties -= min(ties, int(tied.sum()))
    return counts


def _keys(u: Units) -> Tensor:
    """Scores as int64 keys in the same order; -0.0 and 0.0 share a key. Raises BadInput on NaN."""
    if u.scores is None:
        raise BadInput("a global budget needs scores")
    scores = u.scores().flatten().double() + 0.0
    if bool(scores.isnan().any()):
        raise BadInput(f"scores of shape {u.shape} hold NaN; nothing can be ranked")
    bits = scores.view(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


global_ = Budget(_global, needs_scores=True)
"""One competition over all groups of all sites: exactly round(density x total) units stay."""

BUDGETS: Mapping[str, Budget] = {
    "uniform": uniform,
    "erk": erk(),
    "er": er(),
    "global": global_,
    "owl": owl(),
}
