"""Exact checks of the noise, the loss, the sampler and the stages around micro-diffusion's transformer."""

from __future__ import annotations

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.microdit import MicroDit
from maskwright.inputs.microdit.edm import Denoiser, Noise, guided, ladder, sample
from maskwright.inputs.microdit.stages import PAPER_256, PAPER_512, Run, Stage

TINY = {
    "patch": 4,
    "width": 16,
    "depth": 2,
    "head": 8,
    "mixer_depth": 1,
    "mixer_width": 8,
    "multiple": 8,
    "experts": 2,
    "capacity": 1.0,
}
SHAPE = (2, 8, 16)  # a grid of 2 x 4 tokens that is no square


def made(**settings) -> Denoiser:
    return MicroDit(**{**TINY, "density": 0.5, **settings}).denoiser(SHAPE, classes=3)


def batch(n: int = 4):
    return 0.9 * torch.randn(n, *SHAPE, generator=generator(9)), torch.arange(n) % 3


def trained(model: Denoiser, stages, steps: int) -> Run:
    run = Run(model, stages)
    for _ in range(steps):
        run.step(*batch())
    return run


def test_preconditioning_by_hand():
    noise = Noise(data=0.9)
    for sigma in (0.01, 0.3, 0.9, 20.0):
        at = torch.tensor(sigma, dtype=torch.float64)
        skip = 0.81 / (at**2 + 0.81)
        # F = 0: D - x = (skip - 1) x + skip n, of variance (1 - skip)^2 .81 + skip^2 sigma^2
        assert torch.isclose(
            noise.weight(at) * ((1 - skip) ** 2 * 0.81 + skip**2 * at**2), torch.ones((), dtype=torch.float64)
        )
    assert torch.isclose(noise.weight(torch.tensor(0.9)), torch.tensor(2 / 0.81))
    draws = noise.sigma(100_000, generator(0)).log()
    assert abs(float(draws.mean()) + 0.6) < 0.02 and abs(float(draws.std()) - 1.2) < 0.02


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_loss_starts_at_1(density):
    model = made(density=density).train()
    x, y = batch(2000)
    noisy, sigma = x + 1.0, torch.full((2000,), 0.7)
    out = model(noisy, sigma, y, rng=generator(1))[0]
    assert torch.allclose(out, 0.81 / (0.49 + 0.81) * noisy, rtol=1e-5)
    assert abs(float(model.loss(x, y, generator(2)).detach()) - 1) < 0.02


def test_the_same_seed_is_the_same_loss_and_0_is_a_seed():
    (x, y), model = batch(), made().train()
    model = trained(model, [Stage(3, 0.5, 1e-2)], 3).model.train()
    told = [float(model.loss(x, y, generator(seed)).detach()) for seed in (0, 0, 1)]
    assert told[0] == told[1] != told[2]
    first, same, other = (made().state_dict() for _ in range(3))
    assert all(torch.equal(first[name], same[name]) for name in first)
    other = MicroDit(**TINY).denoiser(SHAPE, classes=3, seed=1).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_conditions_are_dropped_at_their_share():
    model, seen = made(drop=0.25), []
    model.net.conditioner.register_forward_hook(lambda _, told, __: seen.append(told[0]))
    model.loss(*batch(4000), generator(0))
    assert abs(float((seen[0] == -1).float().mean()) - 0.25) < 0.03
    assert (model.net.conditioner(torch.tensor([-1]))[0] == 0).all()


def test_the_ladder_of_sigmas():
    at = ladder(18)
    assert at.dtype == torch.float64 and len(at) == 19 and torch.isclose(at[0], at.new_tensor(80.0)) and at[-1] == 0
    assert torch.isclose(at[-2], at.new_tensor(0.002)) and (at.diff() < 0).all()
    assert torch.allclose((at[:-1] ** (1 / 7)).diff().diff(), at.new_zeros(16), atol=1e-12)
    with pytest.raises(BadInput, match="2 steps"):
        ladder(1)


def test_heun_follows_the_flow_of_a_normal_distribution():
    # F = 0 is the exact denoiser of N(0, .9^2): x(sigma) is proportional to sqrt(.81 + sigma^2).
    model, start = made().train(), torch.randn(2, *SHAPE, generator=generator(3))
    want = start * 80 * 0.9 / (0.81 + 6400) ** 0.5
    errors = []
    for steps in (18, 36):
        errors.append(float((sample(model, start, torch.tensor([0, 1]), steps=steps) / want - 1).abs().max()))
    assert errors[0] < 0.05 and errors[1] < errors[0] / 3  # second order: half the step, about a quarter of the error
    assert model.training


