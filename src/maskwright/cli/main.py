"""The command `maskwright`. Verbs import what is heavy inside, so that `list` starts without torch."""

from __future__ import annotations

import sys

import click
import typer

from maskwright.cli.attend import attend
from maskwright.cli.attention_plan import plan
from maskwright.cli.bench import bench
from maskwright.cli.catalogue import cp, list_, show
from maskwright.cli.check import check
from maskwright.cli.delta import app as delta
from maskwright.cli.generate import generate
from maskwright.cli.lab import lab
from maskwright.cli.masks import app as mask
from maskwright.cli.merge import merge
from maskwright.cli.packing import pack, unpack
from maskwright.cli.pretrain import pretrain
from maskwright.cli.protect import protect
from maskwright.cli.prune import prune
from maskwright.cli.report import report
from maskwright.core.errors import BadInput

app = typer.Typer(
    help="Sparse masks for deep learning: exact, composable, saved, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("prune")(prune)
app.command("attend")(attend)
app.command("plan")(plan)
app.command("merge")(merge)
app.command("pretrain")(pretrain)
app.command("protect")(protect)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("check")(check)
app.command("pack")(pack)
app.command("unpack")(unpack)
app.command("list")(list_)
app.command("show")(show)
app.add_typer(delta, name="delta", help="Sparse differences of checkpoints: make, add, hand to PEFT.")
app.add_typer(mask, name="mask", help="Look into mask files, combine them, verify checkpoints.")
app.command("report")(report)
app.command("lab")(lab)
app.command("cp")(cp)


def main() -> None:
    """Exit codes: 0 ok, 2 usage, 3 bad input (one line), 4 check failed, 130 stopped."""
    try:
        app(standalone_mode=True)
    except BadInput as error:
        typer.echo(f"maskwright: {error}", err=True)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
