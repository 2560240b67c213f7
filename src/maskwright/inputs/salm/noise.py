"""The alternation behind SALM: a surrogate learns on x + delta, then delta descends the surrogate's loss in its masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.core.store import replacing
from maskwright.inputs.calling import name_of, naming, trying
from maskwright.inputs.perturbation import Ball
from maskwright.inputs.salm.released import Protected, noisy, unit

if TYPE_CHECKING:
    from maskwright.inputs.salm.method import Salm

View = Callable[[Tensor, torch.Generator], Tensor]
Choose = Callable[[Tensor, Tensor], Mask]  # score (rows, height, width), numbers of these rows -> their mask


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The surrogate's usual optimiser (that of EM's code)."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


@final
class Noise:
    """A run of SALM, a round at a time. Deterministic in (settings, images, labels, seed) and resumable between rounds."""

    def __init__(
        self, method: Salm, images: Tensor, labels: Tensor, surrogate: Callable[[], nn.Module], seed: int,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], augment: View | None, choose: Choose,
    ) -> None:  # fmt: skip
        self.method, self.seed, self.augment, self.choose = method, seed, augment, choose
        self.clean, self.labels = _checked(images, labels)
        classes = self.labels.unique()
        self.row = torch.searchsorted(classes, self.labels) if method.classwise else torch.arange(len(images))
        rows, size = int(self.row.max()) + 1, tuple(images.shape[1:])
        method.keep(torch.zeros(1, *size[1:]))  # refuses a density or a window that does not fit, before any work
        self.ball = Ball(method.eps, 0.0, 1.0)
        self.delta, self.keep = torch.zeros(rows, *size), torch.zeros(rows, *size[1:], dtype=torch.bool)
        self.pattern = method.keep(torch.zeros(1, *size[1:])).pattern
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(surrogate)
        with naming(f"{name_of(optimizer)}(parameters)"):
            self.optimizer = optimizer(list(self.model.parameters()))
        self.rounds, self.error = 0, 1.0

    @property
    def done(self) -> bool:
        """The surrogate's error is below `stop`, or all rounds are over."""
        return self.rounds > 0 and (self.error < self.method.stop or self.rounds >= self.method.rounds)

    def round(self) -> float:
        """M steps of the surrogate, then T steps of every image's noise; gives the surrogate's error on x + delta."""
        rng = generator(self.seed, f"salm round {self.rounds}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.initial_seed())  # for a surrogate that draws by itself
            self._fit(rng)
            self.model.eval()  # its batch statistics are not to depend on the noise that is being made
            for part in self._parts():
                self._perturb(part, rng)
        self.rounds += 1
        self.error = self._error()
        return self.error

    def result(self) -> Protected:
        """The protected images as they stand after the rounds that were run."""
        mask = Mask(self.keep, self.pattern)
        return Protected(self.clean, self.delta, mask, self.row, self.method.eps, self.rounds, self.error)

    def save(self, path: Path | str) -> None:
        """Everything a run needs to go on, in one safetensors file that appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"delta": self.delta, "keep": self.keep.to(torch.uint8)}
        tensors |= {f"model.{name}": value.detach().clone() for name, value in self.model.state_dict().items()}
        plain = self.optimizer.state_dict()["state"]
        for at, kept in plain.items():
            tensors |= {f"optimizer.{at}.{key}": value.clone() for key, value in kept.items() if isinstance(value, Tensor)}
        told = {"mark": self._mark(), "rounds": self.rounds, "error": self.error}
        with replacing(Path(path)) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"salm": json.dumps(told)})

    def load(self, path: Path | str) -> None:
        """Go on from a saved state. Raises BadInput for a file that is none, or that of other images or settings."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:
                told = json.loads((handle.metadata() or {})["salm"])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        except (OSError, SafetensorError, ValueError, KeyError):
            raise BadInput(f"{path}: not the state of a run of salm") from None
        if told["mark"] != self._mark():
            raise BadInput(f"{path}: the unfinished run has other images, labels, settings or another seed")
        inner: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, at, key = name.split(".", 2)
                inner.setdefault(int(at), {})[key] = value
        model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": inner})
        except (RuntimeError, ValueError, KeyError) as error:
            raise BadInput(f"{path}: the surrogate is another network: {' '.join(str(error).split())[:300]}") from None
        self.delta, self.keep = tensors["delta"], tensors["keep"].bool()
        self.rounds, self.error = int(told["rounds"]), float(told["error"])

    def _mark(self) -> str:
        digest = hashlib.sha256(json.dumps(self.method.made_by(self.seed), sort_keys=True).encode())
        for value in (self.clean, self.labels):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _parts(self) -> list[Tensor]:
        """Numbers of images that together own their rows of noise: a batch of them, or all of a class."""
        if self.method.classwise:
            return [(self.row == row).nonzero().flatten() for row in range(len(self.delta))]
        return list(torch.arange(len(self.clean)).split(self.method.batch))

    def _build(self, surrogate: Callable[[], nn.Module]) -> None:
        """Make the network and show it one image: what does not fit is refused before any work."""
        self.name = name_of(surrogate)
        with naming(f"{self.name}()"):
            self.model = surrogate()
        if not isinstance(self.model, nn.Module):
            raise BadInput(f"{self.name}() gives a {type(self.model).__name__}, a torch module is needed as the surrogate")
        if not any(each.requires_grad for each in self.model.parameters()):
            raise BadInput(f"{self.name}() gives a network without a parameter to train")
        with trying(self.model):
            first = torch.arange(1)
            self._loss(self._logits(unit(self.clean[first])), first, "sum")

    def _view(self, x: Tensor, rng: torch.Generator) -> Tensor:
        if self.augment is not None:
            with naming(f"{name_of(self.augment)} of images of shape {tuple(x.shape)}"):
                x = self.augment(x, rng)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        with naming(f"the network of {self.name}() on images of shape {tuple(x.shape)}"):
            return self.model(x)  # type: ignore[no-any-return]

    def _loss(self, logits: Tensor, index: Tensor, reduction: str) -> Tensor:
        if not isinstance(logits, Tensor):
            raise BadInput(f"the surrogate gives a {type(logits).__name__}, logits (batch, classes) are needed")
        if logits.ndim != 2 or len(logits) != len(index) or logits.shape[1] <= int(self.labels.max()):
            given = f"{tuple(logits.shape)} for {len(index)} images"
            raise BadInput(f"the surrogate gives {given}, labels go up to {int(self.labels.max())}")
        loss = F.cross_entropy(logits, self.labels[index], reduction=reduction)
        if not bool(loss.isfinite()):
            raise BadInput(f"the surrogate's loss is {float(loss.detach())} in round {self.rounds}: train it more gently")
        return loss

    def _fit(self, rng: torch.Generator) -> None:
        self.model.train()
        # Differs: the order is drawn anew in every round, so that a state needs no position in it.
        left, batch = torch.empty(0, dtype=torch.int64), min(self.method.batch, len(self.clean))
        for _ in range(self.method.model_steps):
            if len(left) < batch:  # no smaller batch at the end: a batch norm cannot take one image
                left = torch.randperm(len(self.clean), generator=rng)
            index, left = left[:batch], left[batch:]
            x = noisy(unit(self.clean[index]), self.delta[self.row[index]])
            self.optimizer.zero_grad(set_to_none=True)
            self._loss(self._view(x, rng), index, "mean").backward()
            self.optimizer.step()

    def _slopes(self, index: Tensor, delta: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """x + delta of some images, and each one's gradient of its own loss by it (0 where it is clipped)."""
        wanted = unit(self.clean[index]) + delta
        x = wanted.clamp(0, 1).requires_grad_()
        # The sum, not the mean: an image's gradient does not depend on how many others are in its batch.
        (slope,) = torch.autograd.grad(self._loss(self._view(x, rng), index, "sum"), x)
        return x.detach(), torch.where((wanted < 0) | (wanted > 1), slope.new_zeros(()), slope)

    def _perturb(self, part: Tensor, rng: torch.Generator) -> None:
        rows = self.row[part].unique()
        local = torch.searchsorted(rows, self.row[part])
        delta, pieces = self.delta[rows], range(0, len(part), self.method.batch)
        cuts = [slice(first, first + self.method.batch) for first in pieces]
        if self.rounds % self.method.refresh == 0:
            score = torch.zeros(len(rows), *delta.shape[2:])
            for cut in cuts:
                x, slope = self._slopes(part[cut], delta[local[cut]], rng)
                score.index_add_(0, local[cut], (slope * x if self.method.taylor else slope).abs().sum(1))
            self.keep[rows] = self.choose(score, rows).keep
        mask, own = Mask(self.keep[rows], self.pattern), None if self.method.classwise else unit(self.clean[part])
        delta = self.ball.project(delta, mask, own)
        for _ in range(self.method.noise_steps):
            slopes = torch.zeros_like(delta)
            for cut in cuts:
                slopes.index_add_(0, local[cut], self._slopes(part[cut], delta[local[cut]], rng)[1])
            delta = self.ball.descend(delta, slopes, mask, self.method.rate * self.method.eps, own)
        self.delta[rows] = delta

    @torch.no_grad()
    def _error(self) -> float:
        wrong = 0
        for index in torch.arange(len(self.clean)).split(self.method.batch):
            x = noisy(unit(self.clean[index]), self.delta[self.row[index]])
            wrong += int((self._logits(x).argmax(1) != self.labels[index]).sum())
        return wrong / len(self.clean)


def _checked(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    for name, given in (("images", images), ("labels", labels)):
        if given is not None and not isinstance(given, Tensor):
            raise BadInput(f"{name} are a tensor, got a {type(given).__name__}: torch.as_tensor makes one")
    if images.ndim != 4 or not images.numel():
        raise BadInput(f"images are (n, channels, height, width), got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise BadInput(f"images of shape {tuple(images.shape)} are uint8 or real values in [0, 1], and these are not")
        images = images.float()
    if labels is None or labels.is_floating_point() or tuple(labels.shape) != (len(images),) or bool((labels < 0).any()):
        shape = None if labels is None else tuple(labels.shape)
        raise BadInput(f"{len(images)} images need as many labels, whole numbers from 0; got {shape}")
    if len(labels.unique()) < 2:
        raise BadInput("all images have one label: there is nothing to learn, and nothing to protect")
    return images.detach(), labels.long()
