"""Images as rows of square patches and back, and masks over a coarse grid spread over what they lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.core.errors import BadInput


def patches(images: Tensor, side: int) -> Tensor:
    """(batch, channels, height, width) -> (batch, tokens, channels * side * side), tokens row by row.

    Inside a token: channel, then row, then column. Raises BadInput where `side` does not divide height and width.
    """
    batch, channels, height, width = sides(images, side)
    cut = images.reshape(batch, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def unpatched(tokens: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patches` for a grid of (rows, columns) tokens. Raises BadInput where the sizes do not fit."""
    batch, number, width = tokens.shape
    if number != grid[0] * grid[1] or width % (side * side):
        raise BadInput(f"tokens of shape {tuple(tokens.shape)} are no {grid[0]} x {grid[1]} grid of {side} x {side} patches")
    cut = tokens.reshape(batch, *grid, -1, side, side).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, -1, grid[0] * side, grid[1] * side)


def sides(images: Tensor, side: int) -> tuple[int, int, int, int]:
    """The shape of an image batch whose height and width `side` divides. Raises BadInput."""
    if images.ndim != 4:
        raise BadInput(f"images are (batch, channels, height, width), got shape {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    if side < 1 or height % side or width % side:
        raise BadInput(f"a patch of {side} x {side} does not divide images of {height} x {width}")
    return batch, channels, height, width


def spread(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    """(batch, *grid) -> (batch, *size), each entry repeated over the part it stands for.

    Raises BadInput where a side of `size` is not a whole multiple of the grid's.
    """
    shape = tuple(grid.shape)
    if len(size) != len(shape) - 1 or any(whole % part for whole, part in zip(size, shape[1:], strict=True)):
        raise BadInput(f"a mask of shape {shape} does not spread over {tuple(size)}: whole multiples are needed")
    for dim, (whole, part) in enumerate(zip(size, shape[1:], strict=True), start=1):
        if whole != part:
            grid = torch.repeat_interleave(grid, whole // part, dim)
    return grid
