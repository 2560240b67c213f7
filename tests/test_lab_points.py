"""Generated rooms: the same from the same seed, every class, whole multiples of 2 cm, and views that know their points."""

import pytest
import torch

from maskwright.core.select import generator
from maskwright.lab.points import CLASSES, VoxelNet, mean_iou, room, view


def test_a_room_is_the_same_again_and_has_every_class():
    one, again, other = room(3), room(3), room(4)
    assert torch.equal(one.coords, again.coords) and torch.equal(one.feats, again.feats)
    assert not torch.equal(one.coords[:256], other.coords[:256])
    assert one.labels.unique().tolist() == list(range(len(CLASSES))) and 1000 < len(one.labels) <= 1024
    assert torch.allclose(one.coords / 0.02, (one.coords / 0.02).round(), atol=1e-3)
    low, high = one.coords.amin(0), one.coords.amax(0)
    assert (low > -0.1).all() and (high < torch.tensor([4.5, 4.5, 2.6])).all()
    assert one.feats.abs().max() <= 0.5
    assert one.coords[one.labels == 0][:, 2].abs().max() < 0.1  # the floor is flat


def test_a_view_moves_the_points_it_names_and_keeps_distances():
    whole = room(0)
    seen, rows = view(whole, generator(1))
    assert len(rows) == round(0.8 * len(whole.coords)) and len(rows.unique()) == len(rows)
    assert torch.equal(seen.labels, whole.labels[rows])
    before, after = (torch.cdist(c[:40], c[:40]) for c in (whole.coords[rows], seen.coords))
    assert (before - after).abs().max() < 0.2  # noise of 1 cm and rounding to 2
    assert (seen.coords[:, 2] - whole.coords[rows][:, 2]).abs().max() < 0.1


def test_mean_iou_by_hand():
    guess, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert mean_iou(guess, labels, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_the_net_keeps_scenes_apart():
    net = VoxelNet(width=4).eval()
    one, two = room(0, 256), room(1, 256)
    scene = torch.cat([torch.full((len(r.coords),), at) for at, r in enumerate((one, two))])
    both = net(torch.cat([one.coords, two.coords]), torch.cat([one.feats, two.feats]), scene)
    alone = net(one.coords, one.feats, torch.zeros(len(one.coords), dtype=torch.int64))
    assert both.shape == (len(scene), len(CLASSES)) and torch.allclose(both[: len(alone)], alone, atol=1e-5)
