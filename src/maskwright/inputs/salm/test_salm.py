"""SALM's exact checks: counts, bounds, EM at density 1, the sign of the step, 8 bits, masks that move, states, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.perturbation import Ball
from maskwright.inputs.salm import Salm
from maskwright.inputs.salm.faint import faint_textures
from maskwright.inputs.salm.released import Protected, eight_bits

QUICK = {"rounds": 3, "noise_steps": 3, "model_steps": 4, "batch": 8, "stop": 0.0}


def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6))


def images(n=18):
    return faint_textures(n, 3)


def protect(x, y, **settings):
    return Salm(**{**QUICK, **settings}).protect(x, y, build, seed=1)


def test_every_image_keeps_the_rounded_count_and_noise_stays_inside():
    x, y = images()
    made = protect(x, y, density=0.05)
    assert made.mask.check().keep.flatten(1).sum(1).tolist() == [20] * 18  # 5% of 400
    outside = ~made.mask.keep[:, None].expand_as(made.delta)
    assert (made.delta[outside] == 0).all() and (made.delta != 0).any()
    assert made.delta.abs().max() <= 8 / 255 and made.images.min() >= 0 and made.images.max() <= 1
    assert protect(x.repeat(1, 3, 1, 1)[:, :1].float() / 255, y, density=0.05).delta.equal(made.delta)  # real values alike


def test_a_mask_is_shared_by_the_channels():
    x, y = images()
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 400, 6))  # noqa: E731
    made = Salm(**{**QUICK, "density": 0.1}).protect(x.repeat(1, 3, 1, 1), y, net)
    changed = made.delta != 0
    assert made.mask.shape == (18, 20, 20) and changed.any(0).any(1).any(1).all()
    assert not (changed & ~made.mask.keep[:, None]).any()


def test_rounding_of_the_count_is_exact_and_ties_fall_low():
    score = torch.tensor([[[1.0, 5.0], [5.0, 0.0]]])
    assert Salm(density=0.5).keep(score).keep.tolist() == [[[False, True], [True, False]]]
    assert Salm(density=0.25).keep(score).keep.tolist() == [[[False, True], [False, False]]]
    assert Salm(density=0.7).keep(torch.rand(2, 10, 10)).keep.flatten(1).sum(1).tolist() == [70, 70]  # int() gives 69
    # a pixel with score 0 is taken only when no other is left, and then the lower one
    assert Salm(density=0.75).keep(torch.tensor([[[0.0, 0.0], [0.0, 1e-30]]])).keep.tolist() == [
        [[True, True], [False, True]]
    ]
    assert Salm(density=0.25).keep(torch.tensor([[[0.0, 0.0], [0.0, 1e-30]]])).keep.tolist() == [
        [[False, False], [False, True]]
    ]


def test_windows_are_chosen_whole():
    score = torch.zeros(1, 4, 4)
    score[0, 3, 0], score[0, 0, 3] = 1.0, 0.5
    keep = Salm(density=0.5, window=2).keep(score).keep[0]
    assert keep.tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2
    with pytest.raises(BadInput, match="block"):
        Salm(window=3).keep(score)


def test_a_linear_surrogate_puts_the_mask_on_its_greatest_weights():
    weight = torch.tensor([0.1, -3.0, 0.5, 2.0, -0.2, 1.0])

    def linear():
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False))
        net[1].weight.data = torch.stack([weight, -weight])
        return net

    x, y = torch.full((4, 1, 2, 3), 0.5), torch.tensor([0, 1, 0, 1])
    still = lambda parameters: torch.optim.SGD(parameters, lr=1e-12)  # noqa: E731
    method = Salm(density=0.5, rounds=1, noise_steps=1, model_steps=1, batch=4)
    made = method.protect(x, y, linear, optimizer=still)
    assert made.mask.keep.tolist() == [[[False, True, False], [True, False, True]]] * 4  # |w| = 3, 2, 1
    # class 0's logit is w.x - (-w.x): its noise goes along the sign of w, class 1's against it
    step = 0.1 * 8 / 255
    want = torch.tensor([[[0.0, -step, 0.0], [step, 0.0, step]]])
    assert torch.allclose(made.delta[0], want) and torch.allclose(made.delta[1], -want)


def test_density_one_is_error_minimising_noise():
    """EM by hand: the same order of batches, no mask anywhere."""
    x, y = images()
    made, clean = protect(x, y, density=1.0), x.float() / 255
    eps, delta = 8 / 255, torch.zeros_like(clean)
    torch.manual_seed(1)
    net = build()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for at in range(3):
        net.train()
        rng = generator(1, f"salm round {at}")
        for order in (torch.randperm(18, generator=rng) for _ in range(2)):
            for index in order[:16].split(8):
                sgd.zero_grad()
                F.cross_entropy(net(clean[index] + delta[index]), y[index]).backward()
                sgd.step()
        net.eval()
        for index in torch.arange(18).split(8):
            for _ in range(3):
                z = (clean[index] + delta[index]).requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(net(z), y[index], reduction="sum"), z)
                moved = (delta[index] - 0.1 * eps * grad.sign()).clamp(-eps, eps)
                delta[index] = moved.maximum(-clean[index]).minimum(1 - clean[index])
    assert made.delta.equal(delta) and made.mask.density == 1.0


def test_a_step_down_lowers_the_loss_and_a_step_up_raises_it():
    x, y = images(60)
    clean, net, ball = x.float() / 255, build().eval(), Ball(8 / 255, 0.0, 1.0)
    z = clean.clone().requires_grad_()
    each = F.cross_entropy(net(z), y, reduction="none")
    (grad,) = torch.autograd.grad(each.sum(), z)
    mask = Salm(density=0.2).keep(grad.abs().sum(1))
    with torch.no_grad():
        after = [
            F.cross_entropy(net(clean + ball.descend(torch.zeros_like(clean), grad, mask, size, clean)), y, reduction="none")
            for size in (0.004, -0.004)
        ]
    assert int((after[0] < each).sum()) > 50 and int((after[1] > each).sum()) > 50


def test_the_mask_moves_between_rounds_and_leaves_no_noise_behind():
    x, y = images()
    run = Salm(**{**QUICK, "density": 0.05}).start(x, y, build)
    run.round()
    first = run.keep.clone()
    run.round()
    assert not run.keep.equal(first) and not (run.delta != 0).any(1)[~run.keep].any()
    held = Salm(**{**QUICK, "density": 0.05, "refresh": 5}).start(x, y, build)
    held.round()
    kept = held.keep.clone()
    held.round()
    assert held.keep.equal(kept) and kept.equal(first)


def test_eight_bits_keep_the_bound_and_the_mask():
    x, y = images()
    made = protect(x, y, density=0.2)
    step = made.images8.int() - x.int()
    assert step.abs().max() <= made.levels == 8 and not ((step != 0).any(1) & ~made.mask.keep).any()
    assert (made.images8.float() / 255 - x.float() / 255).abs().max() <= 8 / 255 + 1 / 510
    report = made.report()
    assert report["nominal"] == 0.2 and 0 < report["changed"] < 0.2  # noise below black is clipped away
    # by hand: values 0, 100, 255 and 10, noise -5/255, 3.4/255, 2/255 and none
    clean = torch.tensor([0, 100, 255, 10], dtype=torch.uint8).view(1, 1, 2, 2)
    noise = torch.tensor([-5.0, 3.4, 2.0, 0.0]).view(1, 1, 2, 2) / 255
    assert eight_bits(clean, noise, 8).flatten().tolist() == [0, 103, 255, 10]
    one = Protected(clean, noise, Mask(noise[:, 0] != 0), torch.tensor([0]), 8 / 255, 1, 0.25)
    told = one.report()
    assert (
        told["changed"] == 0.25 and told["greatest"] == 3 and abs(told["l2"] - 3 / 255) < 1e-12 and told["nominal"] == 0.75
    )
    # real values that are no 8-bit values: half a step is added at most
    real = torch.rand(5, 1, 4, 4, generator=generator(0))
    shift = torch.full_like(real, 8 / 255).masked_fill(real > 0.5, 0)
    bits = eight_bits(real, shift, 8)
    assert (bits.float() / 255 - real).abs().max() <= 8 / 255 + 1 / 510 + 1e-6
    assert bits[real > 0.5].equal((real[real > 0.5] * 255).round().to(torch.uint8))


def test_one_noise_a_class():
    x, y = images(24)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(400, 11))  # noqa: E731
    made = Salm(**{**QUICK, "density": 0.1, "classwise": True}).protect(x, y * 2, net)  # labels 0, 2, ... 10
    assert made.delta.shape == (6, 1, 20, 20) and made.mask.keep.flatten(1).sum(1).tolist() == [40] * 6
    assert made.row.tolist() == y.tolist() and made.images8.shape == x.shape
    assert not (made.delta != 0).any(1)[~made.mask.keep].any()


def test_a_saved_state_goes_on_to_the_bit_and_fits_its_images_only(tmp_path):
    x, y = images()
    method = Salm(**{**QUICK, "density": 0.1})
    whole = method.protect(x, y, build, seed=1)
    run = method.start(x, y, build, seed=1)
    run.round()
    run.save(tmp_path / "state.safetensors")
    again = method.start(x, y, build, seed=1)
    again.load(tmp_path / "state.safetensors")
    while not again.done:
        again.round()
    assert again.result().delta.equal(whole.delta) and again.result().mask.equal(whole.mask) and again.rounds == 3
    for other in (method.start(x, y.flip(0), build, seed=1), method.start(x, y, build, seed=2)):
        with pytest.raises(BadInput, match="other images"):
            other.load(tmp_path / "state.safetensors")
    net = method.start(x, y, lambda: nn.Sequential(nn.Flatten(), nn.Linear(400, 6)), seed=1)
    with pytest.raises(BadInput, match="another network"):
        net.load(tmp_path / "state.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(BadInput, match="not the state"):
        again.load(tmp_path / "junk")


def test_augmentation_reaches_the_noise_and_dropout_is_seeded():
    x, y = images()
    method, seen = Salm(**{**QUICK, "density": 0.1}), []

    def flipped(z, rng):
        seen.append(int(torch.randint(2, (), generator=rng)))
        return z.flip(-1) if seen[-1] else z

    noisy = lambda: nn.Sequential(build(), nn.Dropout(0.3))  # noqa: E731
    one, two = (method.protect(x, y, noisy, augment=flipped).delta for _ in range(2))
    assert one.equal(two) and not one.equal(method.protect(x, y, noisy).delta) and set(seen) == {0, 1}


def test_bad_input_is_refused():
    x, y = images()
    for settings in (
        {"eps": 0.0},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"density": 0.0},
        {"rate": 0.0},
        {"stop": 2.0},
        {"rounds": 0},
    ):
        with pytest.raises(BadInput):
            Salm(**settings)
    wrong = [
        (x.float(), y, "0, 1"),
        (x.float() / 255 - 0.1, y, "0, 1"),
        (x.float() * float("nan"), y, "0, 1"),
        (x[0], y, "shape"),
    ]
    wrong += [
        (x, None, "labels"),
        (x, y[:5], "labels"),
        (x, y.float(), "labels"),
        (x, -y, "labels"),
        (x, y * 0, "one label"),
    ]
    for bad_x, bad_y, says in (*wrong, (x, y + 1, "labels go up to 6")):
        with pytest.raises(BadInput, match=says):
            Salm(**QUICK).protect(bad_x, bad_y, build)
    with pytest.raises(BadInput, match="keeps none"):
        Salm(density=0.001).protect(x, y, build)
    with pytest.raises(BadInput, match="loss is"):
        Salm(**QUICK).protect(x, y, build, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))


def test_faint_textures_are_as_stated():
    x, y = faint_textures(60, 0)
    assert x.shape == (60, 1, 20, 20) and x.dtype == torch.uint8 and y.bincount().tolist() == [10] * 6
    assert 0.58 < float((x == 0).float().mean()) < 0.62 and x.equal(faint_textures(60, 0)[0])
    assert not x.equal(faint_textures(60, 1)[0])
