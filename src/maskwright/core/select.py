"""select and draw: the only top-k and the only random choice of the library.

Promise: exactly the count asked for, per group; ties fall to the lower index (the lower index stays);
+inf must stay, -inf must go, NaN is refused. The result is the same for every number of threads.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Pattern

Counts = int | Tensor
_SORT_UNITS = 64  # up to this many units a group, a stable sort of small rows beats a partition
_CHUNK = 1 << 21  # entries handled at a time: bounds the index tensors a sort makes


def select(score: Tensor, pattern: Pattern, counts: Counts | None = None) -> Mask:
    """Keep the best units by score, exactly `counts` in each group.

    score: any shape the pattern fits; greater means keep. counts: one int for every group or (groups,) ints;
    None where the pattern fixes it (N:M). Raises BadInput on NaN, on a count outside 0..units, and on more
    +inf (or fewer entries above -inf) in a group than its count.
    """
    shape = tuple(score.shape)
    pattern.fits(shape)
    if not score.dtype.is_floating_point:
        score = _exact_double(score)
    units = pattern.fold(score)
    kept = top(units, _counts(counts, pattern, units.shape[0], units.shape[1], shape), shape)
    return Mask(pattern.unfold(kept, shape), pattern)


def _exact_double(score: Tensor) -> Tensor:
    wide = score.double() if not score.dtype.is_complex else None
    if wide is None or (score.dtype in (torch.int64, torch.uint64) and bool((wide.abs() >= 2**53).any())):
        raise BadInput(f"{score.dtype} scores of shape {tuple(score.shape)} cannot be ranked exactly in float64")
    return wide


def top(units: Tensor, counts: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """(groups, units) scores and (groups,) counts -> bool of the same shape, exactly `counts` true in a row."""
    groups, width = units.shape
    kept = torch.empty(units.shape, dtype=torch.bool, device=units.device)
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, groups, step):
        rows = units[start : start + step].contiguous()
        want = counts[start : start + step]
        _refuse(rows, want, shape or tuple(units.shape))
        small = width <= _SORT_UNITS
        kept[start : start + step] = _by_sort(rows, want) if small else _by_threshold(rows, want)
    return kept


def _refuse(rows: Tensor, want: Tensor, shape: tuple[int, ...]) -> None:
    # One fused pass finds the usual case (all finite); the exact questions are asked only when it fails.
    if bool(torch.isfinite(rows.sum(dtype=torch.float64))):
        return
    if bool(rows.isnan().any()):
        raise BadInput(f"scores of shape {shape} hold NaN; nothing can be selected from them")
    musts = rows.eq(float("inf")).sum(1)
    cannot = rows.eq(float("-inf")).sum(1)
    for what, bad in (("must be kept", musts > want), ("may be kept", rows.shape[1] - cannot < want)):
        if bool(bad.any()):
            group = int(bad.nonzero()[0])
            number = int(musts[group]) if what == "must be kept" else int(rows.shape[1] - cannot[group])
            raise BadInput(
                f"shape {shape}, group {group}: {number} units {what} of {rows.shape[1]}, asked for {int(want[group])}"
            )


def _by_sort(rows: Tensor, want: Tensor) -> Tensor:
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices
    rank_kept = torch.arange(rows.shape[1], device=rows.device) < want[:, None]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, rank_kept.expand_as(rows))


def _by_threshold(rows: Tensor, want: Tensor) -> Tensor:
    width = rows.shape[1]
    kept = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    for count in want.unique().tolist():
        where = (want == count).nonzero().flatten()
        part = rows if len(where) == len(rows) else rows[where]
        if count in (0, width):
            got = torch.full_like(part, bool(count), dtype=torch.bool)
        else:
            got = _exact(part, count)
        if part is rows:
            return got
        kept[where] = got
    return kept


def _exact(rows: Tensor, count: int) -> Tensor:
    """Exactly `count` a row, 0 < count < width: a partition finds the threshold, ties are settled by index."""
    threshold = _kth_largest(rows, count)
    kept = rows > threshold
    missing = count - kept.sum(1)
    tied = rows == threshold
    surplus = tied.sum(1) > missing
    kept |= tied & ~surplus[:, None]
    for row in surplus.nonzero().flatten().tolist():
        kept[row, tied[row].nonzero().flatten()[: int(missing[row])]] = True
    return kept


def _kth_largest(rows: Tensor, count: int) -> Tensor:
    if rows.device.type != "cpu":
        return rows.kthvalue(rows.shape[1] - count + 1, dim=1, keepdim=True).values
    if rows.dtype in (torch.float16, torch.bfloat16):
        return _kth_largest(rows.float(), count).to(rows.dtype)
    where = rows.shape[1] - count
    return torch.from_numpy(np.partition(rows.detach().numpy(), where, axis=1)[:, where : where + 1].copy())


def _counts(counts: Counts | None, pattern: Pattern, groups: int, units: int, shape: tuple[int, ...]) -> Tensor:
    if counts is None:
        if pattern.fixed is None:
            raise BadInput(f"{pattern} does not say how many units stay: give counts")
        counts = pattern.fixed
    if pattern.fixed is not None and not bool((torch.as_tensor(counts) == pattern.fixed).all()):
        raise BadInput(f"{pattern} keeps {pattern.fixed} a group; another count was asked for on shape {shape}")
    given = torch.as_tensor(counts)
    if given.dtype.is_floating_point or given.dtype == torch.bool:
        raise BadInput(f"counts are whole numbers, got {given.dtype}")
    if given.numel() != 1 and tuple(given.shape) != (groups,):
        raise BadInput(f"{pattern} on shape {shape} has {groups} groups; got counts of shape {tuple(given.shape)}")
    full = given.to(torch.int64).flatten().expand(groups) if groups else torch.zeros(0, dtype=torch.int64)
    if groups and (int(full.min()) < 0 or int(full.max()) > units):
        raise BadInput(
            f"{pattern} on shape {shape} has {units} units a group; asked to keep {int(full.min())}..{int(full.max())}"
        )
    return full


def generator(seed: int, name: str = "") -> torch.Generator:
    """A CPU generator for one site: it depends on the seed and the site's name, never on the order of sites."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(
    pattern: Pattern,
    shape: tuple[int, ...],
    counts: Counts | None = None,
    *,
    rng: torch.Generator,
    probability: float | None = None,
    score: Tensor | None = None,
) -> Mask:
    """A random mask: exactly `counts` units in each group, or each unit with `probability` (Bernoulli).

    `score` may hold +inf (must keep) and -inf (must go); its finite values are ignored.
    Raises BadInput when both or neither of counts and probability are given (N:M fixes its own count).
    """
    pattern.fits(shape)
    groups, units = pattern.grid(shape)
    if score is not None:
        if tuple(score.shape) != tuple(shape):
            raise BadInput(f"a score of shape {tuple(score.shape)} cannot force units of a mask of shape {shape}")
        if bool(score.isnan().any()):
            raise BadInput(f"scores of shape {shape} hold NaN; they can force nothing")
    # 53 random bits: two equal draws, which would fall to the lower index, practically never happen.
    noise = torch.rand(groups, units, generator=rng, dtype=torch.float64)
    if probability is not None:
        if counts is not None or pattern.fixed is not None:
            raise BadInput("draw takes counts or a probability, not both")
        if not 0 <= probability <= 1:
            raise BadInput(f"a probability lies in 0..1, got {probability}")
        kept = noise < probability
        if score is not None:
            folded = pattern.fold(score)
            if bool(folded.isnan().any()):
                raise BadInput(f"{pattern} on shape {shape}: a unit is forced both ways")
            kept = (kept | folded.eq(float("inf"))) & ~folded.eq(float("-inf"))
        return Mask(pattern.unfold(kept, shape), pattern)
    if score is not None:
        folded = pattern.fold(score)
        # inf - inf inside one unit is NaN, which `top` refuses.
        noise = torch.where(folded.isinf() | folded.isnan(), folded.double(), noise)
    return Mask(pattern.unfold(top(noise, _counts(counts, pattern, groups, units, shape), shape), shape), pattern)


def disjoint(pattern: Pattern, shape: tuple[int, ...], n: int, *, rng: torch.Generator) -> Iterator[Mask]:
    """n random masks that cover everything exactly once; the sizes differ by at most one unit a group.

    Raises BadInput when the pattern fixes its own count (N:M) or n is not in 1..units.
    """
    groups, units = pattern.grid(shape)
    if pattern.fixed is not None or not 1 <= n <= units:
        raise BadInput(f"{pattern} on shape {shape} cannot be cut into {n} disjoint masks")
    order = torch.rand(groups, units, generator=rng, dtype=torch.float64).argsort(dim=1, stable=True)
    edges = [units * part // n for part in range(n + 1)]
    for low, high in itertools.pairwise(edges):
        kept = torch.zeros(groups, units, dtype=torch.bool).scatter_(1, order[:, low:high], True)
        yield Mask(pattern.unfold(kept, shape), pattern)
