"""Chains of blocks seen from outside: prove one by a probing forward, capture its calls, run one block alone.

Works on any module: nothing here knows a model class. Keyword arguments (masks, position embeddings) are captured per
block and batch, and passed through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
_HIDDEN = object()  # stands in a captured call where the hidden state goes


class _Stop(Exception):
    """Ends a capturing forward once the last block of the chain was reached."""


def run(model: nn.Module, batch: Batch) -> Any:
    """One forward of a batch: a tensor, a tuple of arguments or a mapping of keyword arguments."""
    # A key-value cache would grow when blocks are run again and again.
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if isinstance(batch, Mapping):
        return model(**{**extra, **batch})
    return model(*batch, **extra) if isinstance(batch, tuple) else model(batch, **extra)


def call(block: nn.Module, hidden: Tensor, given: Call) -> Any:
    """One block on `hidden` with the rest of a captured call."""
    args, kwargs = given
    return block(*(_fill(a, hidden) for a in args), **{k: _fill(v, hidden) for k, v in kwargs.items()})


def _fill(value: Any, hidden: Tensor) -> Any:
    return hidden if value is _HIDDEN else value


def first(out: Any) -> Tensor:
    """The hidden state of a block's output, which may be a tuple."""
    return out[0] if isinstance(out, tuple | list) else out


def probe(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> list[Any] | None:
    """One forward proves the chain: every block is called once, in order, on exactly what the block before put out.

    Gives for each block a function that wraps a hidden state the way its own output is wrapped; None for no chain.
    """
    log: list[tuple[int, Any, Any, int | None]] = []

    def note(i: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        log.append(
            (i, args[0] if args else kwargs.get("hidden_states"), first(out), len(out) if isinstance(out, tuple) else None)
        )

    def stop(*_: Any) -> None:
        raise _Stop  # logits of a whole window are the largest tensor of a forward, and nothing here asks for them

    head = getattr(model, "get_output_embeddings", lambda: None)()
    with ExitStack() as stack:
        if isinstance(head, nn.Module) and not any(head is m for block in blocks for m in block.modules()):
            stack.callback(head.register_forward_pre_hook(stop).remove)
        for i, block in enumerate(blocks):
            hook = block.register_forward_hook(lambda m, a, k, out, i=i: note(i, a, k, out), with_kwargs=True)
            stack.callback(hook.remove)
        with suppress(_Stop):
            run(model, _one_row(batch))
    if [i for i, *_ in log] != list(range(len(blocks))) or not all(
        isinstance(t, Tensor) for _, a, b, _ in log for t in (a, b)
    ):
        return None
    if not all(after[1] is before[2] for before, after in pairwise(log)):
        return None
    return [partial(_wrapped, length) for *_, length in log]


def _wrapped(length: int | None, hidden: Tensor) -> Any:
    return hidden if length is None else (hidden, *(None,) * (length - 1))


def _one_row(batch: Batch) -> Batch:
    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim > 1 else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(map(cut, batch)) if isinstance(batch, tuple) else cut(batch)


def capture(
    model: nn.Module, blocks: list[nn.Module], wraps: list[Any], batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """The first block's hidden input per batch, and every block's call per batch with the hidden state cut out.

    The blocks are bypassed while their calls are noted (each hands its input on), so this costs an embedding.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    seen: list[Tensor] = []

    def shared(value: Any) -> Any:
        # Masks and position tables are mostly the same in every batch: one copy is kept.
        if not isinstance(value, Tensor):
            return tuple(map(shared, value)) if isinstance(value, tuple) else value
        for old in seen:
            if old is value or (old.shape == value.shape and old.dtype == value.dtype and torch.equal(old, value)):
                return old
        if len(seen) < 64:
            seen.append(value)
        return value

    def bypass(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if i == 0:
            hidden.append(x.clone())
        call_args = (_HIDDEN, *map(shared, args[1:])) if args else ()
        calls[-1].append((call_args, {k: _HIDDEN if v is x else shared(v) for k, v in kwargs.items()}))
        if i == len(blocks) - 1:
            raise _Stop
        return wraps[i](x)

    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            had, old = "forward" in vars(block), block.forward
            block.forward = lambda *a, _i=i, **k: bypass(_i, a, k)  # type: ignore[method-assign]
            stack.callback(_unbypass, block, had, old)
        for batch in batches:
            calls.append([])
            with suppress(_Stop):
                run(model, batch)
    return hidden, calls


def _unbypass(block: nn.Module, had: bool, old: Any) -> None:
    if had:
        block.forward = old  # type: ignore[method-assign]
    else:
        del block.forward
