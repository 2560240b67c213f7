"""KeyPlan: which keys every query row reads, and what is added to their scores. What every method of the place gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskwright.attention.structure import Causal, Structure
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.kernels.block_attention import Pieces
from maskwright.kernels.block_attention.lower import lower, touched_blocks
from maskwright.kernels.block_attention.reference import allowed

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """A mask over (queries x keys) as runs of keys, a structure, a bias, pooled keys and a row scale.

    A row sees a key that is in its group's `pieces` (None: every key) and that `structure` allows (None: every one);
    row i stands at key position offset + i (by default the last row at the last key). `bias`, each dim 1 or full
    against (batch, heads, queries, keys), is added to the scaled scores; gradients flow to it. `row_scale`, against
    (batch, heads, queries, 1), multiplies the output after the softmax.
    `levels` names pooled keys: for each size s the means of s neighbouring keys (and values), s-fold weighted, stand
    behind the keys in that order; pieces and bias then cover them too. A pooled key stands where its last key stands.
    """

    queries: int
    keys: int
    structure: Structure | None = None
    pieces: Pieces | None = None
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    offset: int | None = None
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(size < 2 for size in self.levels):
            raise BadInput(f"a pooled key stands for at least 2 keys, got levels {self.levels}")
        told = None if self.pieces is None else (self.pieces.queries, self.pieces.keys)
        if told not in (None, (self.queries, self.extended)):
            raise BadInput(f"pieces over {told} do not fit a plan of {self.queries} queries and {self.extended} keys")

    @property
    def extended(self) -> int:
        """Keys with the pooled ones behind them."""
        return self.keys + sum(-(-self.keys // size) for size in self.levels)

    @staticmethod
    def of_grid(
        keep: Tensor | Mask,
        block: tuple[int, int],
        queries: int,
        keys: int,
        *,
        structure: Structure | None = None,
        **more: Any,
    ) -> KeyPlan:
        """From a grid (1|batch, 1|heads, query blocks, key blocks) of blocks of rows x keys; the last may be ragged."""
        grid = keep.keep if isinstance(keep, Mask) else keep
        while grid.ndim < 4:
            grid = grid[None]
        pieces = Pieces.from_blocks(grid, block[0], block[1], queries, keys)
        return KeyPlan(queries, keys, structure, pieces, **more)

    @staticmethod
    def of_block_mask(mask: BlockMask) -> KeyPlan:
        """From FlexAttention's BlockMask. Its mask function is asked only inside the blocks that are not full.

        Where each row's kept keys are one interval inside the touched blocks (causal, windows, documents over any choice
        of blocks) the plan keeps the blocks as they are; else it holds every row's own runs.
        """
        from maskwright.attention.block_mask import plan_of

        return plan_of(mask)

    def block_mask(self, q: Tensor, block: int = 128) -> BlockMask:
        """The mask (without bias) as FlexAttention's BlockMask for queries like q (batch, heads, queries, width)."""
        from maskwright.kernels.block_attention.flex import block_mask

        if self.levels:
            raise BadInput("a plan with pooled keys has no BlockMask")
        return block_mask(q, self.keys, self.bounds(), self.pieces, block=block)

    def bounds(self) -> Tensor | None:
        """(1|batch, 1|heads, queries, 2, 2) int32, or None where every row may see every key."""
        if self.structure is None or (self.queries == 1 and self.structure == Causal() and self._at == self.keys - 1):
            return None
        return _bounds(self.structure, self.queries, self.keys, self._at)

    @property
    def _at(self) -> int:
        return self.keys - self.queries if self.offset is None else self.offset

    def positions(self) -> Tensor | None:
        """(extended,) int32: where each key stands, or None without pooled keys."""
        if not self.levels:
            return None
        parts = [torch.arange(self.keys)]
        parts += [(torch.arange(size - 1, self.keys + size - 1, size)).clamp(max=self.keys - 1) for size in self.levels]
        return torch.cat(parts).int()

    def within(self, structure: Structure | None) -> KeyPlan:
        """The same plan, seeing nothing that `structure` does not allow."""
        have = [] if self.structure is None else [self.structure, *self.structure.parts()]
        if structure is None or all(any(part is one for one in have) for part in structure.parts()):
            return self
        return replace(self, structure=structure if self.structure is None else self.structure & structure)

    def dense(self) -> Tensor:
        """The mask as booleans (B', H', queries, extended keys): for tests and pictures of short sequences."""
        heads = 1 if self.pieces is None else self.pieces.shape[1]
        bounds = self.bounds()
        if bounds is not None and bounds.shape[1] > 1:
            heads = max(heads, bounds.shape[1])
        return allowed(self.queries, self.extended, bounds, self.pieces, self.positions(), heads)

    @cached_property
    def lists(self) -> Pieces:
        """The keys each group of rows reads: the pieces, cut to what the group's rows may see at all."""
        bounds = self.bounds() if not self.levels else None
        return lower(self.queries, self.extended, bounds, self.pieces, torch.device("cpu"))

    def picture(self, size: int = 64) -> Tensor:
        """Which tiles of a coarse grid are read at all. (B', H', at most size, at most size) bool."""
        return touched_blocks(self.lists, max(1, -(-max(self.queries, self.extended) // size)))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(kept, computed) query-key pairs per (B', H'), int64: those a row sees, and those of whole groups of rows."""
        lists = self.lists
        rows = torch.full((lists.shape[2],), lists.rows)
        rows[-1:] -= lists.shape[2] * lists.rows - self.queries
        computed = (lists.lengths() * rows).sum(-1)
        bounds = self.bounds()
        if bounds is None:
            return computed, computed
        if self.levels:
            raise BadInput("pairs are not counted for plans with pooled keys")
        return _kept(lists, bounds.long(), self.queries), computed


@lru_cache(maxsize=32)
def _bounds(structure: Structure, queries: int, keys: int, offset: int) -> Tensor:
    return structure.bounds(queries, keys, offset)


def _kept(lists: Pieces, bounds: Tensor, queries: int) -> Tensor:
    batch, heads = max(lists.shape[0], bounds.shape[0]), max(lists.shape[1], bounds.shape[1])
    lists = lists.expand(batch, heads)
    bounds = bounds.expand(batch, heads, *bounds.shape[2:])
    total = torch.zeros(batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            first = (b * heads + h) * lists.shape[2]
            for g in range(lists.shape[2]):
                run = slice(int(lists.offsets[first + g]), int(lists.offsets[first + g + 1]))
                row = bounds[b, h, g * lists.rows : (g + 1) * lists.rows]  # (rows, 2, 2)
                low = torch.maximum(row[:, :, None, 0], lists.starts[run].long())
                high = torch.minimum(row[:, :, None, 1], lists.stops[run].long())
                total[b, h] += (high - low).clamp(min=0).sum()
    return total
