"""MID's claim: on photographs with correlated, signal-dependent noise, masking carries white-noise training over.

Clean, noisy and test patches come from different photographs. Every arm trains as many steps; round 0 is shared.
The arms on real frames and diffusion MRI are reported beside it, after two rounds each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.method import Claim, Effect
from maskwright.core.select import generator
from maskwright.inputs.mid import Mid
from maskwright.inputs.mid.rounds import Rounds, lag1
from maskwright.lab import noisy
from maskwright.lab.images import photos

SIGMA = 25 / 255
CLEAN = ("astronaut", "coffee", "motorcycle_left", "china")
NOISY = ("chelsea", "rocket", "ihc")
TEST = ("flower", "retina", "hubble_deep_field")


@dataclass(frozen=True, eq=False)
class Task:
    """Patches (n, 1, side, side): clean; noisy with its true noise (for scoring and the oracle); test, noisy two ways."""

    clean: Tensor
    noisy: Tensor
    noise: Tensor
    test: Tensor
    real: Tensor
    white: Tensor
    steps: int


def net(inputs: int, outputs: int, width: int = 24, layers: int = 5) -> nn.Module:
    """A small DnCNN without BatchNorm, which predicts the image itself: hidden pixels have nothing to subtract from."""
    widths = [inputs] + [width] * (layers - 1)
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(width, outputs, 3, padding=1))


def _noise(c: Tensor, rng: torch.Generator) -> Tensor:
    """blur3x3(sqrt(c + 0.1) w), w white, scaled to SIGMA over all of `c`: neighbours correlate by 2/3. Not clipped."""
    w = torch.randn(c.shape, generator=rng) * (c + 0.1).sqrt()
    n = F.avg_pool2d(F.pad(w, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return n * (SIGMA / n.std())


@cache
def _task(seed: int, scale: str) -> Task:
    rng = generator(seed, "mid photographs")
    if scale == "full":
        found = photos()
        clean, y, test = (_patches(found, names, 40, n, rng) for names, n in ((CLEAN, 240), (NOISY, 60), (TEST, 30)))
        steps = 400
    else:
        clean, y, test = (torch.rand(4, 1, 32, 32, generator=rng) for _ in range(3))
        steps = 1
    noise, held = _noise(y, rng), _noise(test, rng)
    return Task(clean, y + noise, noise, test, test + held, test + SIGMA * torch.randn(test.shape, generator=rng), steps)


def _patches(found: Mapping[str, object], names: tuple[str, ...], side: int, number: int, rng: torch.Generator) -> Tensor:
    grey = [torch.tensor(found[name]).float().mean(2) / 255 for name in names]
    made = []
    for at in range(number):
        image = grey[at % len(grey)]
        row, column = (int(torch.randint(size - side + 1, (), generator=rng)) for size in image.shape)
        made.append(image[row : row + side, column : column + side])
    return torch.stack(made).unsqueeze(1)


def _start(density: float, seed: int, scale: str, noisy: Tensor | None = None) -> Rounds:
    task = _task(seed, scale)
    masks = 1 if density == 1 else 6  # with nothing hidden, all predictions are the same
    method = Mid(density=density, steps=task.steps, batch=16 if scale == "full" else 2, masks=masks)
    return method.start(task.clean, task.noisy if noisy is None else noisy, net, seed=seed)


@cache
def _first(density: float, seed: int, scale: str) -> tuple[dict[str, Tensor], Tensor]:
    """Network and bank after round 0, on white noise of sigma 5 to 50 of 255."""
    run = _start(density, seed, scale)
    run.round()
    assert run.bank is not None
    return {name: value.clone() for name, value in run.network.state_dict().items()}, run.bank


def _white(run: Rounds) -> None:
    run.bank = None


def _shuffled(run: Rounds) -> None:
    """The twin: the bank's values at random places, so that what was found of the noise's shape is lost."""
    assert run.bank is not None
    order = torch.randperm(run.bank.numel(), generator=generator(run.seed, "twin"))
    run.bank = run.bank.flatten()[order].reshape(run.bank.shape)


def _arm(density: float, between: Callable[[Rounds], None] | None, seed: int, scale: str) -> dict[str, float]:
    return _trained(density, between, seed, scale)[0]


@cache
def _trained(
    density: float, between: Callable[[Rounds], None] | None, seed: int, scale: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The arm's figures, and its network after round 1."""
    run, task = _start(density, seed, scale), _task(seed, scale)
    state, bank = _first(density, seed, scale)
    run.network.load_state_dict(state)
    run.bank, run.number = bank, 1
    figures = {"psnr_round0": _psnr(run, task.real, task)}
    while not run.done:
        if between is not None:
            between(run)
        run.round()
        figures[f"psnr_round{run.number - 1}"] = _psnr(run, task.real, task)
        if run.number == 2:
            state = {name: value.clone() for name, value in run.network.state_dict().items()}
    if between is _shuffled:
        _shuffled(run)
    return figures | _scored(run, task), state


