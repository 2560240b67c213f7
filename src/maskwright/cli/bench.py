"""`maskwright bench`: dense against packed on this machine, layer by layer and for the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from maskwright.cli.generate import Threads, Values, dtype_of, opened
from maskwright.core.errors import BadInput


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model or a packed one.")],
    values: Values = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded a round.", min=2)] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds of each form, in turns.", min=1)] = 5,
    batch: Annotated[int, typer.Option(help="Texts decoded side by side.", min=1)] = 1,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every kind of linear layer, and decoding of the whole model, dense and packed in turns; nothing is written.

    Run it with nothing else on the machine. All forms are held at once: about twice the dense model.
    """
    import torch

    from maskwright.kernels.packed_linear import PackedLinear, dense_module, unpack
    from maskwright.lab.record import machine
    from maskwright.weights.accelerated import accelerate, rows
    from maskwright.weights.speed import median

    kind = dtype_of(values)
    if threads:
        torch.set_num_threads(threads)
    net, _, _ = opened(model)
    for path, module in list(net.named_modules()):
        if isinstance(module, PackedLinear):
            net.set_submodule(path, dense_module(unpack(module.packed), module.bias))  # type: ignore[arg-type]
    own = _dtype(net)
    forms = {f"dense {own}": dict(net.named_modules())}
    made = {}
    for form, force in (("fastest forms", False), ("all packed", True)):
        told = accelerate(
            net, values=kind, batch=batch, force=force, remeasure=not force, say=lambda text: typer.echo(text, err=True)
        )
        names = [layer.name for layer in told.layers]
        made[form], forms[form] = told, {name: net.get_submodule(name) for name in names}
        _put(net, forms[f"dense {own}"], names)
    told = made["fastest forms"]
    paces: dict[str, list[float]] = {}
    if hasattr(net, "generate"):
        for _ in range(rounds):
            for form, modules in forms.items():
                _put(net, modules, names)
                paces.setdefault(form, []).extend(_steps(net, tokens, batch))
        _put(net, forms[f"dense {own}"], names)
        forms.clear()
        other = torch.float32 if own != "float32" else torch.bfloat16
        paces[f"dense {_dtype(net.to(other))}"] = _steps(net, tokens * rounds, batch)
    pace: dict[str, Any] = {
        form: {"tokens_per_second": batch / median(steps), "spread": [batch / q for q in _quartiles(steps)]}
        for form, steps in paces.items()
    }
    found = rows(told)
    if as_json:
        typer.echo(json.dumps({"engine": told.engine.__dict__, "layers": found, "model": pace, "machine": machine()}))
        return
    show(found)
    typer.echo(str(told))
    for form, one in pace.items():
        low, high = sorted(one["spread"])
        typer.echo(f"{form}: {one['tokens_per_second']:.2f} tokens/s (quartiles {low:.2f} to {high:.2f})")
    dense = [form for form in pace if form.startswith("dense")]
    if dense:
        best = max(dense, key=lambda form: pace[form]["tokens_per_second"])
        for form in ("fastest forms", "all packed"):
            ratio = pace[form]["tokens_per_second"] / pace[best]["tokens_per_second"]
            typer.echo(f"whole model, {form}: {ratio:.2f} x {best}" + ("" if ratio > 1 else ", dense is faster here"))


def show(found: Sequence[dict[str, Any]]) -> None:
    """The table of layers, one row a kind."""
    from maskwright.cli.masks import _table

    cells = [
        (r["kind"], "x".join(map(str, r["shape"])), f"{r['number']}", f"{r['density']:.3f}", f"{r['dense_ms']:.3f}",
         f"{r['best_dense_ms']:.3f} {r['best_dense']}", f"{r['packed_ms']:.3f}", f"{r['ratio']:.2f}",
         f"{r['bytes'] / r['dense_bytes']:.3f}", r["form"], r["verdict"])
        for r in found
    ]  # fmt: skip
    heads = ("layer", "shape", "number", "density", "dense ms", "best dtype ms", "packed ms", "ratio", "bytes", "runs as",
             "verdict")  # fmt: skip
    _table(heads, cells, left=2)


def _put(net: Any, modules: dict[str, Any], names: list[str]) -> None:
    for name in names:
        net.set_submodule(name, modules[name])


def _dtype(net: Any) -> str:
    floats = [p.dtype for p in net.parameters() if p.is_floating_point()]
    if not floats:
        raise BadInput("the model holds no float weights")
    return str(max(set(floats), key=floats.count)).removeprefix("torch.")


def _steps(net: Any, tokens: int, batch: int) -> list[float]:
    import torch

    from maskwright.models.evaluate import decode_times

    size = net.get_input_embeddings().weight.shape[0]
    return decode_times(net, (torch.arange(16) * 7 + 5).expand(batch, -1) % size, tokens)


def _quartiles(steps: list[float]) -> tuple[float, float]:
    ordered = sorted(steps)
    return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
