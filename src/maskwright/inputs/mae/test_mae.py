"""MAE: exact counts for every image, hidden pixels are only ever targets, sizes are refused early."""

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.mae import Mae
from maskwright.inputs.vit import SmallVit


def test_counts_are_exact_where_floats_are_not():
    # int(100 * (1 - 0.8)) is 19 and int(10 * (1 - 0.9)) is 0 in floating point
    for tokens, density, kept in ((100, 0.2, 20), (10, 0.1, 1), (196, 0.25, 49), (64, 0.4, 26)):
        mask = Mae(density=density).keep(torch.zeros(5, tokens), rng=generator(0))
        assert mask.keep.sum(1).tolist() == [kept] * 5


def test_a_step_encodes_as_many_tokens_as_are_kept():
    model, x = SmallVit(16, 4, channels=1, width=16, layers=1, heads=2), torch.rand(2, 1, 16, 16, generator=generator(1))
    one = Mae(density=0.25, decoder_layers=1, decoder_width=12, decoder_heads=2).learner(model, x)
    sizes = []
    model.layers[0].register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    one.decoder.layers[0].register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    one.loss(x, generator(0))
    assert sizes == [(2, 4, 16), (2, 16, 12)]


def test_the_same_seed_gives_the_same_learner_and_mask():
    x = torch.rand(2, 1, 16, 16, generator=generator(1))

    def loss(seed):
        return Mae(density=0.25).learner(SmallVit(16, 4, channels=1, width=16, layers=1), x, seed=seed).loss(x, generator(0))

    assert torch.equal(loss(0), loss(0)) and not torch.equal(loss(0), loss(1))
    assert Mae().keep(torch.zeros(2, 4, 4)).equal(Mae().keep(torch.ones(2, 4, 4)))


def test_settings_that_make_no_sense():
    for bad in ({"density": 0.0}, {"decoder_layers": 0}, {"decoder_width": -1}, {"decoder_heads": 0}, {"target": "image"}):
        with pytest.raises(BadInput):
            Mae(**bad)
    with pytest.raises(BadInput, match="keeps none of the 4 units"):
        Mae(density=0.1).keep(torch.zeros(1, 4))
