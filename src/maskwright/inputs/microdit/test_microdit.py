"""Exact checks of the deferred mask and the transformer around it (2407.15811)."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.microdit import DeferredMask, MicroDit, deferred
from maskwright.inputs.microdit.build import inner, scaled
from maskwright.inputs.microdit.conditions import Captions
from maskwright.inputs.microdit.dit import positions
from maskwright.inputs.microdit.ffn import Experts, SwiGlu
from maskwright.inputs.patches import patches, spread

TINY = {"patch": 4, "width": 16, "depth": 2, "head": 8, "mixer_depth": 2, "mixer_width": 16, "multiple": 8, "experts": 0}
SHAPE = (1, 32, 32)  # 64 tokens


def rough(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random: past the start, where gates and the last map are 0."""
    rng = generator(seed, "rough")
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
    return module


def made(seed: int = 0, **settings):
    return rough(MicroDit(**{**TINY, **settings}).denoiser(SHAPE, classes=10, seed=seed)).train()


def batch(n: int = 2):
    rng = generator(5, "batch")
    return torch.randn(n, *SHAPE, generator=rng), torch.tensor([0.5] * n), torch.arange(n)


def test_at_density_1_the_masked_path_is_not_entered_and_all_is_the_plain_model(monkeypatch):
    masked, (x, sigma, y) = made(density=1.0), batch()
    plain = made(density=0.25).eval()
    monkeypatch.setattr(deferred, "visible", lambda *_: pytest.fail("the masked path was entered"))
    out, mask = masked(x, sigma, y, rng=generator(0))
    assert mask is None and torch.equal(out, plain(x, sigma, y)[0])
    assert torch.equal(plain(x, sigma, y, rng=generator(0))[0], out)  # a generator in eval mode draws nothing
    assert torch.equal(masked.loss(x, y, generator(1)), plain.loss(x, y, generator(1)))
    masked.net.trunk.density = 0.25
    with pytest.raises(pytest.fail.Exception):
        masked(x, sigma, y, rng=generator(0))


