"""`block_attention`: checks, the choice of an implementation, and the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.kernels.block_attention import cpu
from maskwright.kernels.block_attention.gather import block_attention_gather
from maskwright.kernels.block_attention.pieces import Pieces
from maskwright.kernels.block_attention.reference import block_attention_reference

IMPLS = ("auto", "reference", "gather", "cpu", "flex")


@dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why it was chosen."""

    name: str
    reason: str


def choose(q: Tensor, impl: str = "auto") -> Choice:
    """The implementation that `impl` stands for with queries like `q`.

    "auto" takes the native one on a CPU where it is built and can do dtype and width, else "gather". An explicit
    name that cannot run raises BadInput with the reason; nothing falls back silently.
    """
    if impl not in IMPLS:
        raise BadInput(f"unknown implementation {impl!r}; known: {', '.join(IMPLS)}")
    if impl in ("reference", "gather", "flex"):
        return Choice(impl, "asked for")
    reason = _native_refuses(q)
    if impl == "cpu":
        if reason is not None:
            raise BadInput(f"impl 'cpu': {reason}")
        return Choice("cpu", "asked for")
    return Choice("gather", reason) if reason is not None else Choice("cpu", "native kernels are built")


def _native_refuses(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {q.device.type}"
    return cpu.available() or cpu.refuses(q)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor | None = None, pieces: Pieces | None = None,
    positions: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale q k' + bias) v over the keys a row may see, and the log-sum-exp of those scores.

    q (batch, heads, queries, width); k, v (batch, kv_heads, keys, width), kv_heads dividing heads.
    bounds int32 (1|batch, 1|heads, queries, 2, 2): two ascending disjoint intervals [start, stop) of key positions
    a row; pieces: the key runs each group of rows reads. A row sees a key that is in its group's runs and inside its
    bounds; None stands for every key. positions int32 (keys,): where a key stands for the bounds, its index by default
    (pooled keys stand where their last key stands). bias: added to the scores, each dim 1 or full against (batch,
    heads, queries, keys), -inf drops a key. scale: width ** -0.5 by default.
    -> out (batch, heads, queries, width) in q's dtype, lse (batch, heads, queries) in float32 (float64 for float64).
    Rows that see no key give zeros and an lse of -inf. Gradients flow to q, k, v and bias, also from lse.
    Raises BadInput for shapes that disagree and for an implementation that cannot run.
    """
    _check(q, k, v, bounds, pieces, positions, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name = choose(q, impl).name
    told = (q, k, v, bounds, pieces, positions, bias, scale)
    if name == "reference":
        return block_attention_reference(*told)
    if name == "gather":
        return block_attention_gather(*told)
    if name == "flex":
        from maskwright.kernels.block_attention.flex import block_attention_flex

        return block_attention_flex(*told)
    return cpu.block_attention_cpu(*told)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    pieces: Pieces | None,
    positions: Tensor | None,
    bias: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4) or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise BadInput(
            f"attention takes q (batch, heads, queries, width) and k, v (batch, kv_heads, keys, width), got {shapes}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise BadInput(f"attention takes q, k and v of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, heads, queries = q.shape[:3]
    keys = k.shape[2]
    if not k.shape[1] or heads % k.shape[1]:
        raise BadInput(f"{heads} query heads cannot share {k.shape[1]} key heads: {shapes}")
    if bounds is not None and (
        bounds.dtype != torch.int32 or bounds.ndim != 5 or tuple(bounds.shape[2:]) != (queries, 2, 2)
        or bounds.shape[0] not in (1, batch) or bounds.shape[1] not in (1, heads)
    ):  # fmt: skip
        raise BadInput(
            f"bounds are int32 of (1|{batch}, 1|{heads}, {queries}, 2, 2), got {bounds.dtype} of shape {tuple(bounds.shape)}"
        )
    if pieces is not None and (
        (pieces.queries, pieces.keys) != (queries, keys) or pieces.shape[0] not in (1, batch)
        or heads % pieces.shape[1] or (pieces.shape[1] % k.shape[1] and k.shape[1] % pieces.shape[1])
    ):  # fmt: skip
        raise BadInput(
            f"pieces of {pieces.shape[0]} x {pieces.shape[1]} lists over {pieces.queries} queries and {pieces.keys} keys "
            f"do not fit {shapes}"
        )
    if positions is not None and (positions.dtype != torch.int32 or tuple(positions.shape) != (keys,)):
        raise BadInput(f"positions are int32 of ({keys},), got {positions.dtype} of shape {tuple(positions.shape)}")
    full = (batch, heads, queries, keys)
    if bias is not None and (
        bias.ndim != 4
        or not bias.dtype.is_floating_point
        or any(n not in (1, m) for n, m in zip(bias.shape, full, strict=True))
    ):
        raise BadInput(f"a bias is float with dims 1 or {full}, got {bias.dtype} of shape {tuple(bias.shape)}")
