"""Structure: what a row may see by its place alone (causal, window, sink, prefix, document, padding).

Every structure is at most two intervals of keys a row, so that a mask over any length costs O(length) and a block is
classified by comparing numbers; `&` and `|` combine them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.core.errors import BadInput


class Structure(ABC):
    """Which keys a query row may see, as intervals. Combine with `&` (both) and `|` (either)."""

    @abstractmethod
    def intervals(self, at: Tensor, keys: int) -> Tensor:
        """at (queries,): the key positions the rows stand at -> (B', H', queries, n, 2) int64 intervals [start, stop)."""

    def bounds(self, queries: int, keys: int, offset: int | None = None) -> Tensor:
        """(B', H', queries, 2, 2) int32 for `block_attention`: two ascending disjoint intervals a row.

        Row i stands at key position offset + i; by default the last row stands at the last key. Raises BadInput when
        a row needs more than two intervals.
        """
        offset = keys - queries if offset is None else offset
        found = _tidy(self.intervals(torch.arange(queries) + offset, keys).clamp(0, keys))
        if found.shape[-2] > 2:
            raise BadInput(f"{self} gives some row {found.shape[-2]} separate intervals of keys; at most two can be held")
        if found.shape[-2] < 2:
            found = torch.cat([found, found[..., 1:].expand(*found.shape[:-1], 2)], -2)  # an empty one, where the first ends
        return found.int()

    def keep(self, queries: int, keys: int, offset: int | None = None) -> Tensor:
        """The same as booleans (B', H', queries, keys): for tests and pictures."""
        bounds, at = self.bounds(queries, keys, offset), torch.arange(keys)
        return ((bounds[..., :1] <= at) & (at < bounds[..., 1:])).any(-2)

    def classify(self, rows: int, block: int, queries: int, keys: int, offset: int | None = None) -> Tensor:
        """(B', query blocks, key blocks) int8: 0 empty, 1 partial, 2 full, for blocks of rows x block keys."""
        bounds = self.bounds(queries, keys, offset)[:, 0].long()
        groups = -(-queries // rows)
        start = torch.arange(0, keys, block)
        stop = (start + block).clamp(max=keys)
        low, high = (bounds[..., i].flatten(0, 1)[:, :, None] for i in (0, 1))
        size = (torch.minimum(high, stop) - torch.maximum(low, start)).clamp(min=0).sum(1)  # keys of the block a row sees
        size = size.view(bounds.shape[0], queries, -1)
        full = torch.nn.functional.pad(size == stop - start, (0, 0, 0, groups * rows - queries), value=True)
        some = torch.nn.functional.pad(size > 0, (0, 0, 0, groups * rows - queries))
        full, some = (x.unflatten(1, (groups, rows)) for x in (full, some))
        return some.any(2).to(torch.int8) + full.all(2).to(torch.int8)

    def parts(self) -> list[Structure]:
        """The structures that must all allow a key."""
        return [self]

    def __and__(self, other: Structure) -> Structure:
        return Both(self, other)

    def __or__(self, other: Structure) -> Structure:
        return Either(self, other)


def _tidy(found: Tensor) -> Tensor:
    """Sort a row's intervals, join those that meet, drop the columns that are empty everywhere."""
    start, stop = found.unbind(-1)
    if found.shape[-2] == 1:
        return torch.stack([start, torch.maximum(start, stop)], -1)
    if found.shape[-2] == 2:
        return _pair(*start.unbind(-1), *stop.unbind(-1))
    far = int(found.max()) + 1
    empty = start >= stop
    start, stop = start.masked_fill(empty, far), stop.masked_fill(empty, far)
    order = torch.sort(start, dim=-1, stable=True).indices
    starts, stops = (list(x.gather(-1, order).unbind(-1)) for x in (start, stop))
    for i in range(len(starts) - 1):  # joined into the later one, so that the pieces of a chain all end up in its last
        meet = (starts[i + 1] <= stops[i]) & (starts[i + 1] < far)
        starts[i + 1] = torch.where(meet, starts[i], starts[i + 1])
        stops[i + 1] = torch.where(meet, torch.maximum(stops[i], stops[i + 1]), stops[i + 1])
        starts[i], stops[i] = starts[i].masked_fill(meet, far), stops[i].masked_fill(meet, far)
    start, stop = torch.stack(starts, -1), torch.stack(stops, -1)
    order = torch.sort(start, dim=-1, stable=True).indices
    start, stop = start.gather(-1, order), stop.gather(-1, order)
    many = max(int((start < far).flatten(0, -2).any(0).sum()) if start.numel() else 1, 1)
    out = torch.stack([start[..., :many], stop[..., :many]], -1)
    blank = out[..., 0] >= far
    return out.masked_fill(blank[..., None], 0) if many == 1 else torch.where(blank[..., None], out[..., :1, 1:], out)


def _pair(start1: Tensor, start2: Tensor, stop1: Tensor, stop2: Tensor) -> Tensor:
    """Two intervals a row, in order and apart; an empty one stands where the other ends. Few passes: it is made often."""
    swap = (start2 < start1) | (start1 >= stop1)
    low, high = torch.where(swap, start2, start1), torch.where(swap, stop2, stop1)
    low2, high2 = torch.where(swap, start1, start2), torch.where(swap, stop1, stop2)
    high = torch.maximum(low, high)
    meet = (low2 <= high) | (low2 >= high2)  # also a second one that is empty: it ends up empty at the first one's end
    high = torch.where(meet & (low2 < high2), torch.maximum(high, high2), high)
    low2, high2 = torch.where(meet, high, low2), torch.where(meet, high, high2)
    return torch.stack([torch.stack([low, low2], -1), torch.stack([high, high2], -1)], -1)


@dataclass(frozen=True)
class Both(Structure):
    """What both structures allow."""

    one: Structure
    two: Structure

    def parts(self) -> list[Structure]:
        return [*self.one.parts(), *self.two.parts()]

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        a, b = _tidy(self.one.intervals(at, keys)), _tidy(self.two.intervals(at, keys))
        low = torch.maximum(a[..., :, None, 0], b[..., None, :, 0])
        high = torch.minimum(a[..., :, None, 1], b[..., None, :, 1])
        return torch.stack([low, high], -1).flatten(-3, -2)


@dataclass(frozen=True)
class Either(Structure):
    """What either structure allows."""

    one: Structure
    two: Structure

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        a, b = self.one.intervals(at, keys), self.two.intervals(at, keys)
        batch, heads = (max(a.shape[dim], b.shape[dim]) for dim in (0, 1))
        return torch.cat([x.expand(batch, heads, *x.shape[2:]) for x in (a, b)], -2)


@dataclass(frozen=True)
class Anywhere(Structure):
    """Every key."""

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        return _rows(torch.zeros_like(at), torch.full_like(at, keys))


@dataclass(frozen=True)
class Causal(Structure):
    """Keys up to the row's own."""

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        return _rows(torch.zeros_like(at), at + 1)


@dataclass(frozen=True)
class Window(Structure):
    """The last `left` keys up to the row's own, and `right` keys after it (None: all of them)."""

    left: int
    right: int | None = 0

    def __post_init__(self) -> None:
        if self.left < 1 or (self.right is not None and self.right < 0):
            raise BadInput(f"a window holds the row's own key: left >= 1 and right >= 0, got {self.left}, {self.right}")

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        return _rows(at - self.left + 1, torch.full_like(at, keys) if self.right is None else at + self.right + 1)


@dataclass(frozen=True)
class Sink(Structure):
    """The first `size` keys, whatever the row; causality is added with `Causal() &`."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise BadInput(f"a sink holds 0 keys or more, got {self.size}")

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        return _rows(torch.zeros_like(at), torch.full_like(at, self.size))


@dataclass(frozen=True, eq=False)
class Prefix(Structure):
    """The first keys, as many as each sample's prefix: `Causal() | Prefix(n)` is a prefix-LM. size: int or (batch,)."""

    size: int | Tensor

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        size = torch.as_tensor(self.size).view(-1, 1).expand(-1, len(at))
        return torch.stack([torch.zeros_like(size), size], -1)[:, None, :, None].long()


@dataclass(frozen=True, eq=False)
class Padding(Structure):
    """Keys first <= p < last of each sample: ints (batch,) or (batch, heads); what lies outside is padding."""

    first: Tensor
    last: Tensor

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        both = torch.stack([self.first, self.last], -1).long()
        both = both[:, None] if both.ndim == 2 else both  # (batch, 1|heads, 2)
        return both[:, :, None, None].expand(-1, -1, len(at), 1, 2)


@dataclass(frozen=True, eq=False)
class Document(Structure):
    """Keys of the row's own document. ids (keys,) or (batch, keys): the same number for the keys of one document, which
    lie side by side. Raises BadInput when a document comes back after another."""

    ids: Tensor

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        ids = self.ids if self.ids.ndim == 2 else self.ids[None]
        if ids.shape[1] != keys:
            raise BadInput(f"documents are named for {ids.shape[1]} keys of {keys}")
        fresh = torch.ones_like(ids, dtype=torch.bool)
        fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
        for row, new in zip(ids, fresh, strict=True):
            if len(row[new].unique()) != int(new.sum()):
                raise BadInput("a document's keys must lie side by side; one comes back after another document")
        index = torch.arange(keys).expand_as(ids)
        start = torch.where(fresh, index, 0).cummax(1).values
        last = torch.ones_like(fresh)
        last[:, :-1] = fresh[:, 1:]
        stop = torch.where(last, index + 1, keys).flip(1).cummin(1).values.flip(1)
        return torch.stack([start[:, at], stop[:, at]], -1)[:, None, :, None]


def _rows(start: Tensor, stop: Tensor) -> Tensor:
    return torch.stack([start, stop], -1)[None, None, :, None]


@dataclass(frozen=True, eq=False)
class Rows(Structure):
    """Intervals named row by row: table (1|batch, 1|heads, queries, n, 2), its first row standing at position `offset`."""

    table: Tensor
    offset: int = 0

    def intervals(self, at: Tensor, keys: int) -> Tensor:
        row = at - self.offset
        if len(row) and (int(row.min()) < 0 or int(row.max()) >= self.table.shape[2]):
            raise BadInput(
                f"{self.table.shape[2]} rows are described, rows {int(row.min())} to {int(row.max())} were asked for"
            )
        return self.table[:, :, row].long()
