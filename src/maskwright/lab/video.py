"""A small video diffusion transformer: 8 frames of 8x8 tokens behind 8 words, moving real digits, few-step sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.lab import images, models
from maskwright.lab import train as loop
from maskwright.lab.made import Recipe

FRAMES, SIDE, PATCH, WORDS = 8, 8, 2, 8  # tokens: WORDS first, then FRAMES x SIDE x SIDE in reading order
PIXELS, SPEED = SIDE * PATCH, 1
Tell = Callable[..., object]


@dataclass(frozen=True, eq=False)
class Clips:
    """`video` (rows, FRAMES, PIXELS, PIXELS) in [-1, 1] and its `words` (rows, WORDS) int64."""

    video: Tensor
    words: Tensor


class VideoDenoiser(nn.Module):
    """Predicts the clean clip: (noisy clip, words, share of noise (rows,) in [0, 1]) -> the clip's shape.

    Positions are factorised: one learned vector each for frame, row and column.
    """

    def __init__(self, *, layers: int = 4, width: int = 128, heads: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.grid = (FRAMES, SIDE, SIDE, WORDS)  # what a plan of its heads is made for
        with models.seeded(seed):
            self.inlet, self.word = nn.Linear(PATCH * PATCH, width), nn.Embedding(_VOCABULARY, width)
            self.time = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width))
            self.frame, self.row, self.column, self.place = (
                nn.Parameter(0.5 * torch.randn(count, width)) for count in self.grid
            )
            self.blocks = nn.ModuleList(models.Block(width, heads, causal=False, activation=nn.GELU) for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, PATCH * PATCH)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5 / 2)
                    nn.init.zeros_(module.bias)
        self.register_buffer("rates", 2.0 ** torch.arange(8) * torch.pi / 2, persistent=False)

    rates: Tensor

    def forward(self, noisy: Tensor, words: Tensor, noise: Tensor) -> Tensor:
        if noisy.shape[1:] != (FRAMES, PIXELS, PIXELS) or words.shape[1:] != (WORDS,):
            raise ValueError(f"clips {tuple(noisy.shape)} and words {tuple(words.shape)} do not fit the grid {self.grid}")
        positions = (self.frame[:, None, None] + self.row[:, None] + self.column).flatten(0, 2)
        video = self.inlet(patches(noisy)) + positions
        angle = noise[:, None] * self.rates
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None]
        hidden = torch.cat([self.word(words) + self.place, video], 1) + time  # (rows, WORDS + tokens, width)
        for block in self.blocks:
            hidden = block(hidden)
        return unpatched(self.head(self.norm(hidden[:, WORDS:])))


def patches(video: Tensor) -> Tensor:
    """(rows, frames, height, width) -> (rows, frames * tokens a frame, PATCH * PATCH), frame by frame, row by row."""
    cut = video.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (rows, frames, h, p, w, p)
    return cut.transpose(3, 4).flatten(1, 3).flatten(2)


def unpatched(tokens: Tensor) -> Tensor:
    """The inverse of `patches`."""
    cut = tokens.unflatten(2, (PATCH, PATCH)).unflatten(1, (FRAMES, SIDE, SIDE))
    return cut.transpose(3, 4).flatten(4, 5).flatten(2, 3)


_VOCABULARY = 10 + 2 * (2 * SPEED + 1) + 4  # digits, speeds along x and y, filling words


def draw_clips(digits: tuple[Tensor, Tensor], rows: int, generator: torch.Generator) -> Clips:
    """Real 8x8 digits moving in straight lines at -SPEED to SPEED pixels a frame, wrapping at the border.

    digits: images (n, 1, 8, 8) in [0, 1] and their classes. The words tell class and speed, not the first place.
    """
    x, y = digits
    chosen = torch.randint(len(x), (rows,), generator=generator)
    speed = torch.randint(-SPEED, SPEED + 1, (rows, 2), generator=generator)
    first = torch.randint(PIXELS, (rows, 2), generator=generator)
    canvas = torch.zeros(rows, PIXELS, PIXELS)
    canvas[:, :8, :8] = x[chosen, 0]
    at = first[:, None] + speed[:, None] * torch.arange(FRAMES)[:, None]  # (rows, frames, 2)
    down, right = ((torch.arange(PIXELS) - at[..., i, None]) % PIXELS for i in (0, 1))  # (rows, frames, pixels)
    video = canvas[torch.arange(rows)[:, None, None, None], down[..., None], right[:, :, None]]
    steps = 2 * SPEED + 1
    told = [y[chosen], 10 + SPEED + speed[:, 0], 10 + steps + SPEED + speed[:, 1]]
    filling = torch.arange(WORDS - 3) % 4 + 10 + 2 * steps
    return Clips(2 * video - 1, torch.cat([torch.stack(told, 1), filling.expand(rows, -1)], 1))


def noised(video: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """(1 - noise) clip + noise * normal, noise (rows,): the straight path of rectified flow."""
    share = noise[:, None, None, None]
    return (1 - share) * video + share * torch.randn(video.shape, generator=generator)


@torch.no_grad()
def sample(
    model: VideoDenoiser, words: Tensor, steps: int, generator: torch.Generator, *, tell: Tell | None = None
) -> Tensor:
    """A clip per row of `words`, from noise in `steps` straight steps: (rows, FRAMES, PIXELS, PIXELS).

    `tell(step=, steps=, new_tokens=)` is called before every step. The same generator state gives the same clips.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, not {steps}")
    x = torch.randn(len(words), FRAMES, PIXELS, PIXELS, generator=generator)
    for step in range(steps):
        if tell is not None:
            tell(step=step, steps=steps, new_tokens=FRAMES * SIDE * SIDE)
        now, after = 1 - step / steps, 1 - (step + 1) / steps
        clean = model(x, words, torch.full((len(words),), now))
        x = clean + (x - clean) * (after / now)
    return x


