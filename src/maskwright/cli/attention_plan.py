"""`maskwright plan`: find a rule for every attention head of a model, and save it for `attend` and `use`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.attention.heads import HeadPlan

Say = Callable[[str], None]
PLANNED = ("moa", "sparse_vdit")
# What the command itself tells a search, and what no text can say.
_TOLD = {"method", "model", "calibration", "batches", "density", "lengths", "seed", "say", "grid", "bands", "told", "counts",
         "settings"}  # fmt: skip


def plan(
    model: Annotated[str, typer.Argument(help="A language model as in `attend`; for sparse_vdit, lab:video_denoiser.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(PLANNED)}.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    density: Annotated[float | None, typer.Option(help="moa: mean share of the cache kept (default 0.5).")] = None,
    lengths: Annotated[str | None, typer.Option(help="moa: lengths to profile (default 512,1024).")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples a length (or clips).", min=1)] = 4,
    answer: Annotated[int, typer.Option(help="moa: tokens the dense model answers; their loss counts.", min=1)] = 8,
    text: Annotated[Path | None, typer.Option(help="moa: a UTF-8 text; without it, the calibration help topics.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value: a setting of the search.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration samples.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads torch may use.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done and stop.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on stdout.")] = False,
) -> None:
    """Profile MODEL, choose one rule for each attention head, save the plan.

    `attend MODEL --method moa --set plan=OUT` measures it; `use(model, Moa(heads="OUT"))` runs it.
    """
    import torch

    slug = method.replace("-", "_")
    if slug not in PLANNED:
        raise BadInput(f"{method!r} is no method that plans; known: {', '.join(PLANNED)}")
    if slug != "moa" and (density is not None or lengths is not None or text is not None):
        raise BadInput(f"{slug} takes no --density, --lengths or --text: its patterns are fixed by the model's grid")
    if out.is_dir() or (out.exists() and not replace):
        raise BadInput(f"{out} {'is a folder' if out.is_dir() else 'exists; --replace overwrites it'}")
    if threads:
        torch.set_num_threads(threads)
    given = settings_of(slug, set_ or [])
    if slug == "moa":
        share = 0.5 if density is None else density
        work = _moa(model, share, _lengths(lengths or "512,1024"), samples, answer, text, seed, given, _note)
    else:
        work = _sparse_vdit(model, samples, seed, given, _note)
    if dry_run:
        typer.echo("dry run: nothing was written", err=True)
        return
    try:
        found = work()
        out.parent.mkdir(parents=True, exist_ok=True)
        found.save(out)
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror or error}") from None
    if as_json:
        typer.echo(json.dumps(json.loads(out.read_text(encoding="utf-8")) | {"out": str(out)}))
        return
    show(found)
    use = f"; `maskwright attend {model} --method moa --set plan={out}` measures it" if slug == "moa" else ""
    typer.echo(f"{out}: {found.layers} layers x {found.heads} heads{use}")


def settings_of(slug: str, pairs: list[str]) -> dict[str, Any]:
    """Settings of a method's search from `name=value` pairs. Raises BadInput listing those it has."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    from maskwright.cli.recipe import settings

    parts = [_search(slug)]
    if weigh := getattr(sys.modules[f"maskwright.attention.{slug}.search"], "weigh", None):
        parts.append(weigh)  # search passes its other settings on to it
    names = dict(vars(sys.modules[f"maskwright.attention.{slug}.method"]))
    hints = {name: hint for part in parts for name, hint in get_type_hints(part, localns=names).items()}
    known = list(dict.fromkeys(name for part in parts for name in signature(part).parameters if name not in _TOLD))
    given = settings(pairs)
    for key, value in given.items():
        if key not in known:
            raise BadInput(f"the search of {slug} has no setting {key!r}; it has {', '.join(known)}")
        try:
            given[key] = TypeAdapter(hints[key], config=ConfigDict(strict=False)).validate_python(value)
        except ValidationError as error:
            said = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise BadInput(f"{slug}: {key}={value!r}: {said}") from None
    return given


def _search(slug: str) -> Callable[..., HeadPlan]:
    from importlib import import_module

    found: Callable[..., HeadPlan] = import_module(f"maskwright.attention.{slug}.search").search
    return found


