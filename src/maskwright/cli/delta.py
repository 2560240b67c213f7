"""`maskwright delta`: sparse differences between checkpoints as files: make, look into, add, hand to PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskwright.cli.stopping import writing
from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.updates import Deltas

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
    where: Annotated[list[str] | None, typer.Option(help="Only these tensors: layers.*.mlp.*, re:... (repeatable).")] = None,
    full: Annotated[list[str] | None, typer.Option(help="Tensors stored whole (pattern, repeatable).")] = None,
    any_tokenizer: Annotated[bool, typer.Option("--any-tokenizer", help="Go on even if tokenizers differ.")] = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Store what a tuned model changed as a small file, tensor by tensor."""
    from maskwright.cli.delta_job import STORED, made, opened

    if density is not None and not 0 < density <= 1:
        raise BadInput(f"density lies in (0, 1], got {density:g}")
    if dtype not in (None, *STORED):
        raise BadInput(f"dtype {dtype!r} cannot be stored, only {', '.join(STORED)}")
    new, old = opened(tuned, base, out, replace, any_tokenizer)
    deltas = made(new, old, density=density, where=where or (), full=full or ())
    with writing(out):
        deltas.save(out, STORED[dtype] if dtype else None)
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
    from maskwright.cli.delta_job import loaded, scaled, separate
    from maskwright.models.folder import copy_others
    from maskwright.models.streams import FileTensors, Folder
    from maskwright.updates.apply import added, same_base

    if len(files) < 2:
        raise typer.BadParameter("give delta files and then OUT")
    given, out = [scaled(text) for text in files[:-1]], Path(files[-1])
    base = FileTensors(model)
    separate(out, [model, *(raw.path for raw in base.raws), *(path for path, _ in given)])
    if out.is_file():
        raise BadInput(f"{out} is a file; a folder is written")
    terms = loaded(given)
    shapes = base.shapes()
    for deltas, _ in terms:
        for name in (*deltas, *deltas.full):
            if name not in shapes:
                raise BadInput(f"{model}: has no {name}, which a delta changes")
        for name in deltas.base:
            if name not in shapes and not any_base:
                same_base(name, None, deltas, "quick")
    folder = Folder(out, base, {}, {"delta": files[:-1], "inputs": base.mark()})
    if folder.work.exists() and not replace:
        raise BadInput(f"{folder.work} is left of a run that was killed; --replace starts anew")
    with writing(out):
        folder.begin(False, replace)
        try:
            with folder.opened():
                for name in shapes:
                    value = base.read(name, 0, base.length(name)).view(shapes[name][1])
                    for deltas, _ in terms:
                        if not any_base:
                            same_base(name, value, deltas, "full" if verify else "quick")
                    folder.write(name, 0, added(name, value, terms).flatten())
                    folder.whole(name)
                if model.is_dir():
                    copy_others(model, folder.work)
                folder.finish()
        except BaseException:
            folder.discard()  # nothing goes on with it
            raise
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
    with writing(out):
        write_shira(out, deltas, base=base)
    typer.echo(f"{out}: a SHiRA adapter of {len(deltas)} layers; PeftModel.from_pretrained(model, {str(out)!r})")


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
