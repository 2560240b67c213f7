"""Region masks in space: boxes of a grid laid over each scene of a point cloud go whole (CPCM, arXiv 2307.10316)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.select import draw
from maskwright.inputs.samplers import count


@final
@dataclass(frozen=True)
class Regions:
    """`grid`^3 boxes over each scene, whole(density, grid^3) of them stay; points in the others are hidden.

    Along each axis the boxes' borders are every floor(u / grid)-th of the u different coordinates: as many different
    values to a box, not as much room. Differs: the first box holds its lower border and the last one reaches the greatest
    value, so that every point lies in a box; `reference` has the released code's borders, which never hide the first
    value, nor the last ones where `grid` does not divide u.
    Raises BadInput for a density outside (0, 1] or one that keeps no box, and a grid below 1.
    """

    density: float = 0.25
    grid: int = 4
    reference: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.grid < 1:
            raise BadInput(f"regions need density in (0, 1] and a grid of at least 1, got {self.density} and {self.grid}")

    def __call__(self, points: Tensor, scene: Tensor | None = None, *, rng: torch.Generator) -> tuple[Mask, Tensor]:
        """The mask (n,) of points (n, 3), and each point's box (n,) int64, -1 outside all; `scene` (n,) numbers the scenes.

        Raises BadInput for no points, coordinates that are not finite, and scenes with fewer different values on an axis
        than `grid`.
        """
        if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not points.dtype.is_floating_point:
            raise BadInput(
                f"points are (n, 3) real coordinates, n at least 1, got {points.dtype} of shape {tuple(points.shape)}"
            )
        if not bool(points.isfinite().all()):
            bad = int((~points.isfinite().all(1)).nonzero()[0])
            raise BadInput(f"point {bad} of {len(points)} has a coordinate that is NaN or infinite")
        if scene is None:
            scene = torch.zeros(len(points), dtype=torch.int64)
        if tuple(scene.shape) != (len(points),):
            raise BadInput(f"scene numbers have shape {tuple(scene.shape)}, the points need ({len(points)},)")
        box, keep = torch.full((len(points),), -1), torch.ones(len(points), dtype=torch.bool)
        for number in scene.unique().tolist():
            inside = scene == number
            box[inside] = self._boxes(points[inside], int(number))
            shape, pattern = (1, self.grid**3), Unstructured((0,))
            stays = draw(pattern, shape, count(self.density, pattern, shape), rng=rng).keep[0]
            keep[inside] = torch.where(box[inside] < 0, True, stays[box[inside].clamp(min=0)])
        return Mask(keep), box

    def _boxes(self, points: Tensor, number: int) -> Tensor:
        at = torch.zeros(len(points), dtype=torch.int64)
        outside = torch.zeros(len(points), dtype=torch.bool)
        for axis in range(3):
            column = points[:, axis].contiguous()
            values = column.unique()
            stride = len(values) // self.grid
            if not stride:
                raise BadInput(
                    f"scene {number}: axis {axis} has {len(values)} different values, too few for a grid of {self.grid}"
                )
            borders = values[(torch.arange(self.grid + 1) * stride).clamp(max=len(values) - 1)]
            if not self.reference:
                borders[-1] = values[-1]
            step = torch.searchsorted(borders, column) - 1  # the borders strictly below, less one
            step = step if self.reference else step.clamp(min=0)
            outside |= (step < 0) | (step >= self.grid)
            at = at * self.grid + step
        return at.masked_fill(outside, -1)
