"""The one walk of one-shot pruning: rules, exact counts, then block after block solved and written in place.

Flow: sites -> rules (pattern and density per site) -> budget (exact counts) -> walk -> solve -> Mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskwright import __version__
from maskwright.core.budget import Units
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet, base_hash, tensor_hash
from maskwright.weights.sites import WeightSite, refuse_bad_values, sites
from maskwright.weights.statistics import GATHERED, output_error
from maskwright.weights.walk import Batch, Step, walk

if TYPE_CHECKING:
    from maskwright.weights.oneshot import OneShot


@dataclass(frozen=True)
class Rule:
    """Pattern and density for the sites that `where` matches; None means the method's own. First rule wins."""

    where: str
    pattern: str | None = None
    density: float | None = None
    dense: bool = False  # leave these sites alone


@dataclass(frozen=True)
class Solved:
    """What a method decides for one site: its mask, and the new weight where the method changes what is kept."""

    mask: Mask
    value: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class SiteResult:
    """One solved site: mask, relative output error on sampled calibration rows (None without calibration)."""

    name: str
    block: int | None
    mask: Mask
    value: Tensor | None
    error: float | None
    note: str
    base: str  # tensor_hash of the weight before


@dataclass(frozen=True)
class BlockResult:
    """One solved block. settled: once the next block has been asked for, nothing reads its weights again."""

    label: str
    sites: tuple[SiteResult, ...]
    settled: bool = False


def maskset(method: OneShot, results: Sequence[SiteResult], seed: int, order: Sequence[str]) -> MaskSet:
    """Solved sites as a MaskSet in model order, with how they were made."""
    by_name = {r.name: r for r in results}
    slug = type(method).__module__.split(".")[-2]
    made = {"method": slug, "version": __version__, "settings": method.settings(), "seed": seed}
    kept = [name for name in order if name in by_name]
    return MaskSet({n: by_name[n].mask for n in kept}, made, base_hash({n: by_name[n].base for n in kept}))


def assign(
    method: OneShot, model: nn.Module, rules: Sequence[Rule] = (), seed: int = 0
) -> tuple[dict[str, WeightSite], dict[str, float]]:
    """The sites to prune, each with its pattern in its own dims, and each site's density.

    Raises BadInput for a rule that matches nothing, or whose sites are all taken by earlier rules (shadowed).
    """
    found = sites(model, method.where)
    rule_of: dict[str, Rule] = {}
    for rule in rules:
        mine = [name for name, site in found.items() if site.named(rule.where)]
        if not mine:
            raise BadInput(f"rule where {rule.where!r} matches no site")
        free = [name for name in mine if name not in rule_of]
        if not free:
            raise BadInput(f"rule where {rule.where!r} is shadowed: earlier rules take all its {len(mine)} sites")
        rule_of |= dict.fromkeys(free, rule)
    out, densities = {}, {}
    for name, site in found.items():
        rule = rule_of.get(name, Rule(name))
        if rule.dense:
            continue
        pattern = site.layout.localise(method.form(rule.pattern or method.pattern), site.shape)
        try:
            pattern.fits(site.shape)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
        densities[name] = method.density if rule.density is None else rule.density
        out[name] = replace(site, pattern=pattern, seed=seed)
    if not out:
        raise BadInput("every site is left dense; there is nothing to prune")
    refuse_bad_values(out)
    return out, densities


