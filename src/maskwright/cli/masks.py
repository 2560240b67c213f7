"""`maskwright mask`: look into mask files, combine them, and verify that a checkpoint still obeys one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from maskwright.core.mask import Mask
    from maskwright.core.pattern import Pattern

app = typer.Typer(no_args_is_help=True)
BROKEN = 4
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
        typer.echo(_plain(f"{key + ':':<10} {value}"))
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
                typer.echo(_plain(f"sites {key}: {', '.join(names)}"))
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


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, a .safetensors file, or a shard index.")],
    masks: Annotated[Path | None, typer.Argument(help="A mask file; may be left out with --pattern.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Check this pattern instead of the mask's own, such as 2:4.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only these sites: layers.*.mlp.*, re:... (repeatable).")] = None,
    as_json: AsJson = False,
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
    files = _Checkpoint(checkpoint)
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
            typer.echo(_plain(f"{row['name']}: {', '.join(parts)}"))
        if len(broken) > 3:
            typer.echo("...")
        typer.echo(f"{len(broken)} of {len(rows)} sites do not obey {what}{unseen}")


def _against_masks(
    files: _Checkpoint, path: Path, asked: Pattern | None, where: Sequence[str], dim_given: bool
) -> list[dict[str, Any]]:
    from maskwright.core.maskset import MaskSet
    from maskwright.core.pattern import NM

    held = MaskSet.load(path)
    if not held:
        raise BadInput(f"{path}: the mask file names no sites")
    names = _chosen(held, where)
    key_of = _match(names, files)
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


def _against_pattern(files: _Checkpoint, asked: Pattern, where: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    every = {key: shape for key, shape, _ in files.each() if len(shape) >= 2}
    if not every:
        raise BadInput(f"{files.path}: holds no weight of 2 or more dims")
    rows, dense = [], 0
    for key, _, read in files.each(_chosen(every, where)):
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


def _chosen(names: Iterable[str], where: Sequence[str]) -> list[str]:
    every = list(names)
    if not where:
        return every
    from maskwright.weights.sites import matches

    for asked in where:
        if not any(matches(name, asked) for name in every):
            raise BadInput(f"where {asked!r} matches no weight; names look like {', '.join(every[:3])}")
    return [name for name in every if any(matches(name, asked) for asked in where)]


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _match(names: Sequence[str], files: _Checkpoint) -> dict[str, str]:
    """Site -> tensor: the exact name, else the one tensor that differs by a prefix either side may lack."""
    longer: dict[str, list[str]] = {}
    for key in files.where:
        for tail in _suffixes(key):
            longer.setdefault(tail, []).append(key)
    out: dict[str, str] = {}
    missing = []
    for name in names:
        found = [name] if name in files.where else longer.get(name, []) + [t for t in _suffixes(name) if t in files.where]
        if len(found) > 1:
            raise BadInput(f"{files.path}: {name} could be {_some(found)}")
        if found:
            out[name] = found[0]
        else:
            missing.append(name)
    if missing:
        raise BadInput(f"{files.path}: holds no tensor for {_some(missing)} ({len(missing)} of {len(names)} sites)")
    taken: dict[str, str] = {}
    for name, key in out.items():
        if key in taken:
            raise BadInput(f"{files.path}: {taken[key]} and {name} would both be {key}")
        taken[key] = name
    return out


def _some(names: Sequence[str]) -> str:
    return _plain(", ".join(names[:3]) + (" ..." if len(names) > 3 else ""))


class _Checkpoint:
    """The tensors of a .safetensors file, a shard index or a model folder, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where: dict[str, Path] = {}  # tensor -> its file
        for file, promised in self._files():
            held = set(self._keys(file))
            absent = sorted(promised - held)
            if absent:
                raise BadInput(f"{file}: lacks {_some(absent)}, which the index promises")
            self.where |= dict.fromkeys(sorted(promised or held), file)
        if not self.where:
            raise BadInput(f"{path}: holds no tensors")

    def _files(self) -> list[tuple[Path, set[str]]]:
        path = self.path
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if not path.is_dir():
            return _index(path) if path.suffix == ".json" else [(path, set())]
        # The order in which transformers looks.
        if (whole := path / "model.safetensors").is_file():
            return [(whole, set())]
        if (index := path / "model.safetensors.index.json").is_file():
            return _index(index)
        indexes = sorted(path.glob("*.safetensors.index.json"))
        others = [f for f in sorted(path.glob("*.safetensors")) if not self._is_mask(f)]
        if len(indexes) == 1:
            return _index(indexes[0])
        if len(others) == 1 and not indexes:
            return [(others[0], set())]
        told = "no .safetensors weights here" if not others else f"which one? {_some([f.name for f in indexes or others])}"
        raise BadInput(f"{path}: {told}")

    def _is_mask(self, file: Path) -> bool:
        with _opened(file) as handle:
            return "maskwright" in (handle.metadata() or {})

    def _keys(self, file: Path) -> list[str]:
        with _opened(file) as handle:
            if "maskwright" in (handle.metadata() or {}):
                raise BadInput(f"{file}: a mask file, not a checkpoint")
            return list(handle.keys())

    def each(self, only: Iterable[str] | None = None) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
        """Name, shape and a reader of each tensor, file by file; nothing is read until the reader is called."""
        by_file: dict[Path, list[str]] = {}
        for key in self.where if only is None else only:
            by_file.setdefault(self.where[key], []).append(key)
        for file, keys in by_file.items():
            with _opened(file) as handle:
                for key in keys:
                    yield key, tuple(handle.get_slice(key).get_shape()), partial(handle.get_tensor, key)


class _opened:
    """safe_open whose failures are one line naming the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self.handle = safe_open(self.file, framework="pt")
            return self.handle.__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"{self.file}: cannot be read as .safetensors: {_plain(str(error))[:160]}") from None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from safetensors import SafetensorError

        self.handle.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise BadInput(f"{self.file}: {_plain(str(error))[:160]}") from None


def _index(path: Path) -> list[tuple[Path, set[str]]]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        shards: dict[str, set[str]] = {}
        for key, file in told["weight_map"].items():
            shards.setdefault(file, set()).add(key)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not a shard index") from None
    for file in shards:
        if not isinstance(file, str) or Path(file).name != file:
            raise BadInput(f"{path}: {_plain(repr(file))} is not the name of a file beside it")
        if not (path.parent / file).is_file():
            raise BadInput(f"{path}: the shard {_plain(file)} is missing")
    return [(path.parent / file, keys) for file, keys in shards.items()]


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


def _plain(text: str) -> str:
    """One line without control characters: names come from files."""
    return "".join(c if c.isprintable() else " " for c in text)


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
        table.add_row(*(escape(_plain(cell)) for cell in row))
    console.print(table)
