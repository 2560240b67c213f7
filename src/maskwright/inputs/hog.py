"""Histograms of oriented gradients as a per-token target (MaskFeat, arXiv 2112.09133; DMJD, arXiv 2301.00230)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.inputs.patches import sides

CELL = 8  # pixels a side, where the patch is a multiple of it


def hog(images: Tensor, cell: int = CELL, *, bins: int = 9, whiten: bool = True) -> Tensor:
    """(batch, channels, height, width) -> (batch, channels, height / cell, width / cell, bins).

    Centred differences (0 on the border rows for the row gradient, columns for the column gradient); each pixel puts
    its gradient's length into the bin of its unsigned direction atan2(rows, columns) mod 180 degrees; a cell holds the
    mean per bin. `whiten` normalises each cell's bins to mean 0 and variance 1 (layer norm without weights), so that
    contrast does not matter; an even cell gives zeros. Raises BadInput where `cell` does not divide the image, for no
    bins, and for pixels that are NaN or infinite.
    """
    batch, channels, height, width = sides(images, cell)
    if bins < 1:
        raise BadInput(f"a histogram of directions needs at least 1 bin, got {bins}")
    if not bool(images.isfinite().all()):
        at = tuple(int(part) for part in (~images.isfinite()).nonzero()[0])
        raise BadInput(f"images of shape {tuple(images.shape)} are NaN or infinite at {at}: they have no gradients")
    down, across = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    across[..., 1:-1] = images[..., 2:] - images[..., :-2]
    degrees = torch.rad2deg(torch.atan2(down, across)) % 180
    # A direction a hair below 0 is 180 after the remainder has rounded: it belongs to the last bin.
    which = (degrees / (180 / bins)).long().clamp(max=bins - 1)
    sorted_in = images.new_zeros(batch, channels, bins, height, width)
    sorted_in.scatter_(2, which.unsqueeze(2), torch.hypot(down, across).unsqueeze(2))
    cells = F.avg_pool2d(sorted_in.flatten(0, 1), cell).unflatten(0, (batch, channels)).movedim(2, -1)
    return F.layer_norm(cells, (bins,)) if whiten else cells


def hog_tokens(images: Tensor, patch: int, cell: int = 0, *, bins: int = 9) -> Tensor:
    """The whitened histograms of each patch: (batch, tokens, cells a patch * bins * channels), tokens row by row.

    Inside a token: cell row, cell column, bin, channel. cell 0: 8 pixels where they divide the patch, else the patch.
    Raises BadInput where the cell does not divide the patch, and as `hog` does.
    """
    sides(images, patch)
    cell = cell or (patch if patch % CELL else CELL)
    if cell < 1 or patch % cell:
        raise BadInput(f"cells of {cell} x {cell} pixels do not divide patches of {patch} x {patch}")
    side = patch // cell
    found = hog(images, cell, bins=bins)
    batch, channels, rows, columns, _ = found.shape
    cut = found.reshape(batch, channels, rows // side, side, columns // side, side, bins)
    return cut.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)
