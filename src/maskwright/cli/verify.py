"""`maskwright mask verify`: does a checkpoint still obey a mask, or a pattern?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput
from maskwright.models.checkpoint import Checkpoint, match, plain

if TYPE_CHECKING:
    from torch import Tensor

    from maskwright.core.pattern import Pattern

BROKEN = 4


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, a .safetensors file, or a shard index.")],
    masks: Annotated[Path | None, typer.Argument(help="A mask file; may be left out with --pattern.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Check this pattern instead of the mask's own, such as 2:4.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only these sites: layers.*.mlp.*, re:... (repeatable).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Does this checkpoint still obey this mask and its pattern? Exit 4 when not. The base hash is not asked.

    Every dropped weight must be exactly 0 (-0.0 is 0); a kept weight may be 0. N:M allows at most N nonzero weights
    in M. With a mask, a block or group that holds a dropped weight must be all 0; without one, a block or group must
    be all 0 or hold no 0. Without MASKS and --where, every weight of 2 or more dims that holds a 0 is checked.
    """
    from maskwright.core.pattern import Unstructured, parse

    asked = parse(pattern) if pattern else None
    if masks is None and asked is None:
        raise BadInput("verify needs a mask file, or --pattern")
    if masks is None and isinstance(asked, Unstructured):
        raise BadInput(f"pattern {pattern} asks nothing of a checkpoint without a mask file")
    files = Checkpoint(checkpoint)
    dense = 0
    if masks is None:
        assert asked is not None
        rows, dense = _against_pattern(files, asked, where or [])
    else:
        rows = _against_masks(files, masks, asked, where or [], dim_given="@" in (pattern or ""))
    broken = [row for row in rows if row["came_back"] or row["groups_over"]]
    if as_json:
        typer.echo(json.dumps({"ok": bool(rows) and not broken, "sites": len(rows), "dense": dense, "broken": broken}))
    else:
        _verdict(rows, broken, dense, "the mask" if masks else str(asked))
        if broken and masks is None and not where:
            typer.echo("every weight that holds a 0 was checked, an embedding too; --where chooses the pruned ones")
    if broken or not rows:
        raise typer.Exit(BROKEN)


def _verdict(rows: list[dict[str, Any]], broken: list[dict[str, Any]], dense: int, what: str) -> None:
    unseen = f"; not checked, as they hold no 0: {dense} other weights" if dense else ""
    if not rows:
        typer.echo(f"no weight obeys {what}: not one holds a 0")
    elif not broken:
        typer.echo(f"{len(rows)} sites obey {what}{unseen}")
    else:
        for row in broken[:3]:
            parts = [f"{row['came_back']:,} dropped weights are not 0"] if row["came_back"] else []
            if row["groups_over"]:
                parts.append(f"{row['groups_over']:,} groups break {row['pattern']} by {row['weights_over']:,} weights")
            typer.echo(plain(f"{row['name']}: {', '.join(parts)}"))
        if len(broken) > 3:
            typer.echo("...")
        typer.echo(f"{len(broken)} of {len(rows)} sites do not obey {what}{unseen}")


def _against_masks(
    files: Checkpoint, path: Path, asked: Pattern | None, where: Sequence[str], dim_given: bool
) -> list[dict[str, Any]]:
    from maskwright.core.maskset import MaskSet
    from maskwright.core.pattern import NM

    held = MaskSet.load(path)
    if not held:
        raise BadInput(f"{path}: the mask file names no sites")
    names = chosen(held, where)
    key_of = match(names, files)
    found: dict[str, dict[str, Any]] = {}
    name_of = {key: name for name, key in key_of.items()}
    for key, shape, read in files.each(name_of):
        name = name_of[key]
        mask = held[name]
        if shape != mask.shape:
            raise BadInput(f"{name}: the checkpoint has shape {shape}, the mask {mask.shape}")
        own, form = mask.pattern, asked or mask.pattern
        if isinstance(form, NM) and isinstance(own, NM) and not dim_given:
            form = NM(form.n, form.m, own.dim)  # the dim that inputs lie along is the mask's to know
        found[name] = _judge(name, key, read(), form, ~mask.keep)
    return [found[name] for name in names]


def _against_pattern(files: Checkpoint, asked: Pattern, where: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    every = {key: shape for key, shape, _ in files.each() if len(shape) >= 2}
    if not every:
        raise BadInput(f"{files.path}: holds no weight of 2 or more dims")
    rows, dense = [], 0
    for key, _, read in files.each(chosen(every, where)):
        row = _judge(key, key, read(), asked, None, need_zero=not where)
        dense += row is None
        rows += [row] if row is not None else []
    return rows, dense


def _judge(name: str, key: str, value: Tensor, form: Pattern, dropped: Tensor | None, need_zero: bool = False) -> Any:
    """One site's counts, or None for a weight without a 0 when `need_zero`. `value` is freed when this returns."""
    from maskwright.core.pattern import NM, Unstructured

    if value.dtype.is_floating_point and value.dtype.itemsize == 1:
        value = value.float()  # 8-bit floats cannot be compared
    alive = value != 0
    if need_zero and bool(alive.all()):
        return None
    try:
        form.fits(tuple(value.shape))
    except BadInput as error:
        raise BadInput(f"{name}: {error}" + ("; choose weights with --where" if dropped is None else "")) from None
    groups = weights = 0
    if isinstance(form, NM):
        over = (form.fold(alive).sum(1) - form.n).clamp(min=0)
        groups, weights = int((over > 0).sum()), int(over.sum())
    elif not isinstance(form, Unstructured):
        # A unit is torn when it holds a dropped (without a mask: a zero) weight and a nonzero one.
        live, gone = form.fold(alive.float()), form.fold((~alive if dropped is None else dropped).float())
        torn = (live > 0) & (gone > 0)
        groups, weights = int(torn.sum()), int((live if dropped is not None else live.minimum(gone))[torn].sum())
    back = 0 if dropped is None else int((alive & dropped).sum())
    return {"name": name, "tensor": key, "shape": list(value.shape), "pattern": form.spec(), "came_back": back,
            "groups_over": groups, "weights_over": weights}  # fmt: skip


def chosen(names: Iterable[str], where: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches; without patterns all. Raises BadInput for one that matches nothing."""
    every = list(names)
    if not where:
        return every
    from maskwright.weights.sites import matches

    for asked in where:
        if not any(matches(name, asked) for name in every):
            raise BadInput(f"where {asked!r} matches no weight; names look like {', '.join(every[:3])}")
    return [name for name in every if any(matches(name, asked) for asked in where)]
