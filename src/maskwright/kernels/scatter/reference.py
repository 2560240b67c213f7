"""Sparse additions in plain torch and numpy: what the native ones compute, to the bit, and what runs where they cannot."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def add(target: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """target.flatten()[where] += values, in place; gives the old entries. The sum is made in float32, or wider."""
    flat = target.view(-1)
    where, values = where.to(flat.device), values.to(flat.device)
    wide = torch.promote_types(torch.float32, target.dtype)
    if target.device.type != "cpu":
        before = flat[where]
        flat[where] = (before.to(wide) + values.to(wide)).to(target.dtype)
        return before
    # numpy gathers and puts in this thread: torch wakes its pool for each of hundreds of small tensors.
    bits, places = flat.view(_BITS[target.dtype.itemsize]).numpy(), where.numpy()
    before = torch.from_numpy(bits[places]).view(target.dtype)
    after = (before.to(wide) + values.to(wide)).to(target.dtype)
    bits[places] = after.view(_BITS[target.dtype.itemsize]).numpy()
    return before


def places(counts: Tensor, offsets: Tensor, block: int) -> Tensor:
    """int32 entries of each block, and uint16 offsets in them, one block after the other -> flat indices, int64."""
    starts = np.repeat(np.arange(len(counts), dtype=np.int64) * block, counts.numpy())
    return torch.from_numpy(starts + offsets.numpy())


def sampled(length: int, spots: int, run: int) -> Tensor:
    """Which entries of a tensor of that length `sample` gives, int64 and ascending."""
    if length <= spots * run:
        return torch.arange(length)
    starts = torch.arange(spots) * (length - run) // (spots - 1)
    return (starts[:, None] + torch.arange(run)).flatten()


def sample(value: Tensor, spots: int, run: int) -> Tensor:
    """`spots` runs of entries spread over a tensor (of a small one all), float32, or float64 for float64."""
    flat = value.detach().flatten()
    if len(flat) > spots * run:
        flat = flat[sampled(len(flat), spots, run).to(flat.device)]
    return (flat.double() if value.dtype == torch.float64 else flat.float()).cpu().contiguous()