def _moa(
    name: str, density: float, lengths: tuple[int, ...], samples: int, answer: int, text: Path | None, seed: int,
    given: dict[str, Any], say: Say,
) -> Callable[[], HeadPlan]:  # fmt: skip
    """Load and check everything; what is given back runs the search."""
    from maskwright.cli.attend_methods import fitting
    from maskwright.core.method import get
    from maskwright.lab.text import topics_split
    from maskwright.models.evaluate import read_text
    from maskwright.models.load import find, load

    if not 0 < density <= 1:
        raise BadInput(f"moa: density lies in (0, 1], got {density:g}")
    kind = get("moa")
    said = read_text(text) if text else topics_split()[0]
    source = find(name)
    model, tokenizer = load(source)
    shape = fitting(model, source.name, [kind()])
    if tokenizer is None:
        raise BadInput(f"{source.name} has no tokenizer, so the text cannot be read")
    positions = getattr(model.config, "max_position_embeddings", None)
    every = sorted({*lengths, given.get("unseen") or max(lengths)})
    if positions and max(every) > positions:
        raise BadInput(f"length {max(every)} is beyond the {positions} positions of {source.name}")
    prompts = {n: _prompts(tokenizer, said, n, samples, answer, seed) for n in every}
    say(
        f"{source.name}: {shape.layers} layers, {shape.heads} heads on {shape.kv_heads} key heads; density {density:g}; "
        f"{samples} samples at {', '.join(map(str, every))} tokens, the last {answer} of them answered by the dense model"
    )

    def work() -> HeadPlan:
        found: HeadPlan = kind.search(model, prompts, density=density, lengths=lengths, seed=seed, say=say, **given)
        return found

    return work


def _prompts(tokenizer: Any, text: str, length: int, samples: int, answer: int, seed: int) -> Any:
    """(samples, length - answer): prose with needles, its question at the end, the first tokens cut off to fit it."""
    import numpy as np
    import torch

    from maskwright.lab.haystack import haystack

    room, rows, chance = max(length - answer, 1), [], np.random.default_rng([seed, length])
    for i in range(samples + 20):
        start = int(chance.integers(max(1, len(text) - 16 * length)))  # a part of the text: quicker to read in
        part = text[text.rfind("\n", 0, start) + 1 : start + 16 * length]
        hay = haystack(tokenizer, room, needles=max(1, min(32, length // 64)), seed=seed * 1000 + i, text=part)
        asked = [q for q, span in zip(hay.questions, hay.spans, strict=True) if span[0] >= len(q)]
        if asked:  # else the question would push out what it asks for
            rows.append(torch.cat([hay.context[0, len(asked[0]) :], asked[0]]))
        if len(rows) == samples:
            return torch.stack(rows)
    raise BadInput(f"moa: length {length} is too short for a question and the text it asks for")


def _sparse_vdit(name: str, samples: int, seed: int, given: dict[str, Any], say: Say) -> Callable[[], HeadPlan]:
    import torch

    from maskwright.core.method import get
    from maskwright.lab import images, video
    from maskwright.lab.made import made, path_of
    from maskwright.lab.sources import SourceMissing

    place, _, wanted = name.partition(":")
    if place != "lab" or wanted not in video.RECIPES:
        raise BadInput(f"{name}: sparse_vdit plans the lab's video models: {', '.join(f'lab:{n}' for n in video.RECIPES)}")
    recipe = video.RECIPES[wanted]
    ready = path_of(wanted, seed, recipe).is_file()
    say(f"{name}: {recipe.about}" + ("" if ready else f", to be trained first ({recipe.steps} steps, minutes)"))
    get("sparse_vdit")  # a room that cannot be imported says so before any work

    def progress(step: int, loss: float) -> None:
        if (step + 1) % 50 == 0:
            say(f"{wanted}: step {step + 1}/{recipe.steps}, loss {loss:.4f}")

    def work() -> HeadPlan:
        try:
            model = made(wanted, seed, recipe, progress=progress)
            draw, chance = video.denoising_rows(images.digits().train), torch.Generator().manual_seed(seed)
        except SourceMissing as error:
            raise BadInput(str(error)) from None
        batches = [draw(1, chance)[0] for _ in range(samples)]
        say(f"measure {samples} clips under every pattern")
        # Relative errors, half of a head's output the most that may be lost: as `profile` of the room.
        return _search("sparse_vdit")(model, batches, **{"relative": True, "epsilon": 0.5, **given})

    return work


def show(found: HeadPlan) -> None:
    """The table of rules: a line a layer."""
    from maskwright.cli.masks import _table

    rows = []
    for layer, heads in enumerate(found.rules):
        many = Counter(" ".join([rule.name, *(f"{k}={v:g}" for k, v in rule.parameters.items())]) for rule in heads)
        rows.append((str(layer), "; ".join(f"{count} x {rule}" for rule, count in many.most_common())))
    _table(("layer", "heads and their rules"), rows, left=2)
    shares = found.table.get("densities")
    if shares:
        told = ", ".join(f"{share:.3f} at {n}" for share, n in zip(shares, found.table["lengths"], strict=False))
        typer.echo(f"mean density {told} tokens")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"lengths {text!r} are not whole numbers with commas between") from None
    if list(found) != sorted(set(found)) or found[0] < 2:
        raise BadInput(f"lengths {text!r} must rise and be at least 2")
    return found


def _note(line: str) -> None:
    typer.echo(line, err=True)
