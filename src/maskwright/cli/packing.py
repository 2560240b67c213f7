"""`maskwright pack` and `maskwright unpack`: a sparse checkpoint stored without its zeros, and given back dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.models.packing import Report

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pack(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A pruned model: a folder, a .safetensors file, `default` ...")
    ],
    out: Out,
    values: Annotated[
        str | None, typer.Option(help="Store bfloat16, float16, float32 or int8 (default: as they are).")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A mask file (default: DIR/masks.safetensors, if there).")] = None,
    replace: Replace = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store a pruned checkpoint as bitmasks and kept values; `unpack` gives it back, byte for byte with its own dtype."""
    from maskwright.core.maskset import MaskSet
    from maskwright.models.load import find
    from maskwright.models.packing import survey, write

    source = Path(model).expanduser()
    if not (source.is_file() and source.suffix in (".safetensors", ".json")):
        source = find(model).folder
    if mask is None and (source / "masks.safetensors").is_file():
        mask = source / "masks.safetensors"
    masks = MaskSet.load(mask) if mask else None
    if dry_run:
        report = survey(source, values, masks)
    else:
        report = _written(out, lambda: write(source, out, values, masks, replace))
    if as_json:
        typer.echo(json.dumps(_told(report) | {"out": None if dry_run else str(out), "mask": str(mask) if mask else None}))
    else:
        _show(report)
        typer.echo("dry run: nothing was written" if dry_run else f"{out}: packed; `maskwright unpack` gives it back dense")


def unpack(
    packed: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder, or a legacy sparse-bitmask checkpoint.")],
    out: Out,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Write a packed checkpoint back dense, after checking its digest."""
    from maskwright.models.unpacking import unpack as write

    _written(out, lambda: write(packed, out, replace))
    files = {
        path.name: path.stat().st_size for path in sorted(out.glob("*.safetensors")) if path.name != "masks.safetensors"
    }
    if as_json:
        typer.echo(json.dumps({"out": str(out), "files": files}))
    else:
        typer.echo(f"{out}: {', '.join(files)} ({sum(files.values()):,} bytes)")


def _written(out: Path, do: Any) -> Any:
    try:
        return do()
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror or 'cannot be written'}") from None


def _told(report: Report) -> dict[str, Any]:
    sums = {key: sum(getattr(w, key) for w in report.weights) for key in ("kept", "total", "dense_bytes", "packed_bytes")}
    return {
        "weights": len(report.weights), **sums, "density": sums["kept"] / sums["total"] if sums["total"] else 1.0,
        "bytes_before": report.before, "bytes_after": report.after, "minus_zeros_lost": report.signs,
        "by_weight": [
            {"name": w.name, "shape": list(w.shape), "dtype": w.dtype, "values": w.values, "kept": w.kept,
             "density": w.density, "dense_bytes": w.dense_bytes, "packed_bytes": w.packed_bytes}
            for w in report.weights
        ],
    }  # fmt: skip


def _show(report: Report) -> None:
    from maskwright.cli.masks import _table

    kinds: dict[str, list[Any]] = {}
    for weight in report.weights:
        parts = weight.name.removesuffix(".weight").split(".")
        kinds.setdefault(".".join([part for part in parts if not part.isdigit()][-2:]), []).append(weight)
    rows = []
    for kind, group in [*kinds.items(), ("all", list(report.weights))]:
        kept, total, dense, packed = (sum(getattr(w, key) for w in group) for key in
                                      ("kept", "total", "dense_bytes", "packed_bytes"))  # fmt: skip
        rows.append((kind, f"{len(group)}", f"{kept:,}", f"{total:,}", f"{kept / total if total else 1:.4f}", f"{dense:,}",
                     f"{packed:,}", f"{packed / dense if dense else 1:.3f}"))  # fmt: skip
    _table(("weights", "number", "kept", "of", "density", "dense bytes", "packed bytes", "ratio"), rows)
    typer.echo(f"whole: {report.before:,} bytes before, {report.after:,} after ({report.after / report.before:.3f})")
    if report.signs:
        typer.echo(f"{report.signs:,} dropped weights were -0.0 and come back as 0.0: equal, but not byte for byte")
