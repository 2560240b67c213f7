"""What goes by blocks alone: whether a grid lets a cache forget, and the runs of samples that begin apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from maskwright.attention import Pieces


def kv_efficient(keep: Tensor) -> bool:
    """Whether a key block that a row block leaves out is never read by a later one, so that a cache may drop it.

    keep (..., query blocks, key blocks) bool, as `S2Attention.grid` gives it.
    """
    rows, blocks = keep.shape[-2:]
    past = torch.arange(blocks) <= torch.arange(rows - 1)[:, None]  # below the diagonal of the later row
    return not bool((keep[..., 1:, :] & ~keep[..., :-1, :] & past).any())


def from_first(parts: Sequence[Pieces], first: Sequence[int], keys: int) -> Pieces:
    """One sample's lists after the other's, those of sample i over the keys from first[i] on, as lists over all keys."""
    runs = torch.cat([part.offsets.diff() for part in parts])
    starts = torch.cat([part.starts + start for part, start in zip(parts, first, strict=True)])
    stops = torch.cat([part.stops + start for part, start in zip(parts, first, strict=True)])
    offsets = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
    _, heads, groups = parts[0].shape
    return Pieces(offsets, starts, stops, (len(parts), heads, groups), parts[0].rows, parts[0].queries, keys)


@lru_cache(maxsize=64)  # once a rule and number of heads, not once a call
def warn_of_gaps(heads: int, stride: int, turn: int) -> None:
    """Say that the heads' stripes, `turn` apart, leave out blocks."""
    seen = len({head * turn % stride for head in range(heads)})
    warnings.warn(
        f"s2_attention: {heads} key heads read {seen} of {stride} residues, the other remote blocks are read by none: "
        f"take a stride of at most {heads}, or another step",
        stacklevel=2,
    )
