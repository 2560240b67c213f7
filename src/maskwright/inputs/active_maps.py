"""The active places of every feature map of one batch, and which dims of which tensors they lie along."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from maskwright.core.errors import BadInput
from maskwright.inputs.patches import spread

Space = tuple[int, int]  # the dims of a tensor along which its rows and columns lie
FIRST: Space = (2, 3)  # channels first
LAST: Space = (1, 2)  # channels last


class Maps:
    """A mask (batch, rows, columns) brought to the size of any feature map; finer maps repeat it.

    Differs: a coarser map is refused by the paper's code (its patch is the net's whole stride). Here a place of a coarser
    map is active when any place under it is, so that any patch size goes.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.layer = ""  # the module that runs now, for messages
        self._space = WeakIdKeyDictionary()
        self._made: dict[tuple[Any, ...], Tensor] = {}

    @property
    def batch(self) -> int:
        return len(self.keep)

    def space(self, x: object) -> Space | None:
        """Where the rows and columns of a tensor lie; None for what is no map of this batch."""
        return self._space.get(x) if isinstance(x, Tensor) else None

    def tag(self, x: Tensor, space: Space) -> Tensor:
        """Remember `x` as a map whose inactive places are 0 already."""
        self._space[x] = space
        return x

    def put(self, x: Tensor, space: Space) -> Tensor:
        """`x` with its inactive places set to 0, remembered as a map."""
        return self.tag(torch.where(self.over(x, space), x, x.new_zeros(())), space)

    def over(self, x: Tensor, space: Space) -> Tensor:
        """The active places as a bool that broadcasts over `x`."""
        rows, columns = space
        shape = [1] * x.ndim
        shape[0], shape[rows], shape[columns] = self.batch, x.shape[rows], x.shape[columns]
        return self.at(x.shape[rows], x.shape[columns], x.device).view(shape)

    def at(self, height: int, width: int, device: torch.device) -> Tensor:
        """(batch, height, width) bool. Raises BadInput naming the layer where the sizes do not divide."""
        key = (height, width, device)
        if key not in self._made:
            keep = self.keep.to(device)
            for dim, size in ((1, height), (2, width)):
                side = keep.shape[dim]
                if size > 0 and side % size == 0:
                    keep = keep.unflatten(dim, (size, side // size)).any(dim + 1)
                elif size % side:
                    grid = f"{self.keep.shape[1]} x {self.keep.shape[2]}"
                    self.refuse(
                        f"a map of {height} x {width} does not lie on a mask of {grid}: one side must divide the other"
                    )
            self._made[key] = spread(keep, (height, width))
        return self._made[key]

    def count(self, x: Tensor, space: Space) -> Tensor:
        """Active places of each sample at the size of this map. (batch,) in the dtype of `x`."""
        key = ("count", x.shape[space[0]], x.shape[space[1]], x.dtype, x.device)
        if key not in self._made:
            self._made[key] = self.at(*key[1:3], x.device).flatten(1).sum(1).to(x.dtype)
        return self._made[key]

    def index(self, x: Tensor, space: Space) -> Tensor:
        """Flat numbers of the active places of the batch, ascending. (active,)"""
        key = ("index", x.shape[space[0]], x.shape[space[1]], x.device)
        if key not in self._made:
            self._made[key] = self.at(*key[1:3], x.device).flatten().nonzero().flatten()
        return self._made[key]

    def rows(self, x: Tensor) -> Tensor:
        """The features of the active places of a channels-last map. (active, features)"""
        return x.reshape(-1, x.shape[3]).index_select(0, self.index(x, LAST))

    def from_rows(self, rows: Tensor, x: Tensor) -> Tensor:
        """The channels-last map that has these rows at the active places of `x`, and 0 elsewhere."""
        full = rows.new_zeros(x.shape[:3].numel(), rows.shape[1]).index_copy(0, self.index(x, LAST), rows)
        return self.tag(full.view(*x.shape[:3], -1), LAST)

    def columns(self, x: Tensor) -> Tensor:
        """The same of a channels-first map, whose memory this way is moved in long pieces. (features, active)"""
        return x.transpose(0, 1).reshape(x.shape[1], -1).index_select(1, self.index(x, FIRST))

    def from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        """The channels-first map that has these columns at the active places of `x`, and 0 elsewhere.

        Contiguous: the backward of a convolution over channels-last memory is not safe in every build of torch.
        """
        places = self.batch * x.shape[2:].numel()
        full = columns.new_zeros(len(columns), places).index_copy(1, self.index(x, FIRST), columns)
        return self.tag(full.view(-1, self.batch, *x.shape[2:]).transpose(0, 1).contiguous(), FIRST)

    def refuse(self, what: str) -> NoReturn:
        """Raise BadInput naming the layer that runs now."""
        raise BadInput(f"{self.layer or 'active'}: {what}")
