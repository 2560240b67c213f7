"""SALM with what a user may give it: networks that fail or do not fit, arrays, names of files as plain strings."""

import numpy as np
import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.inputs.perturbation import Ball
from maskwright.inputs.salm import Salm
from maskwright.inputs.salm.faint import faint_textures

QUICK = Salm(rounds=1, noise_steps=1, model_steps=1, batch=8)
X, Y = faint_textures(18, 3)


def fits():
    return nn.Sequential(nn.Flatten(), nn.Linear(400, 6))


def too_wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(401, 6))


def raising():
    raise KeyError("weights.pt")


def no_module():
    return [nn.Linear(400, 6)]


def frozen():
    return fits().requires_grad_(False)


class Wrapped(nn.Module):
    """Gives what is no tensor, as transformers' models do."""

    def __init__(self, answer):
        super().__init__()
        self.line, self.answer = nn.Linear(400, 6), answer

    def forward(self, x):
        return self.answer(self.line(x.flatten(1)))


def of_two(x):
    return {"logits": x}


def folded():
    return Wrapped(of_two)


def flat():
    return Wrapped(lambda x: x[:0])


def backwards(x, rng):
    return x.flip(1).view(7)


@pytest.mark.parametrize(
    ("build", "given", "says"),
    [
        (raising, {}, r"raising\(\) raises KeyError: 'weights.pt'"),
        (no_module, {}, r"no_module\(\) gives a list"),
        (frozen, {}, r"frozen\(\) gives a network without a parameter"),
        (too_wide, {}, r"the network of too_wide\(\) on images of shape \(1, 1, 20, 20\) raises RuntimeError: mat1"),
        (folded, {}, "the surrogate gives a dict"),
        (flat, {}, r"the surrogate gives \(0, 6\) for 1 images"),
        (fits, {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=-1.0)}, "lr|learning rate"),
        (fits, {"augment": backwards}, r"backwards of images of shape \(8, 1, 20, 20\) raises RuntimeError"),
    ],
)
def test_what_a_users_network_raises_is_one_line_that_names_it(build, given, says):
    with pytest.raises(BadInput, match=says) as caught:
        QUICK.protect(X, Y, build, **given)
    assert "\n" not in str(caught.value)


def test_the_first_look_at_an_image_leaves_the_network_as_it_was():
    def build():
        net = nn.Sequential(nn.Conv2d(1, 4, 20), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 6))
        net[1].eval()
        return net

    torch.manual_seed(0)
    before, run = build(), QUICK.start(X, Y, build)
    assert [m.training for m in run.model.modules()] == [m.training for m in before.modules()]
    state = run.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())


def test_the_same_round_with_plus_for_minus_raises_the_loss(monkeypatch):
    right, method = Ball.descend, Salm(rounds=1, noise_steps=5, model_steps=1, batch=8)

    def wrong(self, delta, gradient, mask, size, x=None):
        return right(self, delta, gradient, mask, -size, x)

    losses = []
    for step in (right, wrong):
        monkeypatch.setattr(Ball, "descend", step)
        run = method.start(X, Y, fits, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-12))
        run.round()
        made = run.result()
        with torch.no_grad():
            before, after = (
                nn.functional.cross_entropy(run.model(x), Y, reduction="none") for x in (X.float() / 255, made.images)
            )
        losses.append(after - before)
    assert (losses[0] < 0).all() and (losses[1] > 0).all()


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [(X.numpy(), Y, "images are a tensor"), (X, np.asarray(Y), "labels are a"), (X, Y.tolist(), "labels")],
)
def test_arrays_and_lists_are_refused(x, y, says):
    with pytest.raises(BadInput, match=says):
        QUICK.protect(x, y, fits)


def test_files_may_be_named_by_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, again = (QUICK.start(X, Y, fits, seed=1) for _ in range(2))
    run.round()
    run.save("state.safetensors")
    again.load("state.safetensors")
    assert again.rounds == 1 and again.delta.equal(run.delta)