def _real(kind: str, density: float, bank: bool, seed: int, scale: str) -> dict[str, float]:
    """Rounds 0 and 1 on real noise, from the photographs' clean set: white noise in both, or the real noise's bank in 1."""
    task = _task(seed, scale)
    if scale == "full":
        found = noisy.frames(seed) if kind == "frames" else noisy.diffusion(seed)
    else:
        found = noisy.Real(task.noisy, task.real, task.test)
    run = _start(density, seed, scale, found.noisy)
    # Round 0 never sees the noisy set, so the networks of white noise are those of the arms above.
    run.network.load_state_dict(_first(density, seed, scale)[0] if bank else _trained(density, _white, seed, scale)[1])
    run.bank, run.number = run.renewed(), 1 if bank else 2
    if bank:
        run.round()
    error = found.test - found.truth
    out = run.denoise(found.test, seed=seed)
    told = {"psnr_before": _decibel(error), "psnr": _decibel(out - found.truth), "std_before": float(error.std())}
    return {**told, "lag1_before": lag1(error), "removed_std": float(run.bank.std()), "removed_lag1": lag1(run.bank)}


def _oracle(seed: int, scale: str) -> dict[str, float]:
    """Pairs with the noisy set's true noise, nothing hidden, in every round."""
    run, task = _start(1.0, seed, scale), _task(seed, scale)
    while not run.done:
        run.bank = task.noise
        run.round()
    return _scored(run, task)


def _scored(run: Rounds, task: Task) -> dict[str, float]:
    assert run.bank is not None
    gap = abs(lag1(run.bank) - lag1(task.noise))
    psnr = {"psnr": _psnr(run, task.real, task), "psnr_white": _psnr(run, task.white, task)}
    return {**psnr, "lag1": lag1(run.bank), "lag1_gap": gap, "bank_std": float(run.bank.std())}


def _psnr(run: Rounds, y: Tensor, task: Task) -> float:
    return _decibel(run.denoise(y, seed=run.seed) - task.test)


def _decibel(error: Tensor) -> float:
    return float(-10 * error.square().mean().log10())


CLAIM = Claim(
    arms={
        "white": partial(_arm, 1.0, _white),
        "masked": partial(_arm, 0.25, _white),
        "mid": partial(_arm, 0.25, None),
        "unmasked": partial(_arm, 1.0, None),
        "oracle": _oracle,
        "shuffled": partial(_arm, 0.25, _shuffled),
        "frames_white": partial(_real, "frames", 1.0, False),
        "frames_masked": partial(_real, "frames", 0.25, False),
        "frames_mid": partial(_real, "frames", 0.25, True),
        "mri_white": partial(_real, "mri", 1.0, False),
        "mri_masked": partial(_real, "mri", 0.25, False),
        "mri_mid": partial(_real, "mri", 0.25, True),
    },
    method="mid",
    twin="shuffled",
    effects=(
        Effect("masking carries white noise over", "masked", "white", "psnr", margin=0.1),
        Effect("the noise bank helps", "mid", "masked", "psnr", margin=0.1),
        Effect("the bank needs masks", "mid", "unmasked", "psnr", margin=0.1),
        Effect("the bank's neighbours come nearer the truth", "mid", "masked", "lag1_gap", margin=0.02, higher=False),
        Effect("true noise is best", "oracle", "mid", "psnr", "quality"),
        Effect("on white noise masking only loses", "white", "masked", "psnr_white", "quality"),
        Effect("on video frames masking carries over", "frames_masked", "frames_white", "psnr", "quality"),
        Effect("on video frames the bank helps", "frames_mid", "frames_masked", "psnr", "quality"),
        Effect("on diffusion MRI masking carries over", "mri_masked", "mri_white", "psnr", "quality"),
        Effect("on diffusion MRI the bank helps", "mri_mid", "mri_masked", "psnr", "quality"),
    ),
    seeds=(0, 1, 2),
    paper="near or above earlier unsupervised denoisers on SIDD and DND (abstract; tables not seen)",
    needs=(
        "package:skimage",
        "package:sklearn",
        f"debian:{noisy.VIDEO}",
        f"pypi:{noisy.DECODER}",
        f"pypi:{noisy.DIFFUSION}",
    ),
    trains=True,
)
