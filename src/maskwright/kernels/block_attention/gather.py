"""Block attention in plain torch operations: gathers the kept keys of each group of rows. Any device, any gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskwright.kernels.block_attention.lower import lower
from maskwright.kernels.block_attention.pieces import Pieces

_ENTRIES = 1 << 22  # scores and gathered entries made at a time


def block_attention_gather(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, pieces: Pieces | None, positions: Tensor | None,
    bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as `block_attention` promises them; products in float32, or float64 for float64 inputs."""
    batch, heads, queries, width = q.shape
    # Keys with positions of their own are not ordered by them: nothing can be cut, every bound is tested.
    lists = lower(queries, k.shape[2], bounds if positions is None else None, pieces, q.device)
    units = k.shape[1] if k.shape[1] % lists.shape[1] == 0 else heads  # heads that share keys and lists are one unit
    lists = lists.expand(batch, units)
    groups, rows, share = lists.shape[2], lists.rows, heads // units
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    padded = torch.nn.functional.pad(q, (0, 0, 0, groups * rows - queries)) if groups * rows > queries else q
    blocks = padded.view(batch, units, share, groups, rows, width).permute(0, 1, 3, 2, 4, 5).flatten(0, 2)
    lengths = lists.lengths().flatten()
    order = torch.sort(lengths, stable=True).indices
    outs, lses = [], []
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    for chunk in _chunks(lengths[order], share * rows + 2 * width):
        items = order[chunk]
        told = (blocks, k, v, bias, bounds, positions, lists, items, scale, wide, queries)
        out, lse = checkpoint(_attend, *told, use_reentrant=False) if grad else _attend(*told)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    out = torch.cat(outs)[back].view(batch, units, groups, share, rows, width).permute(0, 1, 3, 2, 4, 5)
    lse = torch.cat(lses)[back].view(batch, units, groups, share, rows).permute(0, 1, 3, 2, 4)
    out, lse = out.reshape(batch, heads, groups * rows, width), lse.reshape(batch, heads, groups * rows)
    return out[:, :, :queries].to(q.dtype), lse[:, :, :queries]


def _chunks(lengths: Tensor, cost: int) -> list[slice]:
    """Slices of the ascending lengths whose padded lists hold at most _ENTRIES entries, `cost` a key."""
    found, start, every = [], 0, lengths.tolist()
    for stop, length in enumerate(every):
        if stop > start and (stop + 1 - start) * max(length, 1) * cost > _ENTRIES:
            found.append(slice(start, stop))
            start = stop
    return [*found, slice(start, len(every))] if every else found


def _attend(
    blocks: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bounds: Tensor | None, positions: Tensor | None,
    lists: Pieces, items: Tensor, scale: float, wide: torch.dtype, queries: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of some groups. -> (items, share, rows, width) and (items, share, rows)."""
    _, units, groups = lists.shape
    batch, unit, group = items // (units * groups), items // groups % units, items % groups
    index, valid = _indices(lists, items)  # (items, most)
    kv_heads, keys = k.shape[1:3]
    head = unit * kv_heads // units
    flat = (batch * kv_heads + head)[:, None] * keys + index
    key, value = (t.reshape(-1, t.shape[-1])[flat].to(wide) for t in (k, v))  # (items, most, width)
    query = blocks[items].to(wide)
    share, rows = query.shape[1:3]
    scores = torch.einsum("nsrd,nld->nsrl", query, key) * scale
    row = (group[:, None] * lists.rows + torch.arange(rows, device=items.device)).clamp(max=queries - 1)  # (items, rows)
    heads = unit[:, None] * share + torch.arange(share, device=items.device)  # (items, share)
    at = _grid(batch, heads, row)
    keep = valid[:, None, None, :].expand(len(items), share, rows, -1)
    if bounds is not None:
        # (items, share, rows, 2, 2)
        inside = bounds[_fit(at[0], bounds.shape[0]), _fit_head(at[1], bounds.shape[1], units * share), at[2]]
        where = (index if positions is None else positions[index])[:, None, None, :, None]
        keep = keep & ((inside[..., None, :, 0] <= where) & (where < inside[..., None, :, 1])).any(-1)
    if bias is not None:
        dims = [_fit(x[..., None], size) for x, size in zip(at, bias.shape[:3], strict=True)]
        scores = scores + bias[(*dims, _fit(index[:, None, None, :], bias.shape[3]))].to(wide)
    scores = scores.masked_fill(~keep, float("-inf"))
    empty = (
        (scores == float("-inf")).all(-1)
        if scores.shape[-1]
        else torch.ones_like(scores[..., 0:0].sum(-1), dtype=torch.bool)
    )
    total = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    out = torch.einsum("nsrl,nld->nsrd", torch.exp(scores - total[..., None]), value)
    return out, total.masked_fill(empty, float("-inf"))


def _grid(batch: Tensor, heads: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return batch[:, None, None], heads[:, :, None], row[:, None, :]


def _fit(index: Tensor, size: int) -> Tensor:
    return index if size > 1 else torch.zeros_like(index)


def _fit_head(index: Tensor, size: int, heads: int) -> Tensor:
    return index * size // heads


def _indices(lists: Pieces, items: Tensor) -> tuple[Tensor, Tensor]:
    """Key numbers of some lists, padded with zeros. -> (items, most) and which of them are real."""
    first, runs = lists.offsets[items], lists.offsets[items + 1] - lists.offsets[items]
    owner = torch.repeat_interleave(torch.arange(len(items), device=items.device), runs)
    before = torch.cat([runs.new_zeros(1), runs.cumsum(0)])[:-1]
    run = torch.repeat_interleave(first - before, runs) + torch.arange(len(owner), device=items.device)
    start, size = lists.starts[run].long(), (lists.stops[run] - lists.starts[run]).long()
    total = torch.zeros(len(items), dtype=torch.int64, device=items.device).index_add_(0, owner, size)
    most = int(total.max()) if len(items) else 0
    ends = size.cumsum(0)
    key = torch.arange(int(size.sum()), device=items.device)
    flat = torch.repeat_interleave(start - (ends - size), size) + key
    who = torch.repeat_interleave(owner, size)
    column = key - (torch.cat([total.new_zeros(1), total.cumsum(0)])[:-1])[who]
    index = torch.zeros(len(items), most, dtype=torch.int64, device=items.device)
    valid = torch.zeros(len(items), most, dtype=torch.bool, device=items.device)
    index[who, column], valid[who, column] = flat, True
    return index, valid