def test_sampling_masks_nothing_and_guides():
    model = trained(made(), [Stage(8, 0.5, 1e-2)], 8).model
    start, y = torch.randn(2, *SHAPE, generator=generator(3)), torch.tensor([0, 1])
    assert torch.equal(sample(model.train(), start, y, steps=3), sample(model.eval(), start, y, steps=3))
    at = torch.tensor(0.7)
    told, none = (model(start, at.expand(2), c)[0].double() for c in (y, torch.full_like(y, -1)))
    assert not torch.equal(told, none)
    for g in (1.0, 5.0):
        assert torch.allclose(guided(model, start, at, y, g), none + g * (told - none), atol=1e-5)


def test_captions_condition_too():
    model = MicroDit(**TINY, density=0.5).denoiser(SHAPE, captions=6)
    y = torch.randn(4, 5, 6, generator=generator(1))
    run, x = Run(model, [Stage(4, 0.5, 1e-2)]), batch()[0]
    for _ in range(4):
        run.step(x, y)
    out = [model.eval()(x, torch.ones(4), c)[0] for c in (y, y.flip(0), model.net.conditioner.dropped(y))]
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    with pytest.raises(BadInput, match=r"\(batch, length, 6\)"):
        model(x, torch.ones(4), y[..., :3])


def test_stages_change_density_rate_and_the_papers_are_right():
    run = Run(made(), [Stage(4, 0.5, 0.1, warmup=2, final=0.5), Stage(2, lr=0.01)])
    assert [run.stages[0].rate(step) for step in range(4)] == pytest.approx([0.05, 0.1, 0.1, 0.075])
    seen = []
    run.model.net.trunk.blocks[0].register_forward_hook(lambda _, told, __: seen.append(told[0].shape[1]))
    for _ in range(6):
        run.step(*batch())
    assert seen == [4] * 4 + [8] * 2 and run.at == run.total == 6
    with pytest.raises(BadInput, match="all 6 steps"):
        run.step(*batch())
    assert [(s.steps, s.density) for s in PAPER_256 + PAPER_512] == [
        (250_000, 0.25),
        (30_000, 1),
        (50_000, 0.25),
        (5_000, 1),
    ]


def test_masked_and_unmasked_runs_see_the_same_noise():
    seen = []
    for density in (0.5, 1.0):
        run = Run(made(), [Stage(1, density)])
        run.model.net.inlet.register_forward_hook(lambda _, told, __: seen.append(told[0]))
        run.step(*batch())
    assert torch.equal(seen[0], seen[1])


def test_the_average_by_hand():
    run, weight = Run(made(), [Stage(4, 0.5, 1e-2, ema=0.75, ema_start=1)]), "net.inlet.weight"
    seen = []
    for _ in range(4):
        run.step(*batch())
        seen.append(run.model.state_dict()[weight].clone())
    want = seen[1]
    for now in seen[2:]:
        want = 0.75 * want + 0.25 * now
    assert torch.allclose(run.average.state_dict()[weight], want, atol=1e-7)


def test_a_run_goes_on_to_the_bit_and_refuses_another(tmp_path):
    stages = [Stage(3, 0.5, 1e-2, ema=0.9), Stage(2, lr=1e-3, ema=0.5)]
    whole, part = trained(made(), stages, 5), trained(made(), stages, 2)
    part.save(tmp_path / "run.safetensors")
    later = Run(made(), stages)
    later.load(tmp_path / "run.safetensors")
    for _ in range(3):
        later.step(*batch())
    for mine, theirs in ((later.model, whole.model), (later.average, whole.average)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    with pytest.raises(BadInput, match="stages"):
        Run(made(), stages[:1]).load(tmp_path / "run.safetensors")
    with pytest.raises(BadInput, match="another model"):
        Run(made(depth=1), stages).load(tmp_path / "run.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="no training run"):
        later.load(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"density": 0.0}, {"lr": float("nan")}, {"ema": 1.0}, {"final": -0.1}, {"clip": 0.0}]
)
def test_a_bad_stage_is_refused(wrong):
    with pytest.raises(BadInput):
        Stage(**{"steps": 1, **wrong})
