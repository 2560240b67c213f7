"""`maskwright mask`: look into mask files, combine them, and verify that a checkpoint still obeys one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.core.mask import Mask

app = typer.Typer(no_args_is_help=True)
BROKEN = 4
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path, typer.Option(help="The mask file to write.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite it.")]
Inner = Annotated[bool, typer.Option("--inner", help="Use the sites both name; leave the others out.")]


@app.command()
def info(
    file: Path,
    sites: Annotated[bool, typer.Option("--sites", help="A line per site.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a mask file holds and how it was made."""
    from maskwright.core.maskset import MaskSet

    masks = MaskSet.load(file)
    told: dict[str, Any] = {
        "sites": len(masks), "kept": masks.count, "total": masks.total, "density": masks.density,
        "patterns": sorted({m.pattern.spec() for m in masks.values()}), "made_by": dict(masks.made_by), "base": masks.base,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"name": n, "shape": list(m.shape), "pattern": m.pattern.spec(), "kept": m.count} for n, m in masks.items()
    ]
    if as_json:
        typer.echo(json.dumps(told | ({"by_site": rows} if sites else {})))
        return
    for key, value in told.items():
        typer.echo(f"{key}: {value}")
    for row in rows if sites else ():
        typer.echo(f"{row['name']}  {tuple(row['shape'])}  {row['pattern']}  {row['kept']} kept")


@app.command()
def diff(
    a: Path,
    b: Path,
    as_json: AsJson = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 4 when they differ.")] = False,
) -> None:
    """Kept in both, only in A, only in B, site by site."""
    from maskwright.core.maskset import MaskSet

    one, two = MaskSet.load(a), MaskSet.load(b)
    rows = []
    for name in (n for n in one if n in two):
        left, right = one[name], two[name]
        both = (left & right).count
        rows.append({"name": name, "both": both, "only_a": left.count - both, "only_b": right.count - both})
    lone = {"sites_only_a": [n for n in one if n not in two], "sites_only_b": [n for n in two if n not in one]}
    told = {"overlap": one.overlap(two), "equal": one.equal(two), **lone, "by_site": rows}
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(f"overlap {told['overlap']:.6f}, {'equal' if told['equal'] else 'different'}")
        for row in rows:
            if row["only_a"] or row["only_b"]:
                typer.echo(f"{row['name']}: both {row['both']}, only A {row['only_a']}, only B {row['only_b']}")
        for key, names in lone.items():
            if names:
                typer.echo(f"{key}: {', '.join(names)}")
    if exit_code and not told["equal"]:
        raise typer.Exit(BROKEN)


def _combine(a: Path, b: Path, out: Path, op: Callable[[Mask, Mask], Mask], inner: bool, replace: bool, word: str) -> None:
    from maskwright.core.maskset import MaskSet

    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    made = MaskSet.load(a).combine(MaskSet.load(b), op, "inner" if inner else "strict", word)
    made.save(out)
    typer.echo(f"{out}: {made!r}")


@app.command("and")
def and_(a: Path, b: Path, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by both."""
    _combine(a, b, out, lambda x, y: x & y, inner, replace, "and")


@app.command("or")
def or_(a: Path, b: Path, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by either."""
    _combine(a, b, out, lambda x, y: x | y, inner, replace, "or")


@app.command()
def minus(a: Path, b: Path, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by A and not by B."""
    _combine(a, b, out, lambda x, y: x - y, inner, replace, "minus")


@app.command()
def verify(
    checkpoint: Path,
    masks: Path,
    pattern: Annotated[str | None, typer.Option(help="Check this pattern instead of the mask's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Does this checkpoint still obey this mask and its pattern? Exit 4 when not. The base hash is not asked."""
    from maskwright.core.maskset import MaskSet
    from maskwright.core.pattern import NM, parse

    held = MaskSet.load(masks)
    asked = parse(pattern) if pattern else None
    left, broken = dict(held.items()), []
    for name, tensor in _tensors(checkpoint, list(held)):
        mask = left.pop(name)
        if tuple(tensor.shape) != mask.shape:
            raise BadInput(f"{name}: the checkpoint has shape {tuple(tensor.shape)}, the mask {mask.shape}")
        back = int(((tensor != 0) & ~mask.keep).sum())
        form = asked or mask.pattern
        over = int((form.fold((tensor != 0).float()).sum(1) > form.n).sum()) if isinstance(form, NM) else 0
        if back or over:
            broken.append({"name": name, "came_back": back, "groups_over": over})
    if left:
        raise BadInput(f"{checkpoint}: holds no tensor for {', '.join(list(left)[:3])}")
    if as_json:
        typer.echo(json.dumps({"sites": len(held), "broken": broken}))
    elif not broken:
        typer.echo(f"{len(held)} sites obey the mask")
    else:
        for row in broken[:3]:
            typer.echo(f"{row['name']}: {row['came_back']} dropped weights are not 0, {row['groups_over']} groups over")
        typer.echo(f"{len(broken)} of {len(held)} sites do not obey the mask")
    if broken:
        raise typer.Exit(BROKEN)


def _tensors(checkpoint: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    """The named tensors, one at a time, from a .safetensors file or a (sharded) folder; prefixes may differ."""
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("model*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    if not files or not all(f.is_file() for f in files):
        raise BadInput(f"{checkpoint}: no .safetensors weights here")
    try:
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():
                    same = [n for n in names if n == key]
                    found = same or [n for n in names if n.endswith("." + key) or key.endswith("." + n)]
                    if len(found) == 1:
                        yield found[0], handle.get_tensor(key)
    except SafetensorError as error:
        raise BadInput(f"{checkpoint}: {' '.join(str(error).split())[:160]}") from None
