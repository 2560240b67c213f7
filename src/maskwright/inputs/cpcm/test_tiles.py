"""The tiles of the claim's real arms, on clouds made here: nothing is fetched."""

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.points import shapes, tiles


def cloud(n=4000, size=40.0):
    """A sheet at height 3 with a bump; three classes mixed everywhere, two thirds of the points without a label."""
    coords = torch.rand(n, 3, generator=generator(0)) * torch.tensor([size, size, 1.0]) + torch.tensor([0.0, 0.0, 3.0])
    labels = torch.arange(n) % 9
    return coords, torch.where(labels < 3, labels, -1)


def test_shapes_of_a_line_a_level_sheet_a_wall_and_a_cube():
    line = torch.arange(8.0)[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.allclose(shapes(line)[:, :2], torch.tensor([0.5, -0.5]))  # all on a line, no volume
    square = torch.tensor([[a, b, 0.0] for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0) if (a, b) != (0, 0)])
    assert torch.allclose(shapes(square), torch.tensor([-0.5, -0.5, -0.5]), atol=1e-6)  # two equal axes, level
    assert torch.allclose(shapes(square[:, [2, 0, 1]]), torch.tensor([-0.5, -0.5, 0.5]), atol=1e-6)  # upright
    cube = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert torch.allclose(shapes(cube)[:, :2], torch.tensor([-0.5, 0.5]), atol=1e-6)  # three equal axes
    assert torch.allclose(shapes(7 * cube + 3)[:, :2], shapes(cube)[:, :2], atol=1e-5)


def test_tiles_are_chessboard_fields_that_share_no_point():
    coords, labels = cloud()
    train, test = tiles(coords, labels, 3)
    again, _ = tiles(coords, labels, 3)
    other, _ = tiles(coords, labels, 4)
    assert torch.equal(train[0].coords, again[0].coords) and len(train[0].coords) != len(other[0].coords)
    sizes = [sum(len(r.labels) for r in half) for half in (train, test)]
    assert sum(sizes) <= len(labels) and min(sizes) > len(labels) // 3
    for half in (train, test):
        for kind in range(3):
            assert sum(int((r.labels == kind).sum()) for r in half) >= 30
        for tile in half:
            assert len(tile.labels) >= 64 and tile.coords.amin() == 0
            assert (tile.coords.amax(0) <= torch.tensor([4.01, 4.01, 0.11])).all()  # 12 m to 4 m, 1 m of 25 m to 0.1
            assert tile.feats.shape == tile.coords.shape and tile.feats.abs().max() <= 0.5


def test_a_tile_knows_nothing_of_the_points_around_it():
    coords, labels = cloud()
    train, test = tiles(coords, labels, 3)
    side, rng = 12.0, generator(3, "tiles")
    board = ((coords[:, :2] + side * torch.rand(2, generator=rng)) / side).floor().sum(1) % 2
    moved = coords.clone()
    moved[board == 1, 2] = moved[board == 1, 2] * 5 + 1  # the test half, and nothing else
    for before, after in zip(train, tiles(moved, labels, 3)[0], strict=True):
        assert torch.equal(before.coords, after.coords) and torch.equal(before.feats, after.feats)
    assert not torch.equal(test[0].feats, tiles(moved, labels, 3)[1][0].feats)


def test_a_class_that_no_board_can_share_is_refused():
    coords, labels = cloud()
    labels[labels == 2] = -1
    labels[0] = 2
    with pytest.raises(BadInput, match=r"12\.0 m .* 30 points of each of 3 classes"):
        tiles(coords, labels, 0)
