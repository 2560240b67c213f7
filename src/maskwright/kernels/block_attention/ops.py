"""The operators `maskwright::block_attention` and its backward: schemas, shapes, gradients, and their native library."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.kernels.building import Native
from maskwright.kernels.library import LIBRARY

_NATIVE = Native(
    "block_attention",
    Path(__file__).with_name("native"),
    {
        "ops": ("-O2",),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    },
)
# `impl` names an instruction set, for tests; empty: the best of this CPU.
_TENSORS = "Tensor q, Tensor k, Tensor v"
_MASK = (
    "Tensor? bounds, Tensor? offsets, Tensor? starts, Tensor? stops, int[] shape, int rows, Tensor? positions, "
    "Tensor? bias, float scale"
)
LIBRARY.define(f"block_attention({_TENSORS}, {_MASK}, str impl='') -> (Tensor, Tensor)")
LIBRARY.define(
    f"block_attention_backward(Tensor grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_MASK}, "
    "bool bias_grad, str impl='') -> (Tensor, Tensor, Tensor, Tensor)"
)


@cache
def load() -> str | None:
    """Build (once, some 30 s) and load the native operators; None when they run, else the reason they do not."""
    return _NATIVE.load()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("maskwright::block_attention", lib=LIBRARY)
def _shapes(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=_wide(q.dtype))


@torch.library.register_fake("maskwright::block_attention_backward", lib=LIBRARY)
def _backward_shapes(  # type: ignore[no-untyped-def]
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    bounds,
    offsets,
    starts,
    stops,
    shape,
    rows,
    positions,
    bias,
    scale,
    bias_grad,
    impl="",
):
    dbias = (
        torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_grad else q.new_empty(0, dtype=_wide(q.dtype))
    )
    return _like(q), _like(k), _like(v), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, offsets, starts, stops, shape, rows, positions, bias, scale, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, bounds, offsets, starts, stops, positions, bias)
    ctx.rest = (list(shape), rows, scale, impl)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bounds, offsets, starts, stops, positions, bias = ctx.saved_tensors
    shape, rows, scale, impl = ctx.rest
    bias_grad = bias is not None and ctx.needs_input_grad[10]
    dq, dk, dv, dbias = torch.ops.maskwright.block_attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, q, k, v, out, lse, bounds, offsets, starts, stops,
        shape, rows, positions, bias, scale, bias_grad, impl,
    )  # fmt: skip
    return dq, dk, dv, *(None,) * 7, dbias if bias_grad else None, None, None


torch.library.register_autograd("maskwright::block_attention", _gradients, setup_context=_save, lib=LIBRARY)
