"""`maskwright attend`: a language model attending by named methods, held against dense on one text, with a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.cli.attend_job import Job


def attend(
    model: Annotated[str, typer.Argument(help="`default`, a model folder, a .gguf file, or a cached hub id.")],
    method: Annotated[str, typer.Option(help="Attention methods, with commas between (`maskwright list`).")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text; without it, the held-out help topics.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a request.", min=16)] = 2048,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="name=value, or method.name=value: a setting (repeatable).")
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions asked of a context.", min=1)] = 32,
    contexts: Annotated[int, typer.Option(help="Contexts with needles; 0 skips retrieval.", min=0)] = 4,
    windows: Annotated[
        int | None, typer.Option(help="Windows of text for perplexity (default: as many, if the text holds them).", min=0)
    ] = None,
    decoded: Annotated[int, typer.Option(help="Tokens of a window that are decoded one by one.", min=2)] = 33,
    stepwise: Annotated[bool, typer.Option("--stepwise", help="Read questions token by token too, as if decoded.")] = False,
    impl: Annotated[str, typer.Option(help="auto, reference, gather, cpu, flex.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="The folder to write (default: out/attend-METHOD).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of needles and of random choices.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads torch may use.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an earlier report in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or plan) as JSON on stdout.")] = False,
) -> None:
    """Retrieval, perplexity, time and bytes of attention methods against dense, on the same requests in turns.

    MODEL is only read. Run it with nothing else on the machine: what is timed is a whole forward pass.
    """
    import torch

    from maskwright.cli.attend_job import Job, Request
    from maskwright.cli.recipe import command_line

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype {dtype!r}: one of float32, bfloat16, float16")
    if windows == 0 and contexts == 0:
        raise typer.BadParameter("--contexts 0 --windows 0 leaves nothing to measure")
    if threads:
        torch.set_num_threads(threads)
    slugs = tuple(dict.fromkeys(slug.strip().replace("-", "_") for slug in method.split(",") if slug.strip()))
    if not slugs:
        raise typer.BadParameter("--method names no method")
    target = out or Path("out") / ("attend-" + "-".join(slugs))
    command = command_line()
    say = _say if not as_json else _note
    job = Job(
        Request(model, slugs, tuple(set_ or ()), text, length, questions, contexts, windows, decoded, stepwise, impl, dtype,
                seed, command), target, replace, dry_run,
    )  # fmt: skip
    job.open()
    _plan(job, say)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(job.plan))
        return
    try:
        report = job.run(_note)
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        raise BadInput(f"{target}: {error.strerror or error}") from None
    if as_json:
        from maskwright.report.page import plain_json

        typer.echo(json.dumps(plain_json(report), allow_nan=False))
        return
    show(report)
    typer.echo(f"{target}: report.html, report.json ({report['seconds']['total']:.0f} s)")


def _say(line: str) -> None:
    typer.echo(line)


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _plan(job: Job, say: Any) -> None:
    plan = job.plan
    say(
        f"{plan['model']}: {plan['layers']} layers, {plan['heads']} heads on {plan['kv_heads']} key heads, width "
        f"{plan['width']}; {plan['dtype']}, dense attention: {plan['dense']}"
    )
    for told in plan["methods"]:
        settings = ", ".join(f"{k}={v}" for k, v in told["settings"].items())
        say(f"  {told['slug']}({settings}) by impl {told['impl']} ({told['why']})")
    say(
        f"  {plan['contexts']} contexts x {plan['questions']} questions and {plan['windows']} windows of text, "
        f"{plan['length']:,} tokens each ({plan['prefilled']:,} prefilled); {plan['prefills']} prefills, about "
        f"{plan['seconds']:.0f} s"
    )


def show(report: dict[str, Any]) -> None:
    """The short table, and a verdict a method."""
    from maskwright.cli.masks import _table
    from maskwright.report.words import plus_minus, size

    heads = ["", "retrieval", "perplexity", "decoded", "first token", "x dense", "decode ms", "x dense", "cache", "pairs"]
    rows = []
    for name, told in [("dense", report["dense"]), *((m["slug"], m) for m in report["methods"])]:
        rise = told.get("retrieval")
        pairs = told.get("pairs") or {}
        first, step = told["first_token"], told.get("decode")
        rows.append((
            name, plus_minus(100 * rise["value"], 100 * rise["stderr"]) + " %" if rise else "",
            *(plus_minus(told[k]["value"], told[k]["stderr"]) if k in told else "" for k in ("prefilled", "decoded")),
            f"{first['seconds']['median']:.2f} s", f"{first['ratio']['median']:.2f}",
            f"{1000 * step['seconds']['median']:.1f}" if step else "", f"{step['ratio']['median']:.2f}" if step else "",
            size(told["stored"]),
            f"{pairs['kept'] / pairs['causal']:.1%}" if pairs.get("causal") else ("100.0%" if name == "dense" else ""),
        ))  # fmt: skip
    _table(tuple(heads), rows)
    for told in report["methods"]:
        typer.echo(f"{told['slug']}: {told['verdict']['text']}")
