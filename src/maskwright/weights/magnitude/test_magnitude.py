import torch
from torch import nn

from maskwright.weights.magnitude import Magnitude


def test_exact_counts_by_hand_with_ties_to_the_lower_index() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.4, 0.4, 0.4], [1.0, 2.0, -3.0, 0.0]]))
    row = Magnitude(density=0.5).masks(layer)["weight"].keep
    assert row.tolist() == [[False, True, True, False], [False, True, True, False]]
    whole = Magnitude(density=0.5, within="tensor").masks(layer)["weight"].keep
    assert whole.tolist() == [[False, True, False, False], [True, True, True, False]]
    assert Magnitude(density=0.25, pattern="1:4").masks(layer)["weight"].keep.nonzero().tolist() == [[0, 1], [1, 2]]


def test_all_equal_weights_still_give_the_exact_count() -> None:
    layer = nn.Linear(10, 10, bias=False)
    nn.init.ones_(layer.weight)
    for percent in (0, 1, 37, 99, 100):
        mask = Magnitude(density=percent / 100, within="tensor").masks(layer)["weight"]
        assert mask.count == percent
