"""The sheet's exact checks of essential sparsity."""

import numpy as np
import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.weights.essential_sparsity import EssentialSparsity
from maskwright.weights.essential_sparsity.method import broken_line_knee, tolerance_knee


class Two(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([v])) for v in (a, b))


def dropped(a, b, **settings):
    masks = EssentialSparsity(density=0.5, where=("a", "b"), **settings).masks(Two(a, b))
    return [
        [v for v, k in zip(values, masks[n].keep[0].tolist(), strict=True) if not k] for n, values in (("a", a), ("b", b))
    ]


def test_tiny_global_and_layer_scope():
    assert dropped([0.1, -0.4], [0.3, 0.2]) == [[0.1], [0.2]]
    assert dropped([0.1, -0.4], [0.3, 0.2], within="tensor") == [[0.1], [0.2]]
    assert dropped([0.1, 0.15], [0.3, 0.2]) == [[0.1, 0.15], []]
    assert dropped([0.1, 0.15], [0.3, 0.2], within="tensor") == [[0.1], [0.2]]


def test_nested_exact_counts_and_scale():
    model = nn.Sequential(nn.Linear(17, 13), nn.Linear(13, 11), nn.Linear(11, 3))
    before = [p.clone() for p in model.parameters()]
    sets = {d: EssentialSparsity(density=d).masks(model) for d in (1.0, 0.7, 0.3, 0.1, 0.0)}
    total = 17 * 13 + 13 * 11
    assert [s.count for s in sets.values()] == [round(d * total) for d in sets]
    assert all((sets[0.3][n] - sets[0.7][n]).count == 0 for n in sets[0.3])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    share = sets[0.3]["0.weight"].density
    with torch.no_grad():
        model[0].weight.mul_(10)
    assert EssentialSparsity(density=0.3).masks(model)["0.weight"].density > share
    with torch.no_grad():
        model[1].weight.mul_(10)
    assert EssentialSparsity(density=0.3).masks(model).equal(sets[0.3])


def test_ties_fall_in_site_order():
    assert dropped([1.0, 1.0], [1.0, 1.0]) == [[], [1.0, 1.0]]


def test_knees_of_a_known_curve():
    s = np.arange(0, 1.0001, 0.05)
    q = np.where(s <= 0.4, 1.0, 1 - 2 * (s - 0.4))
    assert tolerance_knee(s, q) == pytest.approx(0.405, abs=1e-9)
    fit = broken_line_knee(s, q)
    assert fit.knee == pytest.approx(0.4, abs=0.005) and fit.sharp
    with pytest.raises(BadInput):
        tolerance_knee([0, 0], [1, 1])


def test_finetuning_under_the_mask_keeps_dropped_weights_at_zero():
    from maskwright.weights import attach

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    masks = EssentialSparsity(density=0.4).prune(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with attach(model, masks):
        for _ in range(5):
            model(torch.randn(4, 8, generator=generator(0))).square().mean().backward()
            optimizer.step()
    assert (model[0].weight[~masks["0.weight"].keep] == 0).all()


def test_every_point_of_a_sweep_starts_from_the_same_dense_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    assert len({EssentialSparsity(density=d).masks(model).base for d in (1.0, 0.6, 0.2)}) == 1


def test_density_zero_drops_everything_and_a_layer_scope_ignores_scale():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    layer = EssentialSparsity(density=0.4, within="tensor").masks(model)
    with torch.no_grad():
        model[0].weight.mul_(8)
    assert EssentialSparsity(density=0.4, within="tensor").masks(model).equal(layer)
    assert EssentialSparsity(density=0.0).prune(model).count == 0 and not model[0].weight.any()
