"""`maskwright delta`: sparse differences between checkpoints as files: make, look into, add, hand to PEFT."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from maskwright.models.streams import FileTensors
    from maskwright.updates import Deltas
    from maskwright.updates.cuts import Pair

app = typer.Typer(no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")]


@app.command("make")
def make(
    tuned: Annotated[Path, typer.Argument(help="The tuned model.")],
    base: Annotated[Path, typer.Argument(help="The model it was tuned from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    density: Annotated[float | None, typer.Option(help="Keep this share, the greatest over all tensors.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Store values as float32, bfloat16, float16.")] = None,
    full: Annotated[list[str] | None, typer.Option(help="Tensors stored whole (pattern, repeatable).")] = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Store what a tuned model changed as a small file, tensor by tensor."""
    import torch

    from maskwright.models.streams import FileTensors
    from maskwright.updates import Deltas
    from maskwright.updates.deltas import BaseId, Delta

    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    if density is not None and not 0 < density <= 1:
        raise BadInput(f"density lies in (0, 1], got {density:g}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BadInput(f"dtype {dtype!r} cannot be stored")
    new, old = FileTensors(tuned), FileTensors(base)
    whole = new.leave_out(full or [])
    old.leave_out(full or [])
    merging = _differences(old, new)
    cut = merging.cut(density) if density is not None else None
    found, ids = {}, {}
    for name in merging.names:
        gap = merging.gap(name)
        kept = (gap != 0) if cut is None else (gap != 0) & cut(name, gap)
        if bool(kept.any()):
            where = kept.nonzero().flatten()
            shape = merging.shapes[name][1]
            found[name] = Delta(shape, where, gap[where])
            ids[name] = BaseId.of(old.read(name, 0, old.length(name)).view(shape))
    held = {name: new.read(name, 0, new.length(name)).view(new.shape(name)) for name in whole}
    deltas = Deltas(found, held, ids, {"method": "delta", "tuned": str(tuned), "base": str(base), "density": density})
    deltas.save(out, None if dtype is None else getattr(torch, dtype))
    _say(deltas, out, as_json)


@app.command("info")
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A delta file.")],
    as_json: AsJson = False,
) -> None:
    """What a delta file holds."""
    from maskwright.updates import Deltas

    _say(Deltas.load(file), file, as_json)


@app.command("add")
def add(
    model: Annotated[Path, typer.Argument(help="The base model's folder or file.")],
    files: Annotated[list[str], typer.Argument(metavar="DELTA... OUT", help="Delta files, `FILE:0.5` scales; then OUT.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every entry of the base, not a sample.")] = False,
    any_base: Annotated[bool, typer.Option("--any-base", help="Add to another base all the same.")] = False,
    replace: Replace = False,
) -> None:
    """Write the base with the deltas' sum added; a negative scale takes one off."""
    from maskwright.models.folder import copy_others
    from maskwright.models.streams import FileTensors, Folder
    from maskwright.updates import Deltas
    from maskwright.updates.apply import added, same_base

    if len(files) < 2:
        raise typer.BadParameter("give delta files and then OUT")
    base, out = FileTensors(model), Path(files[-1])
    if out.resolve() == model.resolve():
        raise BadInput(f"{out} is the base; choose another folder to write")
    terms = []
    for text in files[:-1]:
        path, _, factor = text.rpartition(":")
        scaled = bool(path) and _number(factor)
        terms.append((Deltas.load(Path(path if scaled else text)), float(factor) if scaled else 1.0))
    shapes = base.shapes()
    for deltas, _ in terms:
        for name in (*deltas, *deltas.full):
            if name not in shapes:
                raise BadInput(f"{model}: has no {name}, which a delta changes")
    folder = Folder(out, base, {}, {"delta": files[:-1], "inputs": base.mark()})
    folder.begin(False, replace)
    with folder.opened():
        try:
            for name in shapes:
                value = base.read(name, 0, base.length(name)).view(shapes[name][1])
                for deltas, _ in terms:
                    if name in deltas and not any_base:
                        same_base(name, value, deltas, "full" if verify else "quick")
                folder.write(name, 0, added(name, value, terms).flatten())
                folder.whole(name)
        except BadInput:
            folder.discard()
            raise
        if model.is_dir():
            copy_others(model, folder.work)
        folder.finish()
    typer.echo(f"{out}: {model} with {len(terms)} deltas added")


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A delta file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter folder to write.")],
    base: Annotated[str, typer.Option(help="The base model's name or path, for PEFT's config.")] = "",
) -> None:
    """Write the deltas as a SHiRA adapter that PEFT loads."""
    from maskwright.updates import Deltas, write_shira

    if out.exists():
        raise BadInput(f"{out} exists")
    deltas = Deltas.load(file)
    write_shira(out, deltas, base=base)
    typer.echo(f"{out}: a SHiRA adapter of {len(deltas)} layers; PeftModel.from_pretrained(model, {str(out)!r})")


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _differences:
    """tuned - base of each tensor, and the cut that keeps a share of all of them."""

    def __init__(self, base: FileTensors, tuned: FileTensors) -> None:
        from maskwright.updates import Merging
        from maskwright.updates.task_arithmetic import TaskArithmetic

        self.merging = Merging(base, [tuned], TaskArithmetic())  # refuses what does not fit, by name
        self.names, self.shapes = self.merging.names, self.merging.shapes

    def gap(self, name: str) -> Tensor:
        from maskwright.kernels.merge import difference

        return difference(*self.pair(name))

    def pair(self, name: str, count: int = 0) -> Pair:
        return self.merging.pieces.pair(0, name, 0, prod(self.shapes[name][1]), count)

    def cut(self, density: float):  # type: ignore[no-untyped-def]
        from maskwright.kernels.merge import kept
        from maskwright.updates.cuts import Row, cuts

        total, wide = sum(prod(self.shapes[name][1]) for name in self.names), self.merging.wide(0, self.names)
        row = Row("all tensors", (0,) * len(self.names), total, lambda i, count: self.pair(self.names[i], count), wide=wide)
        (found,) = cuts(row, (round(density * total),))
        return lambda name, gap: kept(gap, found.keep(self.names.index(name)))


def _say(deltas: Deltas, path: Path, as_json: bool) -> None:
    told = {
        "file": str(path), "bytes": path.stat().st_size, "entries": deltas.count, "of": deltas.total,
        "density": deltas.density, "tensors": len(deltas), "full": sorted(deltas.full), "made_by": dict(deltas.made_by),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{path}: {deltas.count:,} of {deltas.total:,} entries ({deltas.density:.4f}) of {len(deltas)} tensors")
    typer.echo(f"{told['bytes']:,} bytes" + (f"; stored whole: {', '.join(sorted(deltas.full))}" if deltas.full else ""))