@pytest.mark.parametrize("mixer_width", [16, 8])
def test_with_nothing_masked_it_is_a_plain_chain_of_inlet_mixer_blocks_and_outlet(mixer_width):
    model, (x, sigma, y) = made(density=1.0, mixer_width=mixer_width), batch()
    net, trunk = model.net, model.net.trunk
    angle = sigma[:, None] * net.waves
    condition = net.time(torch.cat([angle.cos(), angle.sin()], 1)) + net.conditioner.table(y)
    hidden = net.inlet(patches(x, 4)) + net.positions
    *blocks, outlet = trunk.blocks
    assert len(trunk.mixer) == (2 if mixer_width == 16 else 3) and len(blocks) == len(trunk.mixer)
    for block in (*trunk.mixer, *blocks):
        hidden = block(hidden, condition)
    shift, scale = outlet.modulation(condition).chunk(2, -1)
    told = outlet.linear(outlet.norm(hidden) * (1 + scale[:, None]) + shift[:, None])
    want = torch.zeros(2, *SHAPE)
    for token in range(64):
        row, column = 4 * (token // 8), 4 * (token % 8)
        want[:, 0, row : row + 4, column : column + 4] = told[:, token].view(2, 4, 4)
    for rng in (generator(0), None):
        assert torch.equal(net(x, sigma, y, rng=rng)[0], want)


def test_a_mixer_of_depth_0_is_naive_masking_to_the_bit():
    model, (x, sigma, y) = made(mixer_depth=0), batch()
    net, trunk = model.net, model.net.trunk
    assert not len(trunk.mixer)
    mask = trunk.draw(2, 64, generator(3))
    out, used = net(x, sigma, y, mask=mask)
    assert used is mask and torch.equal(net(x, sigma, y, rng=generator(3))[0], out)  # drawn from the same noise
    tokens, seen = net.inlet(patches(x, 4)) + net.positions, mask.keep.nonzero()[:, 1].view(2, 16)
    angle = sigma[:, None] * net.waves
    condition = net.time(torch.cat([angle.cos(), angle.sin()], 1)) + net.conditioner.table(y)
    kept = torch.stack([tokens[row, seen[row]] for row in range(2)])
    for block in trunk.blocks:
        kept = block(kept, condition)
    want = torch.zeros(2, 64, 16)
    for row in range(2):
        want[row, seen[row]] = kept[row]
    assert torch.equal(patches(out, 4), want)


def gradient(model, keep: torch.Tensor, x, y):
    """|d loss / d x_n| of each patch, (batch, tokens)."""
    noisy = (x + 0.1).requires_grad_()
    sigma, mask = torch.tensor([0.4, 2.0]), Mask(keep)
    model.scored(model(noisy, sigma, y, mask=mask)[0], x, sigma, mask).backward()
    return patches(noisy.grad, 4).abs().amax(2)


def test_gradients_reach_removed_patches_through_the_mixer_and_never_without_it():
    (x, _, y), keep = batch(), torch.rand(2, 64, generator=generator(2)).argsort(1) < 16
    through, naive = (gradient(made(mixer_depth=depth), keep, x, y) for depth in (2, 0))
    assert (through > 0).all()
    assert (naive[~keep] == 0).all() and (naive[keep] > 0).all()


def test_the_loss_does_not_see_what_was_removed():
    model, (x, sigma, y) = made(), batch()
    mask = model.net.trunk.draw(2, 64, generator(4))
    noisy = torch.randn(x.shape, generator=generator(6))
    out = model(noisy, sigma, y, mask=mask)[0]
    loss = model.scored(out, x, sigma, mask)
    gone = ~spread(mask.keep.view(2, 8, 8), (32, 32)).unsqueeze(1)
    for there in (x + 100.0, torch.full_like(x, torch.nan)):
        assert torch.equal(model.scored(out, torch.where(gone, there, x), sigma, mask), loss)
    assert not torch.equal(model.scored(out, torch.where(gone, x, x + 1), sigma, mask), loss)
    each = (out - x).square() * model.noise.weight(sigma).view(2, 1, 1, 1)
    hand = torch.stack([patches(each, 4)[row, mask.keep[row]].mean() for row in range(2)]).mean()
    assert torch.allclose(loss, hand, rtol=1e-5)  # a sample's kept patches, never all 64, make its mean


def test_kept_tokens_come_back_in_place_and_removed_outputs_are_0():
    model, (x, sigma, y) = made(), batch()
    mask = model.net.trunk.draw(2, 64, generator(4))
    gone = ~spread(mask.keep.view(2, 8, 8), (32, 32)).unsqueeze(1)
    told = model.net(x, sigma.log() / 4, y, mask=mask)[0]
    assert (told[gone] == 0).all() and (told[~gone] != 0).all()
    skip = model.noise.data**2 / (sigma.view(-1, 1, 1, 1) ** 2 + model.noise.data**2) * x
    assert torch.equal(model(x, sigma, y, mask=mask)[0][gone], skip[gone])
    same = DeferredMask([], [nn.Identity()])
    tokens = torch.randn(2, 64, 3, generator=generator(7))
    assert torch.equal(same(tokens, mask=mask)[0], tokens * mask.keep.unsqueeze(-1))


@given(tokens=st.integers(1, 300), hundredths=st.integers(1, 99), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_sample_keeps_exactly_its_count(tokens, hundredths, seed):
    trunk, want = DeferredMask([], [], hundredths / 100), round(Fraction(hundredths * tokens, 100))
    if not want:
        with pytest.raises(BadInput, match="keeps none"):
            trunk.draw(3, tokens, generator(seed))
        return
    assert trunk.draw(3, tokens, generator(seed)).keep.sum(1).tolist() == [want] * 3


def test_counts_by_hand():
    assert int(100 * (1 - 0.8)) == 19  # the reference's count
    assert MicroDit(density=0.2).keep(torch.empty(1, 10, 10), rng=generator(0)).count == 20
    assert MicroDit().keep(torch.empty(3, 256), rng=generator(0)).keep.sum(1).tolist() == [64] * 3
    first, again, other = (MicroDit().keep(torch.empty(3, 256), rng=generator(seed)).keep for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)  # 0 is a seed like any other


def test_a_mixer_with_closed_gates_is_the_identity_unless_it_reads_captions():
    classes, captions = (
        MicroDit(**TINY).denoiser(SHAPE, **kind, seed=1).net.trunk for kind in ({"classes": 10}, {"captions": 6})
    )
    tokens, condition, context = (torch.randn(2, *side, generator=generator(8)) for side in ((64, 16), (16,), (5, 16)))
    for block in classes.mixer:
        assert torch.equal(block(tokens, condition, None), tokens)
    for block in captions.mixer:
        assert not torch.equal(block(tokens, condition, context), tokens)  # cross attention has no gate
        nn.init.zeros_(block.cross.out.weight)
        assert torch.equal(block(tokens, condition, context), tokens)


def test_any_token_model_and_rows_that_go_along():
    class Rowed(nn.Module):
        def forward(self, x, scale, *, row):
            return torch.cat([x * scale, row], -1)[..., -3:]

    tokens, row = torch.randn(2, 8, 3, generator=generator(1)), torch.randn(2, 8, 1, generator=generator(2))
    trunk = DeferredMask([Rowed()], [Rowed()], 0.5)
    out, mask = trunk(tokens, 2.0, along={"row": row}, rng=generator(0))
    assert mask.count == 8 and (out[~mask.keep] == 0).all()
    assert torch.equal(out[mask.keep], trunk.eval()(tokens, 2.0, along={"row": row})[0][mask.keep])


@pytest.mark.parametrize(
    "experts,capacity,tokens,taken", [(8, 2.0, 16, 4), (8, 2.0, 64, 16), (3, 0.7, 30, 7), (10, 0.3, 100, 3)]
)
def test_each_expert_takes_its_exact_number(experts, capacity, tokens, taken):
    layer = rough(Experts(6, Fraction(12), 4, experts, capacity))
    assert layer.count(tokens) == taken and layer.w1.shape == (experts, 6, 12)
    x = torch.randn(2, tokens, 6, generator=generator(1))
    want = torch.zeros_like(x)
    for sample in range(2):
        chance = layer.gate(x[sample]).softmax(-1)
        for expert in range(experts):
            best = chance[:, expert].sort(descending=True, stable=True).indices[:taken]
            made = F.gelu(x[sample, best] @ layer.w1[expert]) @ layer.w2[expert]
            want[sample, best] += chance[best, expert, None] * made
    assert torch.allclose(layer(x), want, atol=1e-6)


def test_one_expert_with_room_for_all_is_a_dense_ffn():
    layer, x = rough(Experts(6, Fraction(12), 4, 1, 1.0)), torch.randn(2, 9, 6, generator=generator(1))
    assert torch.allclose(layer(x), F.gelu(x @ layer.w1[0]) @ layer.w2[0], atol=1e-6)


def test_experts_are_refused_where_they_would_take_none_or_too_many():
    with pytest.raises(BadInput, match="8 experts of capacity 0.5 would take 0 of 4 tokens"):
        Experts(8, Fraction(8), 4, 8, 0.5)(torch.zeros(1, 4, 8))
    with pytest.raises(BadInput, match="would take 8 of 4"):
        Experts(8, Fraction(8), 4, 1, 2.0)(torch.zeros(1, 4, 8))


def test_layer_wise_scaling_and_the_papers_size(monkeypatch):
    assert scaled((0.5, 1.0), 16)[1] == Fraction(8, 15) and scaled((0.5, 4.0), 1) == [4]
    assert [inner(512, scale, 32) for scale in scaled((0.5, 1.0), 16)][::5] == [256, 384, 448, 512]
    assert SwiGlu(1024, Fraction(4096), 256).w1.out_features == 2816  # 2/3 of 4096 is 2730
    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda weight, *_, **__: weight)  # nothing to start in a tensor without values
    with torch.device("meta"):
        trunk, captions = MicroDit().trunk(16, crossed=True), Captions(1024, 1024, 64, 256)
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (trunk, captions)]
    assert 1.16e9 < sum(counts) < 1.17e9  # the paper's XL/2 has 1.16 billion
    experts = [isinstance(block.ffn, Experts) for block in trunk.blocks if hasattr(block, "ffn")]
    assert experts == [layer % 2 == 1 and layer < 27 for layer in range(28)]


