"""`maskwright generate`: text from a sparse or packed model, run from packed weights where that is faster."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from maskwright.weights.accelerated import Acceleration

Values = Annotated[str | None, typer.Option(help="Hold kept values as bfloat16, float16, float32 or int8.")]
Threads = Annotated[int | None, typer.Option(help="Threads torch may use.", min=1)]


def dtype_of(values: str | None) -> Any:
    """The torch dtype of `--values`. Raises BadParameter for another word."""
    import torch

    if values is None:
        return None
    if values not in ("bfloat16", "float16", "float32", "int8"):
        raise typer.BadParameter(f"--values {values!r}: one of bfloat16, float16, float32, int8")
    return getattr(torch, values)


def opened(model: str) -> tuple[Any, Any, bool]:
    """(model in its stored dtype, tokenizer, whether it came packed) of anything `prune` or `pack` writes."""
    from pathlib import Path

    from maskwright.models.load import find, load, stored_dtype
    from maskwright.models.packed_model import is_packed, load_packed

    source = find(model)
    if is_packed(Path(source.folder)):
        return *load_packed(source.folder), True
    return *load(source, stored_dtype(source)), False


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model or a packed one.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 64,
    values: Values = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the layers as they are, to compare.")] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Run every sparse layer packed, also where that is slower.")
    ] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Time the layers again.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate text; each sparse layer runs packed or dense, whichever was measured faster on this machine."""
    import torch

    from maskwright.lab.record import resident_bytes
    from maskwright.models.evaluate import asked
    from maskwright.weights.accelerated import accelerate, rows

    kind = dtype_of(values)
    if threads:
        torch.set_num_threads(threads)
    net, tokenizer, came_packed = opened(model)
    if tokenizer is None or not hasattr(net, "generate"):
        raise BadInput(f"{model}: no language model with a tokenizer, so it cannot generate text")
    told: Acceleration | None = None
    if not dense:
        told = accelerate(net, values=kind, force=packed or came_packed, remeasure=remeasure, say=_note)
    given = tokenizer(asked(tokenizer, prompt), return_tensors="pt")
    torch.manual_seed(seed)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        ids = net.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id, **how,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    fresh = ids[0, given["input_ids"].shape[1] :]
    out = tokenizer.decode(fresh, skip_special_tokens=True)
    if as_json:
        typer.echo(json.dumps({
            "text": out, "tokens": len(fresh), "seconds": seconds, "resident_bytes": resident_bytes(),
            "engine": told.engine.__dict__ if told else None, "layers": rows(told) if told else [],
        }))  # fmt: skip
        return
    typer.echo(out)
    _note(str(told) if told else "every layer runs dense")
    _note(f"{len(fresh)} tokens in {seconds:.1f} s, {len(fresh) / seconds:.1f} a second, the prompt included")


def _note(text: str) -> None:
    typer.echo(text, err=True)
