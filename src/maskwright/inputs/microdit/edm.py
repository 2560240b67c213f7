"""EDM around a network: preconditioning, the weighted loss with a mask, and Heun's sampler with guidance (2206.00364)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.apply import masked_loss
from maskwright.inputs.microdit.dit import DiT
from maskwright.inputs.patches import patches


@dataclass(frozen=True)
class Noise:
    """sigma = exp(std n + mean) while training; `data` is the standard deviation of the data (about a mean of 0)."""

    mean: float = -0.6
    std: float = 1.2
    data: float = 0.9

    def sigma(self, batch: int, rng: torch.Generator) -> Tensor:
        """One sigma a sample, (batch,)."""
        return (self.std * torch.randn(batch, generator=rng) + self.mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + data^2) / (sigma data)^2: with it every sigma has loss 1 where the network says 0."""
        return (sigma**2 + self.data**2) / (sigma * self.data) ** 2


@final
class Denoiser(nn.Module):
    """D(x_n; sigma, y) = c_skip x_n + c_out F(c_in x_n, ln(sigma) / 4, y) around a DiT. drop: share of conditions dropped.

    `loss` draws sigma, noise, dropped conditions and, in training mode, the mask, in this order, from its generator.
    """

    def __init__(self, net: DiT, noise: Noise, drop: float = 0.1) -> None:
        super().__init__()
        self.net, self.noise, self.drop = net, noise, drop

    def forward(
        self, noisy: Tensor, sigma: Tensor, y: Tensor, *, rng: torch.Generator | None = None, mask: Mask | None = None
    ) -> tuple[Tensor, Mask | None]:
        """noisy (batch, channels, height, width), sigma (batch,), y as the conditioner takes it -> (D, mask or None).

        Where the mask drops a patch F is 0, so D is c_skip x_n there.
        """
        data, wide = self.noise.data, sigma.view(-1, 1, 1, 1)
        total = wide**2 + data**2
        told, mask = self.net(noisy / total.sqrt(), sigma.log() / 4, y, rng=rng, mask=mask)
        return data**2 / total * noisy + wide * data / total.sqrt() * told, mask

    def loss(self, x: Tensor, y: Tensor, rng: torch.Generator, *, mask: Mask | None = None) -> Tensor:
        """The loss of one batch of clean images: a mean over kept patches of a sample, then over samples.

        1.0 at the start for data of standard deviation `noise.data`. Raises BadInput for NaN in x.
        """
        if bool(x.isnan().any()):
            raise BadInput(f"images of shape {tuple(x.shape)} hold NaN: the mixer reads every patch, kept or not")
        sigma = self.noise.sigma(len(x), rng)
        noisy = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=rng)
        gone = torch.rand(len(x), generator=rng) < self.drop
        y = torch.where(gone.view(-1, *[1] * (y.ndim - 1)), self.net.conditioner.dropped(y), y)
        made, mask = self(noisy, sigma, y, rng=rng, mask=mask)
        return self.scored(made, x, sigma, mask)

    def scored(self, made: Tensor, x: Tensor, sigma: Tensor, mask: Mask | None) -> Tensor:
        """weight(sigma) (made - x)^2: mean over a patch, over the kept patches of a sample, over samples."""
        root = self.noise.weight(sigma).sqrt().view(-1, 1, 1, 1)
        if mask is None:
            return (root * (made - x)).square().mean()
        # sqrt(weight) on both sides: masked_loss leaves dropped patches out before it takes any difference.
        made, x = (patches(root * part, self.net.patch) for part in (made, x))
        return masked_loss(made, x, mask, over="samples")


def ladder(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Sigmas from high to low, evenly in sigma^(1 / rho), then 0: (steps + 1,) float64. Raises BadInput below 2 steps."""
    if steps < 2 or not 0 < low < high:
        raise BadInput(f"the sampler takes at least 2 steps from a high to a low sigma, got {steps} from {high} to {low}")
    along = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (high ** (1 / rho) + along * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def sample(model: Denoiser, start: Tensor, y: Tensor, *, steps: int = 18, guidance: float = 1.0) -> Tensor:
    """Images from standard normal `start` (batch, channels, height, width): Heun's method, every token in every step.

    guidance g: D_none + g (D_y - D_none). The paper samples with 30 steps and g = 5. Works in float64 around the model.
    """
    was, at = model.training, ladder(steps)
    model.eval()
    try:
        x = start.double() * at[0]
        for now, then in pairwise(at):
            slope = (x - guided(model, x, now, y, guidance)) / now
            ahead = x + (then - now) * slope
            if then > 0:  # the second order needs a slope at the end, and at 0 there is none
                slope = (slope + (ahead - guided(model, ahead, then, y, guidance)) / then) / 2
                ahead = x + (then - now) * slope
            x = ahead
    finally:
        model.train(was)
    return x.to(start.dtype)


def guided(model: Denoiser, x: Tensor, sigma: Tensor, y: Tensor, guidance: float) -> Tensor:
    """D at one sigma, moved away from the unconditional one by `guidance` (1: the conditional one alone)."""
    weight = next(model.parameters()).dtype
    noisy, each = x.to(weight), sigma.to(weight).expand(len(x))
    if guidance == 1:
        return model(noisy, each, y)[0].double()
    both = torch.cat([y, model.net.conditioner.dropped(y)])
    told, none = model(noisy.repeat(2, 1, 1, 1), each.repeat(2), both)[0].double().chunk(2)
    return none + guidance * (told - none)