def test_positions_tell_rows_from_columns_and_interpolate():
    grid = positions((2, 3), 8)
    assert grid.shape == (6, 8) and torch.equal(grid[0, :4], grid[3, :4]) and torch.equal(grid[0, 4:], grid[2, 4:])
    assert torch.allclose(grid[1, 0], torch.tensor(1.0).sin()) and len(grid.unique(dim=0)) == 6
    assert torch.equal(positions((4, 6), 8, 2.0)[::2][:3], grid[:3])
    with pytest.raises(BadInput, match="4 divides"):
        positions((2, 2), 6)


@pytest.mark.parametrize(
    "call,told",
    [
        (lambda: MicroDit(density=0.0), "density 0.0"),
        (lambda: MicroDit(density=1.5), "density 1.5"),
        (lambda: MicroDit(width=100), "100 is no multiple of the head width 64"),
        (lambda: MicroDit(mixer_width=100), "100 is no multiple"),
        (lambda: MicroDit(capacity=float("nan")), "capacity"),
        (lambda: MicroDit(drop=1.0), "drop"),
        (lambda: MicroDit(depth=0), "depth is at least 1"),
        (lambda: MicroDit(**TINY).keep(torch.empty(1, 1), rng=generator(0)), "keeps none of the 1 units"),
        (lambda: MicroDit().keep(torch.empty(1, 64)), "generator"),
        (lambda: MicroDit(**TINY).denoiser((1, 30, 32), classes=2), "does not divide images of 30 x 32"),
        (lambda: MicroDit(**TINY).denoiser(SHAPE), "classes=0, captions=0"),
        (lambda: made()(torch.zeros(1, 1, 28, 28), torch.ones(1), torch.tensor([0])), r"images of \(1, 32, 32\)"),
        (lambda: made().loss(torch.full((1, *SHAPE), torch.nan), torch.tensor([0]), generator(0)), "hold NaN"),
        (lambda: made().loss(torch.zeros(1, *SHAPE), torch.tensor([10]), generator(0)), r"in -1..9"),
        (lambda: made().eval().net.trunk(torch.zeros(1, 4, 16), mask=Mask(torch.ones(1, 4) > 0)), "in eval mode"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(call, told):
    with pytest.raises(BadInput, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)
