"""Masked modelling over tokens: which token meets which target, what the losses touch, and what is shown."""

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import Exact, Learner, Views, patches, spread
from maskwright.inputs.mae import Mae
from maskwright.inputs.pretraining import Pretrain, Recipe
from maskwright.inputs.targets import TARGETS, made, normalised, painted, target_of
from maskwright.inputs.token_learner import TokenLearner, decoder_for
from maskwright.inputs.vit import SmallVit

X = torch.rand(3, 2, 16, 16, generator=generator(0))


def vit(seed=0):
    return SmallVit(16, 4, channels=2, width=16, layers=1, heads=2, seed=seed)


def numbered(images, patch):
    """Token t of image b is told b * 100 + t: any mix-up shows."""
    tokens = (images.shape[2] // patch) * (images.shape[3] // patch)
    return (torch.arange(len(images))[:, None] * 100.0 + torch.arange(tokens)).unsqueeze(-1)


class Witness(nn.Module):
    def forward(self, kept, target):
        self.kept, self.target = kept, target
        return kept.mean()


def learner(draw, target=numbered, **settings):
    model = vit()
    net = decoder_for(model, X, target, width=8, layers=1, heads=2, seed=0)
    return TokenLearner(model, net, target, draw, **settings)


def test_kept_tokens_meet_their_own_targets_in_every_view():
    sampler, witness = Views(0.5, 2, 1.0), Witness()
    one = learner(lambda shape, rng: sampler(shape, rng=rng), aside=witness)
    parts = one.parts(X, generator(1))
    assert parts.mask.shape == (6, 4, 4) and parts.visible is not None
    for row in range(6):
        want = [(row % 3) * 100.0 + t for t in range(16) if parts.mask.keep.flatten(1)[row, t]]
        assert witness.target[row].flatten().tolist() == want
    # and the features in those places are those of the same images' tokens
    alone = one.encoder.blocks(one.encoder.embed(X)[1:2].gather(1, _index(parts.mask, 4).expand(-1, -1, 16)))
    assert torch.allclose(witness.kept[4], one.encoder.norm(alone)[0], atol=1e-6)


def _index(mask, row):
    return mask.keep.flatten(1)[row].nonzero().flatten()[None, :, None]


def test_the_loss_is_the_mean_square_over_hidden_tokens_and_touches_nothing_else():
    one = learner(lambda shape, rng: Exact(0.25)(shape, rng=rng), normalised)
    given = []
    one.decoder.register_forward_hook(lambda _, __, out: given.append(out) or out.retain_grad())
    parts = one.parts(X, generator(2))
    parts.masked.backward()
    gone = ~parts.mask.keep.flatten(1)
    assert gone.sum(1).tolist() == [12, 12, 12] and parts.visible is None
    want = (given[0] - normalised(X, 4))[gone].square().mean()
    assert torch.allclose(parts.masked, want)
    touched = given[0].grad.abs().sum(-1)
    assert (touched[~gone] == 0).all() and (touched[gone] > 0).all()
    assert torch.equal(one.loss(X, generator(2)), parts.masked)


def test_theta_weighs_the_second_branch():
    loss = {
        theta: learner(lambda s, rng: Exact(0.5)(s, rng=rng), aside=Witness(), theta=theta).loss(X, generator(3))
        for theta in (0.0, 1.0, 3.0)
    }
    assert torch.allclose(loss[3.0] - loss[0.0], 3 * (loss[1.0] - loss[0.0]), rtol=1e-3)


def test_patches_of_one_value_cannot_be_normalised():
    assert normalised(X, 1).shape == (3, 256, 2)  # two channels are two values
    with pytest.raises(BadInput, match=r"\(3, 1, 16, 16\) in patches of 1 x 1 have one value a patch"):
        normalised(X[:, :1], 1)


def test_normalised_patches_by_hand():
    image = torch.tensor([[[[1.0, 3.0, 5.0, 5.0], [5.0, 7.0, 5.0, 5.0]]]])
    rows = normalised(image, 2)  # mean 4, unbiased variance 20 / 3; an even patch gives 0
    assert torch.allclose(rows[0, 0], torch.tensor([-3.0, -1.0, 1.0, 3.0]) / (20 / 3 + 1e-6) ** 0.5)
    assert torch.equal(rows[0, 1], torch.zeros(4))


def test_right_answers_paint_the_image():
    mask = Exact(0.25)((3, 4, 4), rng=generator(4))
    for name in ("pixels", "normalised"):
        assert torch.allclose(painted(X, mask, TARGETS[name](X, 4), TARGETS[name], 4), X, atol=1e-5)
    # gradients say no pixels: a hidden patch gets the seen patch that is nearest
    twice = torch.cat([X, X])
    half = Mask(torch.cat([mask.keep, ~mask.keep]))
    assert torch.equal(painted(twice, half, TARGETS["hog"](twice, 4), TARGETS["hog"], 4), twice)
    wrong = painted(X, mask, TARGETS["hog"](X.flip(0), 4), TARGETS["hog"], 4)
    keep = spread(mask.keep, (16, 16))[:, None].expand_as(X)
    assert torch.equal(wrong[keep], X[keep]) and not torch.equal(wrong[~keep], X[~keep])
    known = {tuple(p.tolist()) for p in patches(X, 4)[mask.keep.flatten(1)]}
    assert all(tuple(p.tolist()) in known for p in patches(wrong, 4)[~mask.keep.flatten(1)])


def test_what_is_shown_and_what_a_probe_reads():
    one = Mae(density=0.5).learner(vit(), X)
    assert isinstance(one, Learner)
    shown = one.reconstruct(X, generator(5))
    keep = spread(Exact(0.5)((3, 4, 4), rng=generator(5)).keep, (16, 16))[:, None].expand_as(X)
    assert torch.equal(shown.images, X) and torch.equal(shown.filled[keep], X[keep])
    grey = X.mean((0, 2, 3), keepdim=True).expand_as(X)
    assert torch.equal(shown.hidden[keep], X[keep]) and torch.equal(shown.hidden[~keep], grey[~keep])
    assert not shown.filled.requires_grad and torch.equal(one.features(X), one.backbone(X))


def test_it_trains_and_the_backbone_loads_into_a_fresh_one():
    model, images = vit(), (X * 255).to(torch.uint8)
    before = model.inlet.weight.detach().clone()
    one = Mae(density=0.5, target="pixels").learner(model, X)
    assert len(list(one.parameters())) == len(list(model.parameters())) + len(list(one.decoder.parameters()))
    run = Pretrain(one, 3, lambda at: images[at], Recipe(steps=30, batch=3, lr=3e-3, crop=1.0, flip=False))
    losses = list(run.steps())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and not torch.equal(model.inlet.weight, before)
    fresh = vit(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), one.features(X))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="unknown target 'hogs'; known: pixels, normalised, hog"):
        target_of("hogs")
    with pytest.raises(BadInput, match=r"has shape \(3, 4\), not \(3, 16, features\)"):
        made(lambda images, patch: torch.zeros(3, 4), X, 4)
    with pytest.raises(BadInput, match=r"NaN or infinite at \(0, 0, 0\)"):
        made(lambda images, patch: numbered(images, patch) / 0.0, X, 4)
    with pytest.raises(BadInput, match=r"takes images \(batch, 2, 16, 16\)"):
        Mae().learner(vit(), torch.zeros(1, 2, 20, 20))
    with pytest.raises(BadInput, match="Linear cannot run on a part of its tokens"):
        Mae().learner(nn.Linear(2, 2), X)
    with pytest.raises(BadInput, match=r"3 images of 4 x 4 tokens has shape \(3, 16\)"):
        learner(lambda shape, rng: Exact(0.5)((3, 16), rng=rng)).loss(X, generator(0))
    with pytest.raises(BadInput, match="keeps no entry"):
        Mae(density=1.0).learner(vit(), X).loss(X, generator(0))
    broken = X.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        Mae(density=0.5).learner(vit(), X).loss(broken, generator(0))
