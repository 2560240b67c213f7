"""`maskwright mask`: look into mask files, combine them, and verify that a checkpoint still obeys one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.cli.verify import BROKEN, verify
from maskwright.core.errors import BadInput
from maskwright.models.checkpoint import plain

if TYPE_CHECKING:
    from maskwright.core.mask import Mask

app = typer.Typer(no_args_is_help=True)
app.command()(verify)
First = Annotated[Path, typer.Argument(metavar="A", help="A mask file.")]
Second = Annotated[Path, typer.Argument(metavar="B", help="Another mask file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path, typer.Option(help="The mask file to write.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite it.")]
Inner = Annotated[bool, typer.Option("--inner", help="Use the sites both name; leave the others out.")]


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A mask file.")],
    sites: Annotated[bool, typer.Option("--sites", help="A line per site.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a mask file holds and how it was made."""
    from maskwright.core.mask import Mask
    from maskwright.core.maskset import MaskSet
    from maskwright.core.store import load

    masks = load(file)
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        kept = mask.count if isinstance(mask, Mask) else int((mask.values > 0).sum())
        total = (mask.keep if isinstance(mask, Mask) else mask.values).numel()
        share = kept / total if total else 1.0
        rows.append(
            {"name": name, "shape": list(mask.shape), "pattern": mask.pattern.spec(), "kept": kept, "total": total,
             "density": share}
        )  # fmt: skip
    kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
    told: dict[str, Any] = {
        "kind": "hard" if isinstance(masks, MaskSet) else "soft", "sites": len(rows), "kept": kept, "total": total,
        "density": kept / total if total else 1.0, "patterns": sorted({row["pattern"] for row in rows}),
        "made_by": dict(masks.made_by), "base": masks.base,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told | ({"by_site": rows} if sites else {})))
        return
    made = told["made_by"]
    lines = [
        ("sites", f"{len(rows)}" + (" (soft masks; kept = above 0)" if told["kind"] == "soft" else "")),
        ("kept", f"{kept:,} of {total:,}"),
        ("density", f"{told['density']:.6g}"),
        ("patterns", ", ".join(told["patterns"])),
        *((key, made[key] if isinstance(made[key], str) else json.dumps(made[key])) for key in made),
        ("base", masks.base or "none stored"),
    ]
    for key, value in lines:
        typer.echo(plain(f"{key + ':':<10} {value}"))
    if sites:
        cells = [
            (row["name"], "x".join(map(str, row["shape"])), row["pattern"], f"{row['kept']:,}", f"{row['total']:,}",
             f"{row['density']:.4f}")
            for row in rows
        ]  # fmt: skip
        _table(("site", "shape", "pattern", "kept", "of", "density"), cells, left=3)


@app.command()
def diff(
    a: First,
    b: Second,
    as_json: AsJson = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 4 when they differ.")] = False,
) -> None:
    """Kept in both, only in A, only in B, site by site. The order of the sites is no difference."""
    from maskwright.core.maskset import MaskSet

    one, two = MaskSet.load(a), MaskSet.load(b)
    rows: list[dict[str, Any]] = []
    for name in (n for n in one if n in two):
        left, right = one[name], two[name]
        both = _named(name, lambda x, y: x & y)(left, right).count
        row: dict[str, Any] = {"name": name, "both": both, "only_a": left.count - both, "only_b": right.count - both}
        either = row["both"] + row["only_a"] + row["only_b"]
        row["overlap"] = both / either if either else 1.0
        row["patterns"] = [left.pattern.spec(), right.pattern.spec()]
        row["equal"] = not row["only_a"] and not row["only_b"] and left.pattern == right.pattern
        rows.append(row)
    lone = {"sites_only_a": [n for n in one if n not in two], "sites_only_b": [n for n in two if n not in one]}
    counts = {key: sum(row[key] for row in rows) for key in ("both", "only_a", "only_b")}
    either = sum(counts.values())
    overlap = (counts["both"] / either if either else 1.0) if rows or not (one or two) else None
    equal = not any(lone.values()) and all(row["equal"] for row in rows)
    if as_json:
        typer.echo(json.dumps({"overlap": overlap, "equal": equal, **counts, **lone, "by_site": rows}))
    else:
        shared = "no site in common" if overlap is None else f"overlap {overlap:.6f}"
        typer.echo(f"{shared}, {'equal' if equal else 'different'}")
        typer.echo(f"{len(rows)} sites in common: both {counts['both']:,}, only A {counts['only_a']:,}, "
                   f"only B {counts['only_b']:,}")  # fmt: skip
        odd = [row for row in rows if not row["equal"]]
        if odd:
            cells = [
                (r["name"], f"{r['both']:,}", f"{r['only_a']:,}", f"{r['only_b']:,}", f"{r['overlap']:.4f}",
                 " / ".join(dict.fromkeys(r["patterns"])))
                for r in odd
            ]  # fmt: skip
            _table(("site", "both", "only A", "only B", "overlap", "pattern"), cells)
        for key, names in zip(("only in A", "only in B"), lone.values(), strict=True):
            if names:
                typer.echo(plain(f"sites {key}: {', '.join(names)}"))
    if exit_code and not equal:
        raise typer.Exit(BROKEN)


@app.command("and")
def and_(a: First, b: Second, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by both."""
    _combine(a, b, out, lambda x, y: x & y, inner, replace, "and")


@app.command("or")
def or_(a: First, b: Second, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by either."""
    _combine(a, b, out, lambda x, y: x | y, inner, replace, "or")


@app.command()
def minus(a: First, b: Second, out: Out, inner: Inner = False, replace: Replace = False) -> None:
    """Kept by A and not by B."""
    _combine(a, b, out, lambda x, y: x - y, inner, replace, "minus")


def _named(name: str, op: Callable[[Mask, Mask], Mask]) -> Callable[[Mask, Mask], Mask]:
    def named(x: Mask, y: Mask) -> Mask:
        try:
            return op(x, y)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None

    return named


def _combine(a: Path, b: Path, out: Path, op: Callable[[Mask, Mask], Mask], inner: bool, replace: bool, word: str) -> None:
    from maskwright.core.maskset import MaskSet

    if out.is_dir():
        raise BadInput(f"{out} is a folder")
    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    one, two = MaskSet.load(a), MaskSet.load(b)
    for name in (n for n in one if n in two):
        if one[name].shape != two[name].shape:
            raise BadInput(f"{name}: shape {one[name].shape} in {a}, {two[name].shape} in {b}")
    made = one.combine(two, op, "inner" if inner else "strict", word)
    if not made and (one or two):
        raise BadInput(f"{a} and {b} have no site in common")
    try:
        made.save(out)
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror or 'cannot be written'}") from None
    typer.echo(f"{out}: {made!r}")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    # Into a pipe nothing may be cut or wrapped: one line a site.
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at < left else "right", no_wrap=at > 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))
    console.print(table)
