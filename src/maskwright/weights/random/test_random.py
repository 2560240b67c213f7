import torch
from torch import nn

from maskwright.weights.random import Random


def test_seed_and_name_decide_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    first = Random(density=0.25).masks(model, seed=3)
    torch.rand(7)  # the global generator is not looked at
    nn.init.zeros_(model[0].weight)  # nor are the weights
    assert first.equal(Random(density=0.25).masks(model, seed=3))
    assert not first.equal(Random(density=0.25).masks(model, seed=4))
    assert not torch.equal(first["0.weight"].keep, first["2.weight"].keep)
    alone = Random(density=0.25, where=("2.weight",)).masks(model, seed=3)
    assert torch.equal(alone["2.weight"].keep, first["2.weight"].keep)
    assert (first["0.weight"].keep.sum(1) == 4).all()


def test_erk_keeps_the_exact_total() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 32), nn.Linear(32, 4))
    masks = Random(density=0.2, within="tensor", budget="erk").masks(model)
    assert masks.count == round(0.2 * masks.total)
    assert masks["2.weight"].density if "2.weight" in masks else masks["1.weight"].density > masks["0.weight"].density
