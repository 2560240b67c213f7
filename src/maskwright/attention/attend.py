"""attend: attention under a plan. The one call all methods of the place end in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskwright.attention.plan import KeyPlan
from maskwright.attention.structure import Structure
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.kernels.block_attention import block_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def as_plan(plan: Any, queries: int, keys: int, block: tuple[int, int] = (128, 128)) -> KeyPlan:
    """A KeyPlan of what may stand for one: a structure, a Mask over blocks of `block`, FlexAttention's BlockMask.

    Raises BadInput for a plan of another length, naming both.
    """
    if isinstance(plan, Structure):
        return KeyPlan(queries, keys, plan)
    if isinstance(plan, Mask):
        return KeyPlan.of_grid(plan, block, queries, keys)
    if not isinstance(plan, KeyPlan):
        from torch.nn.attention.flex_attention import BlockMask

        if not isinstance(plan, BlockMask):
            raise BadInput(f"a plan is a KeyPlan, a structure, a Mask over blocks or a BlockMask, not {type(plan).__name__}")
        plan = KeyPlan.of_block_mask(plan)
    if (plan.queries, plan.keys) != (queries, keys):
        raise BadInput(f"the plan is for {plan.queries} queries and {plan.keys} keys, the call has {queries} and {keys}")
    return plan


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan | Structure | Mask | BlockMask, *, scale: float | None = None,
    impl: str = "auto", return_lse: bool = False, block: tuple[int, int] = (128, 128),
) -> Any:  # fmt: skip
    """Attention of q over the keys that the plan lets each row read.

    q (batch, heads, queries, width); k, v (batch, kv_heads, keys, width) -> (batch, heads, queries, width), with
    return_lse also the log-sum-exp of the scores (batch, heads, queries). Rows that see no key give zeros (lse -inf).
    impl: "auto" (native on a CPU where it is built, else "gather"), "reference", "gather", "cpu", "flex"; an explicit
    one never falls back. `block` is the block size (rows, keys) of a Mask. Differentiable in q, k, v and the bias.
    Raises BadInput for shapes that disagree, a plan of another length, an implementation that cannot run.
    """
    plan = as_plan(plan, q.shape[-2], k.shape[-2], block)
    bias, positions = plan.bias, plan.positions()
    if plan.levels:
        k, v, bias = _pooled(k, v, bias, plan)
    bounds = plan.bounds()
    if q.device.type != "cpu":
        bounds, positions = (t if t is None else t.to(q.device) for t in (bounds, positions))
    out, lse = block_attention(
        q, k, v, bounds=bounds, pieces=plan.pieces, positions=positions, bias=bias, scale=scale, impl=impl
    )
    if plan.row_scale is not None:
        out = out * plan.row_scale.to(out.dtype)
    return (out, lse) if return_lse else out


def _pooled(k: Tensor, v: Tensor, bias: Tensor | None, plan: KeyPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with the means of every level behind them, and the bias with the log of how many each stands for."""
    counts = [torch.ones(plan.keys, device=k.device)]
    keys, values = [k], [v]
    for size in plan.levels:
        short = -plan.keys % size
        real = torch.ones(plan.keys, device=k.device)
        many = torch.nn.functional.pad(real, (0, short)).view(-1, size).sum(1)
        for parts, x in ((keys, k), (values, v)):
            padded = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, size))
            parts.append((padded.sum(3) / many[:, None]).to(x.dtype))
        counts.append(many)
    weight = torch.cat(counts).log().view(1, 1, 1, -1)
    return torch.cat(keys, 2), torch.cat(values, 2), weight if bias is None else bias + weight