def counts_of(
    method: OneShot, chosen: Mapping[str, WeightSite], densities: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Exact kept counts per group of every site. N:M sites keep their pattern's count; the budget sees the rest.

    shares: outlier share per site, for the owl budget. Raises BadInput when a site's groups would keep nothing.
    """
    counts: dict[str, Tensor] = {}
    for density in dict.fromkeys(densities.values()):
        free: dict[str, Units] = {}
        for name, site in chosen.items():
            if densities[name] != density:
                continue
            groups, units = site.pattern.grid(site.shape)
            if site.pattern.fixed is not None:
                counts[name] = torch.tensor(site.pattern.fixed).expand(groups)  # one number, not one a group
                continue
            facts = (
                {"outliers": shares[name], "block": float(-1 if site.block is None else site.block)}
                if name in shares
                else {}
            )
            free[name] = Units(groups, units, site.shape, partial(_folded, method, site), facts)
        if free:
            counts |= method.allocation(free, density)
    for name, site in chosen.items():
        # A competition between sites may empty one (it is reported, not refused); a budget by shape may not.
        if not method.allocation.needs_scores and not int(counts[name].sum()) and densities[name] > 0:
            raise BadInput(f"{name}: density {densities[name]:g} of shape {site.shape} under {site.pattern} keeps no unit")
    return {name: counts[name] for name in chosen}


def _folded(method: OneShot, site: WeightSite) -> Tensor:
    return site.pattern.fold(method.rank(site))


def solve(
    model: nn.Module,
    method: OneShot,
    batches: Sequence[Batch] | None,
    *,
    seed: int = 0,
    rules: Sequence[Rule] = (),
    done: Mapping[str, BlockResult] | None = None,
    backup: dict[str, tuple[WeightSite, Tensor]] | None = None,
    counts: Mapping[str, Tensor] | None = None,
    planned: Callable[[Mapping[str, Tensor]], None] | None = None,
    sample_rows: int = 512,
) -> Iterator[BlockResult]:
    """Prune a model block by block, in place, yielding each block's result as it is done.

    done: results of an earlier, interrupted run by label; they are applied, not solved again, so the rest comes
    out bit for bit as in one run. backup: filled with each weight as it was (for `masks`). counts: the exact counts
    that the interrupted run found and gave to `planned`, needed with `done` where the budget looks at the dense model.
    sample_rows: input rows kept for a site's reconstruction error; 0 leaves the errors out.
    """
    done = done or {}
    chosen, densities = assign(method, model, rules, seed)
    unknown = method.needs - GATHERED
    if unknown:
        raise BadInput(f"one-shot pruning cannot gather {', '.join(sorted(unknown))}")
    budget = method.allocation
    if (method.needs or budget.needs_facts) and not batches:
        raise BadInput(
            f"{type(method).__name__} needs calibration batches ({', '.join(sorted(method.needs)) or 'outlier shares'})"
        )
    shares: dict[str, float] = {}
    ranked = chosen
    if counts is None:
        if budget.needs_facts or (budget.needs_scores and method.needs):
            if done:
                raise BadInput("this budget looks at the whole dense model: resuming takes the counts it found")
            ranked, shares = survey(model, method, batches or (), chosen)
        counts = counts_of(method, ranked, densities, shares)
        del ranked
        if planned:
            planned(counts)
    for result in done.values():
        for r in result.sites:
            write(chosen[r.name], r.mask, r.value)
        yield result
    labels = frozenset(done)
    if method.needs:
        steps = walk(model, batches or (), chosen, method.needs, done=labels, sample_rows=sample_rows)
    else:
        steps = _dry_steps(chosen, labels)
    for step in steps:
        solved = tuple(_solve_site(method, site, counts[site.name], backup) for site in step.sites)
        yield BlockResult(step.label, solved, step.settled)


def _solve_site(method: OneShot, site: WeightSite, counts: Tensor, backup: Any) -> SiteResult:
    base = tensor_hash(site.value)  # still dense: a weight changes in its own turn alone
    try:
        found = method.solve(site, counts)
    except BadInput as error:
        raise error if str(error).startswith(site.name) else BadInput(f"{site.name}: {error}") from None
    before = site.value.clone() if (backup is not None or "sample" in site.stats) else site.value
    if backup is not None:
        backup[site.name] = (site, before)
    write(site, found.mask, found.value)
    off = None
    if "sample" in site.stats:
        off = output_error(site.stats["sample"], site.layout.matrix(before).float(), site.matrix.float())
    return SiteResult(site.name, site.block, found.mask, found.value, off, found.note, base)


@torch.no_grad()
def write(site: WeightSite, mask: Mask, value: Tensor | None) -> None:
    """Write a solved site into its parameter: the new weight where there is one, exact zeros where dropped."""
    if value is not None:
        site.parameter.copy_(value)
    site.parameter.masked_fill_(~mask.keep, 0)


def _dry_steps(chosen: Mapping[str, WeightSite], done: frozenset[str]) -> Iterator[Step]:
    """Blocks of a data-free method: the same labels' worth of progress, without a forward."""
    blocks: dict[str, list[WeightSite]] = {}
    for site in chosen.values():
        blocks.setdefault("model" if site.block is None else f"block {site.block}", []).append(site)
    yield from (Step(label, tuple(found), settled=True) for label, found in blocks.items() if label not in done)


def survey(
    model: nn.Module, method: OneShot, batches: Sequence[Batch], chosen: Mapping[str, WeightSite], multiple: float = 5.0
) -> tuple[dict[str, WeightSite], dict[str, float]]:
    """One dense walk: every site with its statistics, and its block's outlier share for the owl budget.

    Outlier share (OWL, arXiv 2310.05175): percent of |w| ||x|| entries above `multiple` x their matrix's mean,
    over all entries of a block. `multiple` is the method's `outlier_multiple` where it has one.
    """
    multiple = getattr(method, "outlier_multiple", multiple)
    out: dict[str, WeightSite] = {}
    above: dict[int | None, int] = {}
    size: dict[int | None, int] = {}
    for step in walk(model, batches, chosen, method.needs | {"input_norm"}, propagate=False, sample_rows=0):
        for site in step.sites:
            weighted = site.matrix.abs() * site.stat("input_norm")
            above[site.block] = above.get(site.block, 0) + int((weighted > multiple * weighted.mean()).sum())
            size[site.block] = size.get(site.block, 0) + weighted.numel()
            out[site.name] = site
    shares = {name: 100 * above[site.block] / size[site.block] for name, site in out.items()}
    return {name: out[name] for name in chosen}, shares
