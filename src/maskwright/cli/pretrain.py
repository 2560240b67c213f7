"""`maskwright pretrain`: a backbone learns from a folder of images without labels, by filling in what a mask hides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maskwright.cli.stopping import resumable


def pretrain(
    data: Annotated[Path, typer.Option(help="A folder of images (anywhere below it).")],
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    method: Annotated[str, typer.Option(help="spark, dmjd, mae ...")] = "spark",
    model: Annotated[
        str,
        typer.Option(
            help="small-resnet, small-convnext, small-vit, a transformers folder, or package.module:function, "
            "called as function() without arguments: gives the backbone."
        ),
    ] = "small-resnet",
    size: Annotated[int | None, typer.Option(help="Side that images are scaled to (default: all have one size).")] = None,
    grey: Annotated[bool | None, typer.Option("--grey/--colour", help="Channels (default: as the images are).")] = None,
    steps: Annotated[int, typer.Option(help="Steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Greatest learning rate (AdamW).")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay; tensors of one dim are spared.")] = 0.05,
    crop: Annotated[float, typer.Option(help="Least share of the area that a random crop takes; 1: whole images.")] = 0.67,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the images.")] = True,
    density: Annotated[float | None, typer.Option(help="Share of an image that stays visible.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, a field of the method (repeatable).")] = None,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Subfolders are classes: hold out a fifth, report a linear probe.")
    ] = False,
    probe_every: Annotated[int | None, typer.Option(help="Steps between probes (default: a fifth of all).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, crops and masks.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, time and memory, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or plan) as JSON on stdout.")] = False,
) -> None:
    """Pre-train a backbone on images without labels; it is saved so that plain torch or transformers loads it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from maskwright.cli.pretrain_job import PretrainJob, PretrainRecipe
    from maskwright.cli.recipe import command_line, settings
    from maskwright.inputs.pretraining import Recipe

    if out is None and not dry_run:
        raise typer.BadParameter("say where the result goes: --out DIR")
    if probe_every is not None and probe_every < 1:
        raise typer.BadParameter("--probe-every is at least 1")
    said = {**({} if density is None else {"density": density}), **settings(set_ or [])}
    recipe = Recipe(
        steps=steps, batch=batch, lr=lr, weight_decay=weight_decay, crop=crop, flip=flip, seed=seed
    )  # fmt: skip
    asked = PretrainRecipe(
        method, model, str(data), str(out) if out else None, recipe, said, size, grey, labelled, skip_unreadable,
        probe_every, command_line(),
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)
    job = PretrainJob(asked, lambda text: console.print(f"[dim]{text}[/dim]"))
    job.open()
    if dry_run:
        plan = job.plan()
        console.print(
            f"{plan['images']:,} images of {plan['shape'][1]} x {plan['shape'][2]} ({plan['held_out']:,} held out), "
            f"{plan['parameters']:,} parameters ({plan['learner_parameters']:,} with what training adds), "
            f"{steps:,} steps, about {plan['seconds']:.0f} s, {plan['memory'] / 2**30:.1f} GiB memory"
        )
        if as_json:
            typer.echo(json.dumps(plan))
        return
    job.begin(resume, replace)
    columns = (TextColumn("pre-training, loss {task.fields[loss]:.4f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=job.training.step, loss=float("nan"))
        with resumable(job.work):
            report = job.run(lambda at, total, loss: bar.update(task, completed=at, loss=loss))
    if as_json:
        typer.echo(json.dumps({key: value for key, value in report.items() if key != "pictures"}))
        return
    last = report["losses"][-max(1, steps // 10) :]
    console.print(f"loss {report['losses'][0]:.4f} -> {sum(last) / len(last):.4f}")
    for each in report["probe"]:
        console.print(f"linear probe {each['accuracy']:.3f} at step {each['step']}")
    console.print(f"{job.out}: backbone and report.html, {report['seconds']['train']:.0f} s of training")
