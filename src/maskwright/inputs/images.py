"""A folder of image files as uint8 tensors, read batch by batch, optionally labelled by subfolder.

Names are paths inside the folder with `/`, sorted part by part, so the order is the same on every machine. A file counts
as an image by its suffix; hidden files and others beside the images are passed over. An image is turned as its EXIF tag
says and laid over black where it is transparent; of an animation the first picture is taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm", ".ppm")
_GREY, _COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width


@final
@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of one shape on disk; made by `open_images`, read by `read` and `batches`.

    root: the folder. names: the images, as paths inside it. shape: (channels, height, width) of every image as it is read.
    classes: the subfolders' names, sorted (empty without labels). labels: (n,) int64 into `classes`, or None. skipped: the
    unreadable files that were left out, with the reason. size: the images are scaled to it, or None.
    """

    root: Path
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: Sequence[int] | Tensor) -> Tensor:
        """The images of these numbers, (n, channels, height, width) uint8. Raises BadInput naming an unreadable one."""
        chosen = [int(at) for at in index]
        out = torch.empty((len(chosen), *self.shape), dtype=torch.uint8)
        for place, at in enumerate(chosen):
            try:
                pixels = _pixels(self.root / self.names[at], self.shape[0] == 1, self.size)
            except _Unreadable as error:
                raise BadInput(f"{told(self.root / self.names[at])}: {error}") from None
            if tuple(pixels.shape) != self.shape:
                raise BadInput(
                    f"{told(self.root / self.names[at])}: is {_by(pixels.shape[1:])} now, was {_by(self.shape[1:])}"
                )
            out[place] = pixels
        return out

    def batches(self, size: int, *, rng: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, `size` at a time: (numbers (n,) int64, images (n, channels, height, width) uint8).

        In order, or shuffled by `rng`; the last batch may be smaller. `labels[numbers]` are a batch's labels. Only one
        batch is in memory. Raises BadInput for a size below 1 and for an image that cannot be read.
        """
        if size < 1:
            raise BadInput(f"a batch holds at least 1 image, got {size}")
        order = torch.arange(len(self)) if rng is None else torch.randperm(len(self), generator=rng)
        for index in order.split(size):
            yield index, self.read(index)

    def load(self) -> Tensor:
        """All images at once, (n, channels, height, width) uint8."""
        return self.read(range(len(self)))


def open_images(
    root: Path | str,
    *,
    labelled: bool = False,
    size: int | tuple[int, int] | None = None,
    grey: bool | None = None,
    skip_unreadable: bool = False,
    verify: bool = True,
) -> ImageFolder:
    """Find the images under `root` and check them, one at a time.

    labelled: every subfolder is a class (images may lie deeper in it); else images are taken from anywhere below. size:
    side, or (height, width), that images are scaled to cover and then cut to, around the middle; without it all must have
    one size. grey: read one channel (True) or three (False); None reads one where every image is grey. verify: decode
    every image now; False looks at the headers only, and a damaged image is found when it is read.
    skip_unreadable: leave out what cannot be read, see `skipped`.
    Raises BadInput, naming the file, for an unreadable image, images of different sizes without `size`, more than 8 bits a
    channel; and for a folder that is not there or holds no image, a class without an image, an image of no class.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise BadInput(f"{told(folder)}: no such folder")
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and (len(wanted) != 2 or min(wanted) < 1):
        raise BadInput(f"a size is a height and a width of at least 1, got {wanted}")
    found = _names(folder)
    if labelled and any("/" not in name for name in found):
        stray = next(name for name in found if "/" not in name)
        raise BadInput(f"{told(folder / stray)}: lies in no class; give every class a subfolder of {told(folder)}")
    names, facts, skipped = [], [], []
    for name in found:
        try:
            facts.append(_facts(folder / name, verify))
            names.append(name)
        except _Unreadable as error:
            if not skip_unreadable:
                raise BadInput(
                    f"{told(folder / name)}: {error}; leave it out, or ask for unreadable images to be skipped"
                ) from None
            skipped.append((name, str(error)))
    if not names:
        kinds = " ".join(SUFFIXES)
        raise BadInput(f"{told(folder)}: no image can be read there ({len(skipped)} unreadable; looked for {kinds})")
    classes = _classes(folder, names) if labelled else ()
    if wanted is None:
        odd = next((at for at, fact in enumerate(facts) if fact[0] != facts[0][0]), None)
        if odd is not None:
            raise BadInput(
                f"{told(folder / names[odd])}: is {_by(facts[odd][0])} but {names[0]} is {_by(facts[0][0])}; "
                "give a size that all are scaled to"
            )
    one = all(fact[1] for fact in facts) if grey is None else grey
    number = {name: at for at, name in enumerate(classes)}
    labels = torch.tensor([number[name.split("/")[0]] for name in names]) if labelled else None
    return ImageFolder(
        folder, tuple(names), (1 if one else 3, *(wanted or facts[0][0])), classes, labels, tuple(skipped), wanted
    )


def told(path: Path | str) -> str:
    """A path for an error of one line: as it is, or escaped where a character cannot be printed."""
    return str(path) if str(path).isprintable() else ascii(str(path))


class _Unreadable(Exception):
    """An image that cannot be used; the message is the reason."""


def _names(folder: Path) -> list[str]:
    found = []
    for here, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                found.append((Path(here) / name).relative_to(folder))
    return [path.as_posix() for path in sorted(found, key=lambda path: path.parts)]


def _classes(folder: Path, names: list[str]) -> tuple[str, ...]:
    full = {name.split("/")[0] for name in names}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in full:
            raise BadInput(f"{told(path)}: a class without a readable image")
    return tuple(sorted(full))


def _facts(path: Path, verify: bool) -> tuple[tuple[int, int], bool]:
    """((height, width), is it grey) of one image file."""
    from PIL.Image import Image

    with _opened(path) as image:
        if verify:
            image.load()
        width, height = image.size
        # Not image.getexif(): of a PNG it decodes everything, to look for a tag behind the pixels.
        turned = Image.getexif(image).get(_ORIENTATION) in _TURNED
        return (width, height) if turned else (height, width), image.mode in _GREY


def _pixels(path: Path, grey: bool, size: tuple[int, int] | None) -> Tensor:
    """(channels, height, width) uint8."""
    from PIL import Image, ImageOps

    with _opened(path) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size[1], size[0]):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        array = np.asarray(image, dtype=np.uint8)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image file, open; whatever goes wrong with it inside the block is _Unreadable with a reason of one line."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise BadInput("images need the extra `lm`: pip install 'maskwright[lm]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a few bytes that ask for gigabytes
            with Image.open(path) as image:
                if image.mode not in (*_GREY, *_COLOUR):
                    raise _Unreadable(f"has pixels of mode {image.mode}; 8 bits a channel are read")
                yield image
    except (_Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _Unreadable("no image that can be read") from None
    except Exception as error:  # PIL's readers raise nearly anything on damaged files
        raise _Unreadable(_line(error)) from None


def _line(error: Exception) -> str:
    return "cannot be read: " + (" ".join(str(error).split()) or type(error).__name__)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
