"""Point clouds for claims about segmentation: generated rooms by stated rules, and tiles of one real scan (`scan`).

A room is 4 x 4 x 2.5 m: a floor, two to four walls, and furniture at places drawn by chance: tables (a top and four legs),
chairs (seat, back, legs), lamps (a rod and a ball), boxes. Points lie on the surfaces with 1 cm of noise. Colours say
little: two classes share each of three palettes, with noise and a tint of the room. What a thing is shows in the points
around it.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.sources import SourceMissing, fetch_debian

CLASSES = ("floor", "wall", "table", "chair", "lamp", "box")
SIZE = (4.0, 4.0, 2.5)
VOXEL = 0.02
_PALETTE = ((0.55, 0.45, 0.35), (0.7, 0.7, 0.65), (0.55, 0.45, 0.35), (0.3, 0.35, 0.45), (0.7, 0.7, 0.65), (0.3, 0.35, 0.45))


@dataclass(frozen=True, eq=False)
class Room:
    """coords (n, 3) in metres, feats (n, 3) rgb - 0.5, labels (n,) of every point."""

    coords: Tensor
    feats: Tensor
    labels: Tensor


def room(seed: int, points: int = 1024) -> Room:
    """One room. About a quarter of the points lie on the floor, a quarter on walls, the rest on furniture."""
    rng = generator(seed, "room")

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    parts: list[tuple[Tensor, int]] = []

    def box(n: int, kind: int, low: tuple[float, float, float], high: tuple[float, float, float]) -> None:
        u = torch.rand(n, 3, generator=rng)
        axis, side = torch.randint(3, (n,), generator=rng), torch.randint(2, (n,), generator=rng)
        thin = torch.tensor(high) - torch.tensor(low) < 0.05
        if bool(thin.any()) and not bool(thin.all()):
            axis[:] = int(thin.long().argmax())  # a sheet: its two great faces
        u[torch.arange(n), axis] = side.float()
        parts.append((torch.tensor(low) + u * (torch.tensor(high) - torch.tensor(low)), kind))

    part = points // 16
    box(4 * part, 0, (0, 0, 0), (4, 4, 0.01))
    walls = torch.randperm(4, generator=rng)[: 2 + int(torch.randint(3, (), generator=rng))].tolist()
    for wall in walls:
        n = 4 * part // len(walls)
        low, high = (
            [(0.0, 0.0), (0.0, 0.0), (3.99, 0.0), (0.0, 3.99)][wall],
            [(0.01, 4.0), (4.0, 0.01), (4.0, 4.0), (4.0, 4.0)][wall],
        )
        box(n, 1, (*low, 0.0), (*high, 2.5))
    for kind in (2, 2, 3, 3, 4, 4, 5, 5):
        x, y = between(0.3, 3.0), between(0.3, 3.0)
        if kind == 2:
            w, d, h = between(0.7, 1.1), between(0.6, 0.9), between(0.65, 0.8)
            box(part // 2, 2, (x, y, h), (x + w, y + d, h + 0.03))
            for dx, dy in ((0.0, 0.0), (w - 0.05, 0.0), (0.0, d - 0.05), (w - 0.05, d - 0.05)):
                box(part // 8, 2, (x + dx, y + dy, 0.0), (x + dx + 0.05, y + dy + 0.05, h))
        elif kind == 3:
            w, h = between(0.4, 0.5), between(0.4, 0.5)
            box(part // 3, 3, (x, y, h), (x + w, y + w, h + 0.03))
            box(part // 3, 3, (x, y, h), (x + 0.03, y + w, 2 * h))
            for dx, dy in ((0.0, 0.0), (w - 0.05, 0.0), (0.0, w - 0.05), (w - 0.05, w - 0.05)):
                box(part // 12, 3, (x + dx, y + dy, 0.0), (x + dx + 0.05, y + dy + 0.05, h))
        elif kind == 4:
            h, r = between(1.2, 1.7), between(0.12, 0.2)
            box(part // 2, 4, (x, y, 0.0), (x + 0.04, y + 0.04, h))
            ball = F.normalize(torch.randn(part // 2, 3, generator=rng), dim=1) * r + torch.tensor((x, y, h))
            parts.append((ball, 4))
        else:
            w = between(0.35, 0.7)
            box(part, 5, (x, y, 0.0), (x + w, y + w * between(0.7, 1.3), w * between(0.8, 1.6)))
    coords = torch.cat([each for each, _ in parts])
    labels = torch.cat([torch.full((len(each),), kind) for each, kind in parts])
    coords = coords + 0.01 * torch.randn(coords.shape, generator=rng)
    colour = torch.tensor(_PALETTE)[labels] + 0.12 * torch.randn(1, 3, generator=rng)
    feats = (colour + 0.15 * torch.randn(coords.shape, generator=rng)).clamp(0, 1) - 0.5
    return Room(voxelised(coords), feats, labels)


def voxelised(coords: Tensor) -> Tensor:
    """Coordinates at whole multiples of 2 cm."""
    return (coords / VOXEL).round() * VOXEL


def view(of: Room, rng: torch.Generator, share: float = 0.8) -> tuple[Room, Tensor]:
    """A random view: turns, a flip, 1 cm of noise, other light, `share` of the points; and their rows."""
    rows = torch.randperm(len(of.coords), generator=rng)[: round(share * len(of.coords))].sort().values
    at = of.coords[rows] - torch.tensor((2.0, 2.0, 0.0))
    angle = torch.pi / 2 * torch.randint(4, (), generator=rng) + 0.1 * (torch.rand((), generator=rng) - 0.5)
    sine, cosine = angle.sin(), angle.cos()
    flip = 1.0 - 2.0 * torch.randint(2, (), generator=rng)
    x, y = flip * (cosine * at[:, 0] - sine * at[:, 1]), sine * at[:, 0] + cosine * at[:, 1]
    moved = torch.stack([x + 2, y + 2, at[:, 2]], 1) + 0.01 * torch.randn(at.shape, generator=rng)
    feats = of.feats[rows] + 0.05 * torch.randn(1, 3, generator=rng) + 0.03 * torch.randn(at.shape, generator=rng)
    return Room(voxelised(moved), feats, of.labels[rows]), rows


def mean_iou(guess: Tensor, labels: Tensor, classes: int = len(CLASSES)) -> float:
    """Mean over classes of the points both agree on, by the points either names."""
    return (
        sum(
            int(((guess == k) & (labels == k)).sum()) / max(1, int(((guess == k) | (labels == k)).sum()))
            for k in range(classes)
        )
        / classes
    )


class VoxelNet(nn.Module):
    """(coords (n, 3) in metres, feats (n, channels), scene (n,)) -> logits: a small 3D U-Net on 16 x 16 x 10 voxels."""

    def __init__(self, channels: int = 3, classes: int = len(CLASSES), width: int = 16) -> None:
        super().__init__()
        self.shape = (16, 16, 10)
        self.enter = _conv(channels + 4, width)
        self.down, self.deep = _conv(width, 2 * width, 2), _conv(2 * width, 2 * width)
        self.point = nn.Linear(channels + 4, width)
        self.out = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, classes))

    def forward(self, coords: Tensor, feats: Tensor, scene: Tensor) -> Tensor:
        number = scene.unique(return_inverse=True)[1]
        scenes, (a, b, c) = int(number.max()) + 1, self.shape
        scaled = coords / 0.25
        cell = torch.minimum(scaled.floor().long().clamp(min=0), torch.tensor(self.shape) - 1)
        inside = scaled - cell - 0.5
        index = ((number * a + cell[:, 0]) * b + cell[:, 1]) * c + cell[:, 2]
        full = torch.cat([feats, inside, coords[:, 2:] - 1], 1)
        total = full.new_zeros(scenes * a * b * c, full.shape[1]).index_add(0, index, full)
        size = full.new_zeros(scenes * a * b * c).index_add(0, index, full.new_ones(len(full)))
        grid = (total / size.clamp(min=1)[:, None]).reshape(scenes, a, b, c, -1).permute(0, 4, 1, 2, 3)
        fine = self.enter(grid)
        coarse = F.interpolate(self.deep(self.down(fine)), size=self.shape)
        both = torch.cat([fine, coarse], 1).permute(0, 2, 3, 4, 1).flatten(0, 3)
        return self.out(torch.cat([both[index], self.point(full).relu()], 1))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU())


SCAN, SCAN_CLASSES = "libcgal-demo", ("ground", "vegetation", "roof")
_FILE, _HEADER = "data/points_3/b9_training.ply", b"end_header\n"
_ROW = [("x", "<f8"), ("y", "<f8"), ("z", "<f8"), ("colour", "u1", 3), ("label", "<i4")]
_HEIGHT, _LEAST = 25.0, 64  # metres of height that a tile has room for; points without which a tile is left out


@cache
def scan() -> tuple[Tensor, Tensor]:
    """A real scan of a piece of a town, from Debian's CGAL: coords (22300, 3) in metres from its corner, labels (22300,).

    2,447 points are labelled as SCAN_CLASSES, each class in one place of the scan; the others have -1. The file's colours
    are not given: they are the labels' own, and black without one. Raises SourceMissing without apt or network.
    """
    path = fetch_debian(SCAN) / "usr" / "share" / "doc" / "libcgal-dev" / "data.tar.gz"
    try:
        with tarfile.open(path) as tar:
            stream = tar.extractfile(_FILE)
            raw = b"" if stream is None else stream.read()
        rows = np.frombuffer(raw[raw.index(_HEADER) + len(_HEADER) :], np.dtype(_ROW))
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise SourceMissing(f"{SCAN}: {_FILE} cannot be read: {error}") from None
    coords = np.stack([rows[axis] for axis in "xyz"], 1)
    return torch.from_numpy((coords - coords.min(0)).astype(np.float32)), torch.from_numpy(rows["label"].astype(np.int64))


def tiles(coords: Tensor, labels: Tensor, seed: int, side: float = 12.0, least: int = 30) -> tuple[list[Room], list[Room]]:
    """Tiles to train on and to test on, as the fields of a chessboard of `side` metres laid over a scan where chance says.

    A tile is scaled to a room's 4 m, its lowest point at height 0 and 25 m of height to 2.5 m. Its feats are the shapes of
    the points' surroundings in the tile alone (`shapes`), so that nothing of a test tile is seen in training. The board is
    drawn again until both halves have `least` labelled points of each class; raises BadInput after 100 draws.
    """
    rng, wanted = generator(seed, "tiles"), labels[labels >= 0].unique()
    for _ in range(100):
        cell = ((coords[:, :2] + side * torch.rand(2, generator=rng)) / side).floor().long()
        dark = cell.sum(1) % 2
        if all(int(((labels == kind) & (dark == half)).sum()) >= least for kind in wanted for half in (0, 1)):
            break
    else:
        raise BadInput(f"no board of {side} m gives both halves {least} points of each of {len(wanted)} classes")
    halves: tuple[list[Room], list[Room]] = ([], [])
    for place in cell.unique(dim=0):
        rows = (cell == place).all(1).nonzero()[:, 0]
        if len(rows) >= _LEAST:
            own = coords[rows]
            scale = torch.tensor([SIZE[0] / side, SIZE[1] / side, SIZE[2] / _HEIGHT])
            halves[int(place.sum()) % 2].append(Room(voxelised((own - own.amin(0)) * scale), shapes(own), labels[rows]))
    return halves


def shapes(coords: Tensor, neighbours: int = 8) -> Tensor:
    """(n, 3) in [-0.5, 0.5] of the nearest `neighbours` of each point, itself with them: how much they lie on a line, how
    much they fill space, and how steep their plane is. From the eigenvalues l1 >= l2 >= l3 of their covariance:
    (l1 - l2) / l1, l3 / l1, 1 - |third vector's height|, each less 0.5."""
    near = coords[torch.cdist(coords, coords).topk(neighbours, largest=False).indices].double()
    centred = near - near.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
    third, second, first = values.clamp(min=0).unbind(1)
    first = first.clamp(min=1e-9)
    return (torch.stack([(first - second) / first, third / first, 1 - vectors[:, 2, 0].abs()], 1) - 0.5).float()
