"""use: put a method to work on a model, and take it off again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from maskwright.attention import huggingface
from maskwright.attention.method import AttentionMethod
from maskwright.attention.run import Run
from maskwright.attention.site import ModelShape
from maskwright.core.errors import BadInput


@contextmanager
def use(
    model: nn.Module, method: AttentionMethod, *, impl: str = "auto", seed: int = 0, record: bool = False
) -> Iterator[Run]:
    """Run `method` in every attention layer of `model` inside the context; afterwards the model is as it was.

    Works on Hugging Face models that ask AttentionInterface (prefill, decoding with a dynamic cache, padding, grouped
    heads, sliding windows), and on any module with an attribute `attend(q, k, v, causal) -> out`.
    impl: which implementation attends ("auto" picks). record: keep a Record of every call in `run.records`.
    Raises BadInput before any work when the model has no such layer or the method cannot run on it.
    """
    if not isinstance(method, AttentionMethod):
        raise BadInput(f"use takes a method of the attention place, not {type(method).__name__}")
    theirs = huggingface.hosts(model)
    ours = [(name, module) for name, module in model.named_modules() if callable(getattr(module, "attend", None))]
    if not theirs and not ours:
        raise BadInput(f"{type(model).__name__} has no attention layer that asks AttentionInterface or has an `attend`")
    if theirs:
        method.fits(huggingface.shape_of(theirs[0][1]))
    run = Run(method, len(theirs) or len(ours), impl, seed, record)
    with ExitStack() as undo:
        if theirs:
            before: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
            for _, module in theirs:
                undo.callback(huggingface.install(module, run))
            _switch(model, huggingface.ACTIVE)
            undo.callback(_switch, model, before)
        for layer, (_, module) in enumerate(ours):
            undo.callback(_replace(module, run, layer))
        yield run


def _switch(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise BadInput(f"{type(model).__name__} does not let its attention implementation be set")


def _replace(module: Any, run: Run, layer: int) -> Callable[[], None]:
    before = module.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if layer not in run.stored:
            run.method.fits(ModelShape(run.layers, q.shape[1], k.shape[1], q.shape[-1], causal))
        return run.call(module, layer, q, k, v, causal=causal)

    module.attend = attend

    def undo() -> None:
        module.attend = before

    return undo
