"""`maskwright merge`: models tuned from one base become one, streamed tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwright.cli.stopping import resumable
from maskwright.core.errors import BadInput


def merge(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML recipe, ours or mergekit's (or give --base and --model).")
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write (or the recipe's `out`).")] = None,
    base: Annotated[str | None, typer.Option(help="The model that all were tuned from.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A tuned model (repeatable).")] = None,
    method: Annotated[str | None, typer.Option(help="breadcrumbs, ties, dare, task_arithmetic, dare_ties ...")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="One for all, or one a model (repeatable).")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of a delta kept: one, or one a model.")] = None,
    drop_top: Annotated[float | None, typer.Option(help="Breadcrumbs: share of greatest deltas removed.")] = None,
    scale: Annotated[float | None, typer.Option(help="On the combined delta (alpha, lambda).")] = None,
    group: Annotated[str | None, typer.Option(help="What competes: tensor, row, global.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, a field of the method (repeatable).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Write float32, bfloat16, float16 (default: the base's).")] = None,
    base_only: Annotated[list[str] | None, typer.Option(help="Tensors taken from the base as they are (pattern).")] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Perplexity of inputs and merge on a UTF-8 text, or `topics`.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to measure.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random masks.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to work with.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Count kept entries, overlap and sign conflicts (slower).")] = False,
    any_tokenizer: Annotated[bool, typer.Option("--any-tokenizer", help="Merge even if tokenizers differ.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, time and memory, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or plan) as JSON on stdout.")] = False,
) -> None:
    """Merge fine-tuned checkpoints of one base without holding a model in memory."""
    from maskwright.cli import merge_recipe as recipes
    from maskwright.cli.merge_job import MergeJob
    from maskwright.cli.recipe import command_line, settings

    if out is None and recipe is not None and recipe.suffix not in (".yaml", ".yml"):
        recipe, out = None, recipe  # one argument, and not a recipe
    given: dict[str, Any] = {
        "base": base, "method": method, "dtype": dtype, "evaluate": evaluate, "windows": windows, "length": length,
        "seed": seed, "threads": threads, "base_only": base_only or None, "out": str(out) if out else None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    said = {"drop_top": drop_top, "scale": scale, "group": group, **(settings(set_) if set_ else {})}
    given["settings"] = {key: value for key, value in said.items() if value is not None}
    members = [{"model": each} for each in model or []]
    _spread(members, weight, "weight", lambda member, value: member.__setitem__("weight", value))
    _spread(
        members, density, "density", lambda member, value: member.setdefault("settings", {}).__setitem__("density", value)
    )
    if members:
        given["models"] = members
    flags = {"dry_run": dry_run, "resume": resume, "replace": replace, "stats": stats, "any_tokenizer": any_tokenizer}
    given |= {key: True for key, on in flags.items() if on}  # one that is not given leaves the recipe's
    given["command"] = command_line()
    chosen = recipes.read(recipe, given) if recipe else recipes.make(given)
    if not chosen.out and not chosen.dry_run:
        raise typer.BadParameter("say where the result goes: maskwright merge ... OUT")
    job = MergeJob(chosen)
    job.open()
    _run(job, chosen.dry_run, as_json)


def _spread(members: list[dict[str, Any]], values: list[float] | None, what: str, put: Any) -> None:
    if not values:
        return
    if len(values) not in (1, len(members)):
        raise BadInput(f"{len(members)} models but {len(values)} values of --{what}: give one for all, or one a model")
    for member, value in zip(members, values * len(members) if len(values) == 1 else values, strict=True):
        put(member, value)


def _run(job: Any, dry_run: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if dry_run:
        plan = job.plan()
        console.print(
            f"{len(job.tuned)} models, {plan.tensors} tensors, {plan.parameters:,} parameters: "
            f"reads {plan.read / 2**30:.2f} GiB, "
            f"writes {plan.written / 2**30:.2f} GiB, about {plan.seconds:.0f} s, {plan.memory / 2**30:.1f} GiB memory"
        )
        if as_json:
            typer.echo(json.dumps(plan.__dict__))
        return
    columns = (TextColumn("merging"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1)
        with resumable(job.folder.work):
            report = job.run(
                lambda text: console.print(f"[dim]{text}[/dim]"),
                lambda at, total: bar.update(task, completed=at, total=total),
            )
    if as_json:
        typer.echo(json.dumps(report))
        return
    for each in report["quality"]:
        console.print(f"perplexity {each['value']:8.2f} ± {each['stderr']:.2f}  {each['model']}")
    console.print(f"{job.out}: {report['bytes'] / 2**20:,.0f} MiB in {report['seconds']['merge']:.1f} s")
