"""Pictures of masks as base64 PNG, see-through where nothing is kept, so that one suits light and dark pages."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

_INK = (42, 127, 134)
_SIDE = 96  # aimed side of each image of a row
_EDGE = 512  # aimed length of the longer side; whole-number enlargement keeps the entries crisp


def _matrix(keep: Any) -> np.ndarray:
    if hasattr(keep, "detach"):
        keep = keep.detach().cpu().numpy()
    keep = np.asarray(keep)
    if keep.ndim != 2 or keep.size == 0:
        raise ValueError(f"a picture needs a mask with two dimensions and an entry, got shape {keep.shape}")
    return keep.astype(bool)


def _png(opacity: np.ndarray) -> str:
    """uint8 opacities -> palette PNG (one ink, 256 opacities), enlarged by a whole number, as base64."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need pillow: pip install 'maskwright[lm]'") from None
    height, width = opacity.shape
    times = max(1, _EDGE // max(height, width))
    image = Image.frombytes("P", (width, height), np.ascontiguousarray(opacity).tobytes())
    image.putpalette(_INK * 256)
    return _encoded(image, times, transparency=bytes(range(256)), optimize=True)


def _encoded(image: Any, times: int, **options: Any) -> str:
    """A PIL image enlarged by a whole number, as base64 PNG."""
    from PIL import Image

    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, format="PNG", **options)
    return base64.b64encode(out.getvalue()).decode("ascii")


def mask_png(keep: Any, most: int = 128) -> str:
    """The top-left corner of a 2-D mask, at most `most` entries a side, one square an entry: inked = kept.

    Takes a boolean numpy array or torch tensor. Raises ValueError for another number of dimensions.
    """
    return _png(_matrix(keep)[:most, :most].astype(np.uint8) * 255)


def density_png(keep: Any, block: int | tuple[int, int] = 16) -> str:
    """The whole mask as a heat map: density of each tile of `block` entries a side, clear = 0, full ink = 1.

    Tiles at the right and lower edge may be smaller; each is averaged over the entries it has.
    Raises ValueError for another number of dimensions or an empty tile.
    """
    matrix = _matrix(keep)
    rows, columns = (block, block) if isinstance(block, int) else block
    if rows < 1 or columns < 1:
        raise ValueError(f"a tile needs at least one entry a side, got {rows} x {columns}")
    top, left = np.arange(0, matrix.shape[0], rows), np.arange(0, matrix.shape[1], columns)
    kept = np.add.reduceat(np.add.reduceat(matrix.astype(np.int64), top, axis=0), left, axis=1)
    high = np.minimum(rows, matrix.shape[0] - top)[:, None]
    wide = np.minimum(columns, matrix.shape[1] - left)[None, :]
    return _png(np.rint(255 * kept / (high * wide)).astype(np.uint8))


def row_png(images: Any) -> str:
    """(n, 1 or 3, height, width) values in [0, 1], cut there -> one picture of them side by side, as base64 PNG.

    Takes a torch tensor.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    strip = (images.detach().clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).reshape(height, count * width, channels)
    array = strip.squeeze(-1).numpy() if channels == 1 else strip.numpy()
    return _encoded(Image.fromarray(array), max(1, _SIDE // max(height, width)))
