"""rigl: counts constant, dropped weights and moments exactly 0, growth where it should be."""

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.weights import training
from maskwright.weights.rigl import RigL as Method


def test_count_moments_and_fraction():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    method = Method(density=0.3, every=2, total=40)
    weight = model[0].weight
    with training(model, optimizer, method, seed=5) as run:
        count = run.masks.count
        for step in range(40):
            optimizer.zero_grad()
            x = torch.randn(16, 20, generator=generator(step))
            model(x).square().mean().backward()
            optimizer.step()
            dropped = ~run.masks["0.weight"].keep
            assert run.masks.count == count == 180
            assert (weight[dropped] == 0).all()
            assert all((s[dropped] == 0).all() for s in optimizer.state[weight].values() if s.shape == weight.shape)
        assert sum(run.moved[30:]) == 0 < sum(run.moved) and run.itop > 0.3
    assert method.schedule(2) == pytest.approx(0.3, rel=0.05) and method.schedule(3) is None and method.schedule(30) is None


def test_bad_settings():
    for wrong in ({"density": 0.0}, {"every": 0}, {"fraction": 1.5}, {"budget": "luck"}):
        with pytest.raises(BadInput):
            Method(**wrong)
