"""Pieces: which runs of keys each group of query rows reads. The one list form all masks are lowered to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.core.errors import BadInput

Nested = Sequence[Sequence[Sequence[Sequence[tuple[int, int]]]]]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Per (batch, head, row group) an ascending list of disjoint, non-empty key runs [start, stop).

    offsets (B' * H' * groups + 1,) int64 cuts starts and stops (runs,) int32 into lists. `shape` is (B', H', groups):
    B' is 1 or the batch, H' is 1 or divides the heads (head h of H reads list h * H' // H). Row group g holds the
    query rows g * rows .. (g + 1) * rows - 1, the last one may be ragged.
    """

    offsets: Tensor
    starts: Tensor
    stops: Tensor
    shape: tuple[int, int, int]
    rows: int
    queries: int
    keys: int

    def __post_init__(self) -> None:
        groups = -(-self.queries // self.rows) if self.rows > 0 else -1
        if self.rows < 1 or self.shape[2] != groups:
            raise BadInput(f"pieces of {self.shape[2]} groups do not cover {self.queries} queries in groups of {self.rows}")
        lists = self.shape[0] * self.shape[1] * groups
        if tuple(self.offsets.shape) != (lists + 1,) or self.starts.shape != self.stops.shape or self.starts.ndim != 1:
            raise BadInput(
                f"pieces of shape {self.shape} need {lists + 1} offsets and as many starts as stops, got "
                f"{tuple(self.offsets.shape)}, {tuple(self.starts.shape)}, {tuple(self.stops.shape)}"
            )

    @property
    def lists(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def check(self) -> Pieces:
        """Return self when the lists are what they must be, else raise BadInput naming the first list that is not."""
        offsets, starts, stops = self.offsets, self.starts.long(), self.stops.long()
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(starts) or bool((offsets.diff() < 0).any()):
            raise BadInput(f"pieces of shape {self.shape}: offsets do not rise from 0 to {len(starts)}")
        wrong = (starts >= stops) | (starts < 0) | (stops > self.keys)
        wrong[1:] |= (starts[1:] < stops[:-1]) & (self.owner()[1:] == self.owner()[:-1])
        if bool(wrong.any()):
            run = int(wrong.nonzero()[0])
            batch, head, group = self._place(int(self.owner()[run]))
            raise BadInput(
                f"pieces: batch {batch}, head {head}, row group {group}: run [{int(starts[run])}, {int(stops[run])}) is "
                f"empty, out of the {self.keys} keys, or overlaps the run before it"
            )
        return self

    def owner(self) -> Tensor:
        """The number of the list each run belongs to. (runs,) int64."""
        return torch.repeat_interleave(torch.arange(self.lists, device=self.offsets.device), self.offsets.diff())

    def _place(self, flat: int) -> tuple[int, int, int]:
        head, group = divmod(flat, self.shape[2])
        return (*divmod(head, self.shape[1]), group)

    def lengths(self) -> Tensor:
        """Keys in each list. (B', H', groups) int64."""
        size = (self.stops - self.starts).long()
        total = torch.zeros(self.lists, dtype=torch.int64, device=size.device)
        return total.index_add_(0, self.owner(), size).view(self.shape)

    def keep(self) -> Tensor:
        """The lists as booleans. (B', H', groups, keys): for tests and pictures, not for long sequences."""
        edge = torch.zeros(self.lists, self.keys + 1, dtype=torch.int32, device=self.offsets.device)
        owner, ones = self.owner(), torch.ones_like(self.starts)
        edge.index_put_((owner, self.starts.long()), ones, accumulate=True)
        edge.index_put_((owner, self.stops.long()), -ones, accumulate=True)
        return edge[:, :-1].cumsum(1).bool().view(*self.shape, self.keys)

    @staticmethod
    def from_blocks(keep: Tensor, rows: int, block: int, queries: int, keys: int) -> Pieces:
        """(B', H', row groups, key blocks) bool, blocks of `block` keys -> runs; neighbouring blocks become one run."""
        groups, blocks = -(-queries // rows), -(-keys // block)
        if keep.dtype != torch.bool or keep.ndim != 4 or tuple(keep.shape[2:]) != (groups, blocks):
            raise BadInput(
                f"{queries} queries and {keys} keys in blocks of {rows} x {block} make a grid of {groups} x {blocks} "
                f"booleans, got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        pieces = Pieces.from_keep(keep, rows, queries)
        return Pieces(
            pieces.offsets, pieces.starts * block, (pieces.stops * block).clamp(max=keys), pieces.shape, rows, queries, keys
        )

    @staticmethod
    def from_keep(keep: Tensor, rows: int, queries: int) -> Pieces:
        """(B', H', row groups, keys) bool -> runs of kept keys."""
        flat = keep.reshape(-1, keep.shape[-1])
        edge = torch.zeros(flat.shape[0], flat.shape[1] + 1, dtype=torch.int8, device=keep.device)
        edge[:, :-1] += flat
        edge[:, 1:] -= flat.to(torch.int8)
        starts, stops = (edge == 1).nonzero(), (edge == -1).nonzero()
        counts = torch.bincount(starts[:, 0], minlength=flat.shape[0])
        return Pieces(
            _offsets(counts), starts[:, 1].int(), stops[:, 1].int(), (keep.shape[0], keep.shape[1], keep.shape[2]), rows,
            queries, keep.shape[-1],
        )  # fmt: skip

    @staticmethod
    def from_runs(runs: Nested, rows: int, queries: int, keys: int) -> Pieces:
        """runs[batch][head][group] = [(start, stop), ...]; checked."""
        lists = [group for batch in runs for head in batch for group in head]
        flat = torch.tensor([run for group in lists for run in group], dtype=torch.int32).view(-1, 2)
        counts = torch.tensor([len(group) for group in lists], dtype=torch.int64)
        shape = (len(runs), len(runs[0]), len(runs[0][0]))
        return Pieces(_offsets(counts), flat[:, 0].contiguous(), flat[:, 1].contiguous(), shape, rows, queries, keys).check()

    @staticmethod
    def from_indices(index: Tensor, counts: Tensor, block: int, rows: int, queries: int, keys: int) -> Pieces:
        """(B', H', groups, most) ascending distinct block numbers, the first `counts` (B', H', groups) of them valid.

        Runs of `block` keys each, neighbours joined. The work is O(kept blocks), whatever the length.
        """
        most = index.shape[-1]
        flat, many = index.reshape(-1, most).long(), counts.reshape(-1).long()
        valid = torch.arange(most, device=index.device) < many[:, None]
        before = torch.full_like(flat[:, :1], -2)
        opens = valid & (flat != torch.cat([before, flat[:, :-1]], 1) + 1)
        after = torch.cat([flat[:, 1:], before], 1)
        last = torch.cat([~valid[:, 1:], torch.ones_like(valid[:, :1])], 1)
        closes = valid & (last | (after != flat + 1))
        starts, stops = flat[opens] * block, ((flat[closes] + 1) * block).clamp(max=keys)
        shape = (index.shape[0], index.shape[1], index.shape[2])
        return Pieces(_offsets(opens.sum(1)), starts.int(), stops.int(), shape, rows, queries, keys)

    def union(self, other: Pieces) -> Pieces:
        """The keys in either list. The same rows; shapes broadcast."""
        return _sweep(self, other, 1)

    def intersect(self, other: Pieces) -> Pieces:
        """The keys in both lists. The same rows; shapes broadcast."""
        return _sweep(self, other, 2)

    def split(self, rows: int) -> Pieces:
        """The same lists for smaller groups: `rows` must divide the rows of a group."""
        if rows == self.rows:
            return self
        if rows < 1 or self.rows % rows:
            raise BadInput(f"groups of {self.rows} rows cannot be split into groups of {rows}")
        groups = -(-self.queries // rows)
        index = torch.arange(groups, device=self.offsets.device) // (self.rows // rows)
        lists = torch.arange(self.lists, device=self.offsets.device).view(self.shape)[:, :, index]
        return self._take(lists, rows)

    def expand(self, batch: int, heads: int) -> Pieces:
        """The same lists for `batch` and `heads` (head h takes the list h * H' // heads)."""
        if (batch, heads) == self.shape[:2]:
            return self
        if self.shape[0] not in (1, batch) or heads % self.shape[1]:
            raise BadInput(f"pieces of shape {self.shape} do not spread over batch {batch} and {heads} heads")
        index = torch.arange(self.lists, device=self.offsets.device).view(self.shape)
        return self._take(index.expand(batch, -1, -1).repeat_interleave(heads // self.shape[1], 1), self.rows)

    def _take(self, lists: Tensor, rows: int) -> Pieces:
        """Lists chosen by number. lists: (B', H', groups)."""
        index = lists.reshape(-1)
        counts = self.offsets.diff()[index]
        offsets = _offsets(counts)
        within = torch.arange(int(offsets[-1]), device=offsets.device) - torch.repeat_interleave(offsets[:-1], counts)
        source = torch.repeat_interleave(self.offsets[index], counts) + within
        shape = (lists.shape[0], lists.shape[1], lists.shape[2])
        return Pieces(offsets, self.starts[source], self.stops[source], shape, rows, self.queries, self.keys)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])


def _sweep(one: Pieces, two: Pieces, depth: int) -> Pieces:
    """Keys covered by at least `depth` of the two lists: a sweep over their sorted run ends."""
    if (one.rows, one.queries, one.keys) != (two.rows, two.queries, two.keys):
        raise BadInput(
            f"pieces over {one.queries} x {one.keys} in groups of {one.rows} and over {two.queries} x {two.keys} in groups "
            f"of {two.rows} cannot be combined"
        )
    batch, heads = max(one.shape[0], two.shape[0]), max(one.shape[1], two.shape[1])
    one, two = one.expand(batch, heads), two.expand(batch, heads)
    width = one.keys + 1
    owner = torch.cat([one.owner(), two.owner()])
    starts = owner * width + torch.cat([one.starts, two.starts]).long()
    stops = owner * width + torch.cat([one.stops, two.stops]).long()
    at, order = torch.sort(torch.cat([starts, stops]))
    height = torch.cat([torch.ones_like(starts), -torch.ones_like(stops)])[order].cumsum(0)
    final = torch.ones_like(at, dtype=torch.bool)
    final[:-1] = at[1:] != at[:-1]  # what counts at a point is the height after all that happens there
    at, covered = at[final], height[final] >= depth
    changed = covered.clone()
    changed[1:] ^= covered[:-1]
    edges = at[changed].view(-1, 2)
    counts = torch.bincount(edges[:, 0] // width, minlength=one.lists)
    return Pieces(
        _offsets(counts),
        (edges[:, 0] % width).int(),
        (edges[:, 1] % width).int(),
        one.shape,
        one.rows,
        one.queries,
        one.keys,
    )
