"""NIfTI volumes (.nii.gz), and their slices as small labelled images: real medical images for what claims report."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput

_KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2"}


def volume(path: Path) -> Tensor:
    """The voxels of a little-endian NIfTI-1 file, (x, y, z) float32. Raises BadInput for another file."""
    try:
        raw = gzip.decompress(path.read_bytes())
        (size,), dims = struct.unpack_from("<i", raw), struct.unpack_from("<8h", raw, 40)
        (kind,), (offset, slope, add) = struct.unpack_from("<h", raw, 70), struct.unpack_from("<3f", raw, 108)
        if size != 348 or dims[0] not in (3, 4) or kind not in _KINDS:
            raise ValueError("not a volume of a known kind")
        shape = dims[1:4]
        values = np.frombuffer(raw, "<" + _KINDS[kind], int(np.prod(shape)), int(offset))
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise BadInput(f"{path}: {error}") from None
    return torch.from_numpy(values.reshape(shape, order="F").astype(np.float32) * (slope or 1.0) + add)


def slices(voxels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Every slice of the middle 60% along each axis, (n, 1, side, side) uint8, and its axis (n,).

    Squared by black at the ends, averaged down; the value that 0.1% of the voxels pass is white.
    """
    top = float(np.percentile(voxels.numpy(), 99.9))
    images, labels = [], []
    for axis in range(3):
        length = voxels.shape[axis]
        cut = (voxels / top).clamp(0, 1).movedim(axis, 0)[length // 5 : length - length // 5].unsqueeze(1)
        wide = max(cut.shape[2:])
        gaps = [wide - cut.shape[3], wide - cut.shape[2]]
        square = F.pad(cut, [gaps[0] // 2, gaps[0] - gaps[0] // 2, gaps[1] // 2, gaps[1] - gaps[1] // 2])
        images.append((F.adaptive_avg_pool2d(square, side) * 255).round().to(torch.uint8))
        labels.append(torch.full((len(cut),), axis))
    return torch.cat(images), torch.cat(labels)
