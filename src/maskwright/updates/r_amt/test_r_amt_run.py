"""R-AMT's run from attaching to its end: learning, leaving, merging, saving, going on, and the report."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.core.select import generator
from maskwright.updates.r_amt import RAmt
from maskwright.updates.r_amt.test_r_amt import X, Y, losses, same, state, vit
from maskwright.weights import bake


def tuned(model, method=RAmt(drop_lambda=0.5), steps=12, seed=0):  # noqa: B008
    """An attached model after some steps with a large rate; the caller leaves the context."""
    context = method.attach(model, seed=seed)
    run = context.__enter__()
    optimizer = torch.optim.Adam(run.trainable, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        run.backward(*losses(run, model))
        optimizer.step()
    return context, run


def test_it_learns_leaves_the_weights_alone_and_removing_it_restores_the_base():
    model = vit()
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    before, plain = state(model), model(X).detach()
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    first = F.cross_entropy(plain, Y).item()
    context, run = tuned(model)
    assert F.cross_entropy(model(X), Y).item() < first
    assert 0 < run.report().dropped < run.masks().total and run.report().flips >= run.report().dropped
    assert all(torch.equal(site.value, before[name]) for name, site in run.found.items())
    model.eval()
    context.__exit__(None, None, None)
    assert same(state(model), before) and torch.equal(model(X), plain)
    assert [p.requires_grad for p in model.parameters()] == flags and [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [type(m) for m in model.modules()] and not any(hasattr(m, "parametrizations") for m in model.modules())


def test_a_saved_mask_gives_the_same_logits_on_the_base_and_so_does_merge(tmp_path):
    model = vit()
    context, run = tuned(model)
    logits = model(X).detach()
    run.masks().check().save(tmp_path / "m.safetensors")
    keys = list(vit().state_dict())
    run.merge()
    assert torch.equal(model(X), logits)
    with pytest.raises(BadInput, match="merged"), run.original():
        raise AssertionError
    context.__exit__(None, None, None)
    assert torch.equal(model(X), logits) and list(model.state_dict()) == keys
    masks = MaskSet.load(tmp_path / "m.safetensors")
    base = vit()
    assert masks.equal(run.masks()) and masks.same_base(base) and not masks.same_base(model)
    assert torch.equal(bake(base, masks)(X), logits) and same(state(base), state(model))
    assert masks.made_by["method"] == "r_amt" and masks.made_by["settings"]["where"] == ["attention"]
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask.keep] == 0).all()


def test_same_seed_same_run_other_seed_other_run_and_a_run_resumes_from_its_state_dict():
    made = [tuned(vit(), seed=seed) for seed in (0, 0, 1)]
    scores = [[m.detach().clone() for m in run.trainable] for _, run in made]
    assert all(torch.equal(x, y) for x, y in zip(scores[0], scores[1], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(scores[0], scores[2], strict=True))
    held = copy.deepcopy(made[0][1].model.state_dict())
    assert any(key.endswith("query.parametrizations.weight.0.scores") for key in held)
    other = vit(seed=5)
    with RAmt().attach(other) as run:
        other.load_state_dict(held)
        assert all(torch.equal(x, m) for x, m in zip(scores[0], run.trainable, strict=True))
        assert torch.equal(other(X), made[0][1].model(X))
    for context, _ in made:
        context.__exit__(None, None, None)


def test_buffers_come_back_unless_merged():
    for merge in (False, True):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        with RAmt(where="0.weight").attach(model) as run:
            model(torch.randn(8, 4, generator=generator(0)) + 3)
            if merge:
                run.merge()
        assert (model[1].num_batches_tracked == 1) == merge and (model[1].running_mean != 0).any() == merge


def test_flips_count_both_ways_and_the_report_reads_as_text():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with RAmt(where="weight").attach(model) as run, torch.no_grad():
        assert run.report().flips == 0
        run.trainable[0][0] = 0.0
        assert run.report().flips == 2 and run.report().dropped == 2
        run.trainable[0][0, 0] = 0.01
        assert run.report().flips == 3 and run.report().dropped == 1 and run.report().density == 0.75
        assert "0.weight: 1 of 4 off" in str(run.report())
