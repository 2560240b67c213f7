"""`maskwright prune`: a pretrained model made sparse by a named method, with a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwright.cli.stopping import resumable


def prune(
    model: Annotated[str | None, typer.Argument(help="`default`, a model folder, a .gguf file, or a cached hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="A one-shot method (`maskwright list`).")] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4, 4:8, 1:4, unstructured, block:32x32 ...")] = None,
    density: Annotated[float | None, typer.Option(help="Share kept, 0 to 1.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Sites: layers.*.mlp.*, re:... (repeatable).")] = None,
    within: Annotated[str | None, typer.Option(help="Which weights compete: row, tensor, global.")] = None,
    budget: Annotated[str | None, typer.Option(help="Density between sites: uniform, erk, er, global, owl.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, a field of the method (repeatable).")] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with the same keys.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A UTF-8 text to calibrate on.")] = None,
    evaluate: Annotated[str | None, typer.Option(help="A UTF-8 text to measure perplexity on.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Held-out windows; 0 skips perplexity.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of calibration windows and random choices.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads torch may use.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="Resume under other threads or instructions.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or plan) as JSON on stdout.")] = False,
) -> None:
    """Prune a pretrained language model and write a checkpoint that plain transformers loads, with a report."""
    import torch

    from maskwright.cli import recipe as recipes
    from maskwright.cli.job import Job

    given: dict[str, Any] = {
        "model": model, "method": method, "pattern": pattern, "density": density, "within": within, "budget": budget,
        "where": where or None, "out": out, "calibration": calibration, "evaluate": evaluate, "samples": samples,
        "length": length, "windows": windows, "seed": seed, "threads": threads,
        "settings": recipes.settings(set_) if set_ else None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"dry_run": dry_run, "resume": resume, "replace": replace, "any_machine": any_machine}
    given["command"] = recipes.command_line()
    chosen = recipes.read(recipe, given) if recipe else recipes.make(given, "prune")
    if not chosen.out and not dry_run:
        raise typer.BadParameter("say where the result goes: --out DIR")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    show = _Show()
    job = Job(chosen, show.say)
    job.open()
    plan = job.plan
    show.plan(job, plan)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(plan.__dict__))
        return
    with resumable(job.work):
        try:
            report = job.run(show.progress)
        finally:
            show.close()
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show.result(report, job.out)


_PACES = {"before": "", "after": "tokens/s", "accelerated": "  fastest forms", "packed": "  all packed"}


class _Show:
    """Plan, progress and result for a person; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._bar: Any = None

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{text}[/dim]")

    def plan(self, job: Any, plan: Any) -> None:
        from rich.table import Table

        r = job.recipe
        self.console.print(
            f"[bold]{job.source.name}[/bold]: {r.method}, {r.pattern}, {plan.sites} sites in {plan.blocks} blocks"
        )
        table = Table(box=None, header_style="dim")
        for head in ("sites", "number", "kept", "of", "density"):
            table.add_column(head, justify="left" if head == "sites" else "right")
        for kind, number, kept, total in plan.rows:
            table.add_row(kind, str(number), f"{kept:,}", f"{total:,}", f"{kept / total:.3f}")
        self.console.print(table)
        self.console.print(
            f"{plan.site_parameters:,} of {plan.parameters:,} parameters; "
            f"about {plan.seconds:.0f} s, {plan.memory / 2**30:.1f} GiB memory, {plan.disk / 2**30:.1f} GiB disk"
        )

    def progress(self, done: int, total: int, label: str, left: float) -> None:
        if not self.console.is_terminal:
            self.console.print(f"block {done}/{total} {label}, {left:.0f} s left")
            return
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, description=f"{label}, {left:.0f} s left")
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def result(self, report: dict[str, Any], out: Path) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="dim")
        for head in ("", "before", "after"):
            table.add_column(head, justify="right" if head else "left")
        quality, speed = report["quality"], report["speed"]
        if quality:
            cells = [f"{quality[w]['value']:.2f} ± {quality[w]['stderr']:.2f}" for w in ("before", "after")]
            table.add_row("perplexity", *cells)
        table.add_row("kept weights", f"{report['total']:,}", f"{report['kept']:,}")
        paces = {w: f"{speed[w]['tokens_per_second']:.1f}" for w in _PACES if speed and w in speed}
        for when, name in _PACES.items():
            if name and when in paces:
                table.add_row(name, paces["before"] if when == "after" and "before" in paces else "", paces[when])
        console = Console(highlight=False)
        console.print(table)
        console.print(f"{out}: model, masks, report.html ({report['seconds']['total']:.0f} s)", soft_wrap=True)
