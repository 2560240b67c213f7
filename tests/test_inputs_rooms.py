"""The contract of the inputs place: generated from the cards, every room passes it without a line of its own."""

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.method import methods
from maskwright.core.select import generator
from maskwright.inputs import InputMethod

CARDS = methods("inputs")
RANDOM = [c for c in CARDS if c.contract.selects == "random"]
SCORE = [c for c in CARDS if c.contract.selects == "score"]
SHAPE = (3, 8, 8)
ids = pytest.mark.parametrize


def made(card):
    return card.load()(**card.contract.tiny)


@ids("card", CARDS, ids=lambda c: c.slug)
def test_it_is_an_input_method_that_says_how_its_masks_were_made(card):
    method = made(card)
    assert isinstance(method, InputMethod)
    told = method.made_by(3)
    assert told["method"] == card.slug and told["seed"] == 3 and set(told["settings"]) == set(method.__dataclass_fields__)


@ids("card", RANDOM, ids=lambda c: c.slug)
def test_random_masks_are_drawn_for_the_shape_alone(card):
    method, x = made(card), torch.zeros(SHAPE)
    mask = method.keep(x, rng=generator(1))
    assert isinstance(mask, Mask) and mask.check().shape[-len(SHAPE) :] == SHAPE
    assert mask.equal(method.keep(x + 5, rng=generator(1))) and not mask.equal(method.keep(x, rng=generator(2)))
    counts = mask.keep.flatten(-2).sum(-1)
    if mask.pattern.fixed is None and "bernoulli" not in card.pattern.lower():
        assert len(counts.unique()) == 1
    assert 0 < mask.count < mask.keep.numel()


@ids("card", SCORE, ids=lambda c: c.slug)
def test_kept_are_the_best_of_each_sample_and_nan_is_refused(card):
    method, x = made(card), torch.rand(SHAPE, generator=generator(0))
    mask = method.keep(x)
    assert isinstance(mask, Mask)
    for score, keep in zip(x, mask.check().keep, strict=True):
        assert score[keep].min() > score[~keep].max()
    assert mask.equal(method.keep(x)) and len(mask.keep.flatten(1).sum(1).unique()) == 1
    with pytest.raises(BadInput, match="NaN"):
        method.keep(x * float("nan"))


@ids("card", CARDS, ids=lambda c: c.slug)
def test_the_mask_is_hard_unless_the_card_says_soft(card):
    if card.contract.selects == "own":
        return
    kind = SoftMask if card.soft else Mask
    assert isinstance(made(card).keep(torch.rand(SHAPE, generator=generator(0)), rng=generator(0)), kind)
