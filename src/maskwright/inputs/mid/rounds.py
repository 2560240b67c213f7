"""The rounds of MID: train on the noise sampled so far, denoise the noisy set, take what was removed as the next noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.cache import write_atomic
from maskwright.core.errors import BadInput
from maskwright.core.maskset import base_hash
from maskwright.core.select import generator
from maskwright.inputs.apply import hide
from maskwright.inputs.calling import name_of, naming

if TYPE_CHECKING:
    from maskwright.inputs.mid.method import Mid


class Rounds:
    """A run of MID. `network`, `bank` (noise images like the noisy set, or None before round 0), `number` of rounds done,
    `reports` one dict a round. Made by `Mid.start`."""

    def __init__(self, method: Mid, clean: Tensor, noisy: Tensor, build: Callable[[int, int], nn.Module], seed: int) -> None:
        for name, images in (("clean", clean), ("noisy", noisy)):
            _checked(name, images)
            if not bool(images.isfinite().all()):
                raise BadInput(f"MID: {name} images of shape {tuple(images.shape)} hold NaN or infinite values")
            if min(images.shape[2:]) < method.patch:
                raise BadInput(f"MID: {name} images of shape {tuple(images.shape)} are smaller than patch {method.patch}")
        if clean.shape[1] != noisy.shape[1]:
            raise BadInput(f"MID: clean images have {clean.shape[1]} channels, noisy ones {noisy.shape[1]}")
        spans = [float(images.max() - images.min()) for images in (clean, noisy)]
        if max(spans) > 8 * min(spans):  # [0, 1] against [0, 255]: noise alone does not widen a range so much
            raise BadInput(f"MID: clean images span {spans[0]:g}, noisy ones {spans[1]:g}: bring them to one range")
        self.method, self.clean, self.noisy, self.seed = method, clean.detach(), noisy.detach(), seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = clean.shape[1] + 1, clean.shape[1]
            with naming(f"MID: {name_of(build)}{sizes}"):
                self.network = build(*sizes)
        if not isinstance(self.network, nn.Module):
            raise BadInput(f"MID: {name_of(build)}{sizes} gives a {type(self.network).__name__}, not a torch module")
        self.bank: Tensor | None = None
        self.number = 0
        self.reports: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        """True after `rounds` rounds."""
        return self.number >= self.method.rounds

    def show(self, y: Tensor, rng: torch.Generator) -> Tensor:
        """What the network sees: (n, c, h, w) -> (n, c + 1, h, w), hidden pixels 0 and the mask as the last channel.

        The mask tells hidden pixels from black ones. Hidden values never reach the network, NaN included.
        """
        mask = self.method.keep(y[:, 0], rng=rng)
        return torch.cat([hide(y, mask), mask.keep.unsqueeze(1).to(y.dtype)], 1)

    def picks(self, number: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which clean image and which bank image make each pair: two independent draws, with replacement."""
        of = len(self.noisy) if self.bank is None else len(self.bank)
        return torch.randint(len(self.clean), (number,), generator=rng), torch.randint(of, (number,), generator=rng)

    def pairs(self, number: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(clean, noisy) patches: Gaussian noise of a drawn sigma while there is no bank, then the bank, turned."""
        clean_at, noise_at = self.picks(number, rng)
        c = _crops(self.clean, clean_at, self.method.patch, rng)
        if self.bank is not None:
            return c, c + _crops(self.bank, noise_at, self.method.patch, rng)
        low, high = self.method.low, self.method.high
        sigma = low + (high - low) * torch.rand(number, 1, 1, 1, generator=rng, dtype=c.dtype)
        return c, c + sigma * torch.randn(c.shape, generator=rng, dtype=c.dtype)

    def round(self) -> dict[str, float]:
        """Train `steps` steps from the network as it is, then renew the bank. Gives the round's report.

        Raises BadInput when the run is done or the new bank has a standard deviation below `floor`: nothing was removed.
        """
        if self.done:
            raise BadInput(f"MID: all {self.method.rounds} rounds are done")
        method, rng = self.method, generator(self.seed, f"mid round {self.number}")
        optimiser = torch.optim.Adam(self.network.parameters(), lr=method.rate)
        self.network.train()
        total = 0.0
        for _ in range(method.steps):
            c, y = self.pairs(method.batch, rng)
            loss = F.l1_loss(self._predicted(self.show(y, rng)), c)  # over all pixels: fills in and denoises at once
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += loss.item()
        self.bank = self.renewed()
        report = {"round": float(self.number), "loss": total / method.steps, "std": float(self.bank.std())}
        report["lag1"] = lag1(self.bank)
        self.number += 1
        self.reports.append(report)
        return report

    def renewed(self) -> Tensor:
        """y - denoise(y) of the noisy set, detached. Raises BadInput where that is nothing, or not finite."""
        bank = self.noisy - self.denoise(self.noisy, seed=self.seed)
        std = float(bank.std())
        if not std > self.method.floor:
            raise BadInput(f"MID: round {self.number} left a noise bank of standard deviation {std:g}: nothing was removed")
        return bank

    @torch.no_grad()
    def denoise(self, y: Tensor, *, masks: int | None = None, seed: int = 0) -> Tensor:
        """The mean of `masks` predictions, each under masks of its own. Prediction k alone is `once(y, seed, k)`.

        Raises BadInput for images of another number of channels, and a network that gives another size than it is given.
        """
        number = self.method.masks if masks is None else masks
        if number < 1:
            raise BadInput(f"MID averages over at least 1 mask, got {number}")
        self._fits(y)
        total = torch.zeros_like(y)
        for at in range(number):
            total += self.once(y, seed, at)
        return total / number

    @torch.no_grad()
    def once(self, y: Tensor, seed: int, at: int) -> Tensor:
        """One prediction, the network in eval mode: (n, c, h, w) -> the same shape. Raises BadInput as `denoise` does."""
        self._fits(y)
        was = self.network.training
        self.network.eval()
        try:
            return self._predicted(self.show(y, generator(seed, f"mid mask {at}")))
        finally:
            self.network.train(was)

    def _fits(self, y: Tensor) -> None:
        _checked("noisy", y)
        if y.shape[1] != self.clean.shape[1]:
            raise BadInput(f"MID: images of shape {tuple(y.shape)} have {y.shape[1]} channels, not {self.clean.shape[1]}")

    def _predicted(self, shown: Tensor) -> Tensor:
        with naming(f"MID: the network on images of shape {tuple(shown.shape)}"):
            out = self.network(shown)
        wanted = (len(shown), shown.shape[1] - 1, *shown.shape[2:])
        if not isinstance(out, Tensor) or out.shape != wanted:
            given = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise BadInput(f"MID: the network gives {given} for images of shape {tuple(shown.shape)}, not {wanted}")
        return out

    def save(self, path: Path | str) -> None:
        """Network, bank, round number, settings and reports in one .safetensors file."""
        from safetensors.torch import save

        held = {f"network.{name}": value.detach().clone().contiguous() for name, value in self.network.state_dict().items()}
        if self.bank is not None:
            held["bank"] = self.bank.contiguous()
        told = {**self.method.made_by(self.seed), "mark": self._mark(), "number": self.number, "reports": self.reports}
        write_atomic(Path(path), save(held, metadata={"mid": json.dumps(told)}))

    def load(self, path: Path | str) -> None:
        """Go on from a file of `save`: the next rounds come out to the same bits.

        Raises BadInput for a file that is none, and for that of other settings, images or another seed or network.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["mid"])
                held = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise BadInput(f"MID: {path} is not a saved run ({' '.join(str(error).split())})") from None
        mine = self.method.made_by(self.seed)
        if told.get("settings") != mine["settings"] or told.get("seed") != self.seed:
            raise BadInput(f"MID: {path} holds settings {told.get('settings')}, seed {told.get('seed')}, this run others")
        if told.get("mark") != self._mark():
            raise BadInput(f"MID: {path} holds a run over other clean or noisy images")
        bank = held.pop("bank", None)
        try:
            self.network.load_state_dict({name.removeprefix("network."): value for name, value in held.items()})
        except RuntimeError as error:
            raise BadInput(f"MID: {path} holds another network: {' '.join(str(error).split())[:300]}") from None
        self.bank, self.number, self.reports = bank, told["number"], told["reports"]

    def _mark(self) -> str:
        """What tells the images of one run from those of another."""
        return base_hash({"clean": self.clean, "noisy": self.noisy})


def _checked(name: str, images: Tensor) -> None:
    given = tuple(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise BadInput(f"MID: {name} images are floats (n, channels, rows, columns), got {given}")


def lag1(noise: Tensor) -> float:
    """Correlation of neighbours in a row, of each channel of (n, c, h, w) noise less its mean over all. White: 0."""
    centred = noise - noise.mean((0, 2, 3), keepdim=True)
    return float((centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean())


def _crops(images: Tensor, at: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """A random square of each named image, flipped and turned by chance."""
    made = []
    for image in at.tolist():
        row = int(torch.randint(images.shape[2] - side + 1, (), generator=rng))
        column = int(torch.randint(images.shape[3] - side + 1, (), generator=rng))
        turns, flip = (int(v) for v in torch.randint(4, (2,), generator=rng))
        crop = images[image, :, row : row + side, column : column + side].rot90(turns, (1, 2))
        made.append(crop.flip(2) if flip % 2 else crop)
    return torch.stack(made)