class Denoising(nn.Module):
    """The denoiser behind one input, as the lab's training loop calls it: x holds (clips, words, noise)."""

    def __init__(self, model: VideoDenoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.model(*x)


def denoising_rows(digits: tuple[Tensor, Tensor]) -> Callable[[int, torch.Generator], tuple[tuple[Tensor, ...], Tensor]]:
    """Draw batches ((noisy, words, noise), clean) with noise ~ U(0, 1)."""

    def draw(batch: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        clips = draw_clips(digits, batch, generator)
        noise = torch.rand(batch, generator=generator)
        return (noised(clips.video, noise, generator), clips.words, noise), clips.video

    return draw


def video_denoiser(seed: int) -> nn.Module:
    """4 layers, width 128, 8 heads, 8 words + 512 video tokens: 0.8 M parameters."""
    return VideoDenoiser(seed=seed)


def fit_video_denoiser(
    model: VideoDenoiser, seed: int, steps: int, progress: Callable[[int, float], None] | None
) -> dict[str, float]:
    """Train on moving training digits; measure on moving test digits."""
    draw: loop.Draw = denoising_rows(images.digits().train)  # type: ignore[assignment]
    train_loss = loop.train(
        Denoising(model), draw, steps=steps, batch=4, lr=2e-3, optimizer="adamw", weight_decay=0.01,
        warmup=max(1, steps // 20), clip=1.0, seed=seed, on_step=progress, loss_fn=F.mse_loss,
    )  # fmt: skip
    return {"train_loss": train_loss, "val_loss": held_out_loss(model)}


@torch.no_grad()
def held_out_loss(model: VideoDenoiser, rows: int = 32, seed: int = 0) -> float:
    """Mean squared error of the clean clip on held-out digits, at noise 0.125 to 0.875."""
    generator = torch.Generator().manual_seed(seed)
    clips = draw_clips(images.digits().test, rows, generator)
    noise = (torch.arange(rows) % 4 + 0.5) / 4
    noisy = noised(clips.video, noise, generator)
    model.eval()
    guess = torch.cat([model(*part) for part in zip(*(x.split(8) for x in (noisy, clips.words, noise)), strict=True)])
    return float(F.mse_loss(guess, clips.video))


def digits_data() -> str:
    """scikit-learn's digits never change."""
    return "sklearn digits"


_CODE = (models, loop, sys.modules[__name__])
RECIPES: dict[str, Recipe] = {
    "video_denoiser": Recipe("video diffusion transformer", video_denoiser, fit_video_denoiser, digits_data, 700, _CODE),
}
