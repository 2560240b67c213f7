"""From FlexAttention's BlockMask to a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from maskwright.attention.plan import KeyPlan
from maskwright.attention.structure import Rows
from maskwright.kernels.block_attention import Pieces


def plan_of(mask: BlockMask) -> KeyPlan:
    """What `KeyPlan.of_block_mask` promises."""
    queries, keys = mask.seq_lengths
    rows, block = mask.BLOCK_SIZE
    partial, full = _blocks(mask.kv_num_blocks, mask.kv_indices), None
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    touched = partial if full is None else partial | full
    groups, tiles = -(-queries // rows), -(-keys // block)
    touched, partial = touched[:, :, :groups, :tiles], partial[:, :, :groups, :tiles]
    seen = _elements(mask, partial, touched & ~partial, queries, keys)
    some = seen.any(-1)
    low = seen.int().argmax(-1)
    high = keys - seen.flip(-1).int().argmax(-1)
    table = torch.stack([low, high], -1).masked_fill(~some[..., None], 0)[..., None, :]
    at = torch.arange(keys)
    tile = touched.repeat_interleave(rows, 2)[:, :, :queries].repeat_interleave(block, 3)[..., :keys]
    if torch.equal((table[..., 0] <= at) & (at < table[..., 1]) & tile, seen):
        pieces = Pieces.from_blocks(touched, rows, block, queries, keys)
        return KeyPlan(queries, keys, Rows(table, keys - queries), pieces)
    return KeyPlan(queries, keys, None, Pieces.from_keep(seen, 1, queries))


def _blocks(counts: Tensor, index: Tensor) -> Tensor:
    valid = torch.arange(index.shape[-1]) < counts[..., None]
    grid = torch.zeros(index.shape, dtype=torch.int32)
    return grid.scatter_add_(-1, index.long(), valid.int()) > 0


def _elements(mask: BlockMask, partial: Tensor, full: Tensor, queries: int, keys: int) -> Tensor:
    """(B', H', queries, keys) bool, the mask function asked inside the partial blocks alone."""
    rows, block = mask.BLOCK_SIZE
    shape = (*partial.shape[:2], partial.shape[2] * rows, partial.shape[3] * block)
    seen = torch.zeros(shape, dtype=torch.bool)
    for b, h, i, j in full.nonzero().tolist():
        seen[b, h, i * rows : (i + 1) * rows, j * block : (j + 1) * block] = True
    ask: Any = torch.vmap(torch.vmap(mask.mask_mod, (None, None, None, 0)), (None, None, 0, None))
    for b, h, i, j in partial.nonzero().tolist():
        row, col = torch.arange(i * rows, (i + 1) * rows), torch.arange(j * block, (j + 1) * block)
        told = ask(torch.tensor(b), torch.tensor(h), row.clamp(max=queries - 1), col.clamp(max=keys - 1))
        seen[b, h, row[0] : row[-1] + 1, col[0] : col[-1] + 1] = told
    return seen[:, :, :queries, :keys]
