"""CPCM on numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.cpcm import Cpcm
from maskwright.inputs.cpcm.streams import Batch, Stream, divergence
from maskwright.inputs.regions import Regions


def cloud(n=60, scenes=2, seed=0):
    coords = torch.rand(n, 3, generator=generator(seed))
    labels = torch.full((n,), -1)
    labels[::7] = torch.arange(len(labels[::7])) % 4
    return Stream(coords, torch.rand(n, 3, generator=generator(seed, "f")) + 0.1, labels, torch.arange(n) % scenes)


def batch(n=60):
    return Batch(cloud(n), cloud(n, seed=1), torch.stack([torch.arange(n // 2), torch.arange(n // 2) + 3], 1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.seen = []

    def forward(self, coords, feats, scene):
        self.seen.append((coords, feats))
        return self.two(self.norm(self.one(torch.cat([coords, feats], 1))).relu())


def test_density_one_masks_no_point_and_the_own_term_is_the_divergence_of_equals():
    net = Net().eval()
    terms = Cpcm(density=1.0, grid=2).start(net).terms(batch())
    assert terms.mask.keep.all()
    z2 = net(batch().two.coords, batch().two.feats, batch().two.scene)
    assert torch.equal(terms.masked, z2)
    assert terms.own == divergence(z2, z2) and -7e-4 < terms.own < 0
    assert Cpcm(density=1.0, grid=2, exact=True).start(net).terms(batch()).own == 0


def test_the_reference_divergence_of_equals_is_slightly_negative_and_the_exact_one_zero():
    even = torch.zeros(3, 4, dtype=torch.float64)
    assert divergence(even, even).item() == pytest.approx(2 * math.log(0.25 / 0.2501 + 1e-4), abs=1e-12)
    assert divergence(even, even).item() == pytest.approx(-6.0e-4, abs=1e-6)  # -2 e (K - 1)
    z = 5 * torch.randn(50, 7, generator=generator(0))
    assert divergence(z, z, exact=True) == 0
    sure = torch.tensor([[40.0, 0.0]])  # one-hot against even: ln(4/3) + ln(2/3)/2 + ln(2)/2
    hand = math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert divergence(sure, torch.zeros(1, 2), exact=True).item() == pytest.approx(hand, abs=1e-6)
    assert divergence(sure, sure.flip(1), exact=True).item() == pytest.approx(2 * math.log(2), abs=1e-5)
    assert divergence(z, z.roll(1, 0)).item() == pytest.approx(divergence(z, z.roll(1, 0), exact=True).item(), rel=0.02)


def test_all_boxes_hidden_leaves_the_released_codes_strict_borders():
    line = torch.arange(10.0)[:, None].repeat(1, 3)  # different values 0..9, grid 4: stride 2, borders 0 2 4 6 8
    box = Cpcm(grid=4, reference=True).boxes(line)[1]
    assert (box < 0).nonzero()[:, 0].tolist() == [0, 9]  # x = 0 and x = 9 can never be masked
    assert box[1:9].tolist() == [0, 0, 21, 21, 42, 42, 63, 63]  # step * (16 + 4 + 1)
    ours = Cpcm(grid=4).boxes(line)[1]
    assert ours.tolist() == [0, 0, 0, 21, 21, 42, 42, 63, 63, 63]
    minimum = torch.cartesian_prod(*[torch.arange(9.0)] * 3)  # grid divides nothing away but the first value
    inside = Cpcm(grid=4, reference=True).boxes(minimum)[1] >= 0
    assert torch.equal(inside, (minimum > 0).all(1))


def test_points_outside_the_released_codes_boxes_are_never_masked():
    coords = cloud(200).coords
    mask, box = Cpcm(density=1 / 64, reference=True).boxes(coords, rng=generator(1))
    assert 3 <= (box == -1).sum() < 100 and mask.keep[box == -1].all()
    inside = box != -1
    assert len(box[inside & mask.keep].unique()) <= 1 and (~mask.keep[inside]).sum() > 50


@pytest.mark.parametrize(("grid", "masked"), [(4, 48), (8, 384)])
def test_count_of_masked_boxes(grid, masked):
    lattice = torch.cartesian_prod(*[torch.arange(2.0 * grid)] * 3)  # no box without a point
    mask, box = Cpcm(grid=grid).boxes(lattice)
    assert len(box.unique()) == grid**3 and len(box[~mask.keep].unique()) == masked
    assert len(box[mask.keep].unique()) == grid**3 - masked
    assert not mask.equal(Cpcm(grid=grid).keep(lattice, rng=generator(5)))


@pytest.mark.parametrize("points", [False, True])
def test_scenes_do_not_mix_and_nothing_is_changed_in_place(points):
    method, data, net = Cpcm(grid=2, density=0.5, points=points), batch(), Net()
    before = [each.clone() for each in (data.two.coords, data.two.feats)]
    terms = method.start(net).terms(data)
    assert torch.equal(before[0], data.two.coords) and torch.equal(before[1], data.two.feats)
    hidden = ~terms.mask.keep
    coords, feats = net.seen[2]
    assert torch.equal(coords, before[0]) and 0 < hidden.sum() < len(hidden)
    assert (feats[hidden] == 0).all() and torch.equal(feats[~hidden], before[1][~hidden])
    alone = data.two.scene == 0  # the first scene's draw does not depend on the second scene
    moved = data.two.coords.clone()
    moved[~alone] = moved[~alone] * 3 + 1
    one, other = (method.boxes(c, data.two.scene, rng=generator(4))[0].keep for c in (data.two.coords, moved))
    assert torch.equal(one[alone], other[alone])
    if points:
        assert all(int(one[data.two.scene == s].sum()) == 15 for s in (0, 1))  # half of 30, each scene by itself


def test_each_point_has_one_box_and_permuting_points_permutes_the_mask():
    coords, order = cloud().coords, torch.randperm(60, generator=generator(1))
    mask, box = Cpcm(grid=3).boxes(coords, rng=generator(2))
    again, moved = Cpcm(grid=3).boxes(coords[order], rng=generator(2))
    assert torch.equal(mask.keep[order], again.keep) and torch.equal(box[order], moved)
    assert box.min() >= 0 and box.max() < 27
    assert all(len(mask.keep[box == b].unique()) == 1 for b in box.unique())
    assert torch.equal(Regions(0.25, 3)(coords, rng=generator(2))[0].keep, mask.keep)


def test_masked_terms_send_no_gradient_to_their_targets():
    logits = [torch.randn(60, 4, generator=generator(i)).requires_grad_() for i in range(3)]
    passes = iter(logits)
    terms = Cpcm(grid=2).start(lambda *_: next(passes)).terms(batch())
    to = torch.autograd.grad(terms.own + terms.corresponding, logits, allow_unused=True)
    assert to[0] is None and to[1] is None and to[2].abs().sum() > 0


def test_the_masked_view_has_no_supervised_loss_and_the_sum_is_as_stated():
    net, data, method = Net().eval(), batch(), Cpcm(grid=2, ramp=10, consistency=2.0)
    run = method.start(net)
    run.step = 5
    terms = run.terms(data)
    z1, z2 = (net(s.coords, s.feats, s.scene) for s in (data.one, data.two))
    ce = nn.CrossEntropyLoss(ignore_index=-1)
    a, b = data.pairs.T
    assert torch.allclose(terms.supervised, ce(z1, data.one.labels) + ce(z2, data.two.labels))
    assert torch.allclose(terms.own, divergence(z2, terms.masked))
    assert torch.allclose(terms.corresponding, divergence(z1[a], terms.masked[b]))
    assert torch.allclose(terms.consistency, divergence(z1[a], z2[b]))
    share = math.exp(-5 * 0.25)
    expected = terms.supervised + share * (2 * terms.consistency + 5 * (terms.own + terms.corresponding))
    assert torch.allclose(terms.total, expected) and run.step == 6


def test_ramp_steps_and_the_same_masks_after_a_restart():
    method = Cpcm(grid=2, ramp=4)
    assert [method.ramped(s) for s in (0, 2, 4, 99)] == [math.exp(-5), math.exp(-1.25), 1.0, 1.0]
    assert Cpcm(ramp=0).ramped(0) == 1.0
    run, later, data = method.start(Net(), seed=3), method.start(Net(), seed=3), batch()
    masks = [run.terms(data).mask for _ in range(3)]
    later.step = 2
    assert masks[2].equal(later.terms(data).mask) and not masks[1].equal(masks[2])


def test_no_shared_point_skips_the_corresponding_term_and_no_pass_skips_both():
    data = batch()
    apart = Batch(data.one, data.two, torch.zeros(0, 2, dtype=torch.int64))
    terms = Cpcm(grid=2, consistency=1.0).start(Net()).terms(apart)
    assert terms.corresponding == 0 and terms.consistency == 0 and terms.total.isfinite() and terms.own != 0
    net = Net()
    none = Cpcm(grid=2, probability=0.0).start(net).terms(data)
    assert none.mask is None and len(net.seen) == 2 and none.total == none.supervised


def test_the_masked_pass_moves_batch_norm_in_training_only():
    with_it, without, still = Net(), Net(), Net().eval()
    Cpcm(grid=2).start(with_it).loss(batch())
    Cpcm(grid=2, probability=0.0).start(without).loss(batch())
    Cpcm(grid=2).start(still).loss(batch())
    assert (with_it.norm.num_batches_tracked, without.norm.num_batches_tracked, still.norm.num_batches_tracked) == (3, 2, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.0},
        {"density": 1.1},
        {"grid": 0},
        {"weight": -1.0},
        {"consistency": math.nan},
        {"ramp": -1},
        {"probability": 1.5},
    ],
)
def test_settings_refused(settings):
    with pytest.raises(BadInput):
        Cpcm(**settings)


def test_batches_refused():
    run, good = Cpcm(grid=2).start(Net()), batch()

    def two(**parts):
        return Batch(good.one, Stream(**{**vars(good.two), **parts}), good.pairs)

    coords = good.two.coords.clone()
    coords[4, 1] = float("nan")
    flat = good.two.coords * torch.tensor([1.0, 1.0, 0.0])  # one value on the third axis
    cases = [
        (two(labels=torch.full((60,), -1)), "all 60 labels"),
        (two(labels=torch.full((60,), 4)), r"\[4\] do not fit"),
        (two(coords=coords), r"coords are NaN or infinite at \(4, 1\)"),
        (two(coords=flat), "axis 2 has 1 different values"),
        (two(feats=good.two.feats[:5]), "feats"),
        (two(scene=good.two.scene[:5]), "scene"),
        (Batch(good.one, good.two, torch.tensor([[0, 60]])), "outside"),
        (Batch(good.one, good.two, torch.zeros(2, 3)), "pairs"),
    ]
    for bad, told in cases:
        with pytest.raises(BadInput, match=told):
            run.loss(bad)
    assert run.step == 0
    with pytest.raises(BadInput, match="logits"):
        Cpcm(grid=2).start(lambda c, f, s: torch.full((60, 4), float("nan"))).loss(good)
    with pytest.raises(BadInput, match="NaN"):
        Cpcm(points=True).boxes(coords)
