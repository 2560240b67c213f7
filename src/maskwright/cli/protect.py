"""`maskwright protect`: a labelled folder of images comes out as images that networks do not learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maskwright.cli.stopping import resumable
from maskwright.core.errors import BadInput


def protect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Your images, one subfolder a class; never changed.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    method: Annotated[str, typer.Option(help="The method that makes the noise.")] = "salm",
    eps: Annotated[str | None, typer.Option(help="Greatest change of a value in [0, 1]: 8/255, 0.03.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of an image's pixels that may change.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, a field of the method (repeatable).")] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="package.module:function, called as function(channels, classes): gives the network that noise is made on."
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side that images are scaled to (default: all have one size).")] = None,
    grey: Annotated[bool | None, typer.Option("--grey/--colour", help="Channels (default: as the images are).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the surrogate and its order.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, time and memory, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or plan) as JSON on stdout.")] = False,
) -> None:
    """Add noise to your own images, before you publish them, that keeps networks from learning them.

    The same names come out as PNG, no 8-bit value further than eps from the original, with report.json and a README.md.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from maskwright.cli.protect_job import ProtectJob, ProtectRecipe
    from maskwright.cli.recipe import command_line, settings

    if out is None and not dry_run:
        raise typer.BadParameter("say where the result goes: --out DIR")
    said = settings(set_ or [])
    said |= {} if density is None else {"density": density}
    said |= {} if eps is None else {"eps": _fraction(eps)}
    asked = ProtectRecipe(
        method, str(folder), str(out) if out else None, said, seed, surrogate, size, grey, skip_unreadable, command_line()
    )
    console = Console(stderr=True, highlight=False)
    job = ProtectJob(asked, lambda text: console.print(f"[dim]{text}[/dim]"))
    job.open()
    if dry_run:
        plan = job.plan()
        console.print(
            f"{plan['images']:,} images of {plan['shape'][1]} x {plan['shape'][2]} in {plan['classes']} classes, "
            f"{plan['pixels']:,} pixels of each may change by {plan['levels']} of 255; at most {plan['seconds']:.0f} s "
            f"({plan['rounds']} rounds), {plan['memory'] / 2**30:.1f} GiB memory"
        )
        if as_json:
            typer.echo(json.dumps(plan))
        return
    job.begin(resume, replace)
    columns = (TextColumn("protecting, surrogate's error {task.fields[error]:.3f}"), BarColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=job.run.method.rounds, completed=job.run.rounds, error=job.run.error)
        with resumable(job.partial):
            report = job.work(lambda at, error: bar.update(task, completed=at, error=error))
    if as_json:
        typer.echo(json.dumps(report))
        return
    found = report["figures"]
    console.print(
        f"{job.out}: {report['data']['images']:,} images, {found['changed']:.1%} of the pixels changed by at most "
        f"{found['greatest']:.0f} of 255, PSNR {found['psnr'] or 0:.1f} dB, surrogate's error {found['error']:.3f}"
    )
    if not report["settled"]:
        console.print(
            "[yellow]the surrogate did not learn the protected images within the rounds: the noise is weak[/yellow]"
        )


def _fraction(text: str) -> float:
    """`8/255` or `0.03`. Raises BadInput."""
    from fractions import Fraction

    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise BadInput(f"--eps is a number or a fraction like 8/255, got {text!r}") from None
