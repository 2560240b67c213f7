"""SR-STE's claim: the pull settles the mask. Gated on how often weights flip (SAD), not on accuracy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from maskwright.core.gate import Gate, Ste, hard
from maskwright.core.mask import Mask
from maskwright.core.method import Claim, Effect
from maskwright.lab.images import digits, mnist5k
from maskwright.lab.models import Mlp
from maskwright.lab.train import accuracy, train
from maskwright.weights import MaskedTraining, Run, WeightSite, bake, training
from maskwright.weights.sr_ste import SrSte

DECAY = 2e-3  # the sheet's pilot scale: lr x decay x steps / (1 - momentum) = 1.6


@dataclass(frozen=True)
class PullKept(Ste):
    """The broken gate: it pulls on what is kept."""

    def pull(self, weight: Tensor, keep: Tensor) -> Tensor | None:
        return super().pull(weight, ~keep)


@dataclass(frozen=True)
class Variant(MaskedTraining):
    """SR-STE's masks under another gate."""

    inner: SrSte = field(default_factory=SrSte)
    other: Gate = hard

    @property
    def gate(self) -> Gate:
        return self.other

    def start(self, found: Mapping[str, WeightSite]) -> dict[str, Mask]:
        return self.inner.start(found)

    def update(self, site: WeightSite, old: Mask, step: int) -> Mask | None:
        return self.inner.update(site, old, step)


@contextmanager
def _entered(
    method: MaskedTraining, seed: int, runs: list[Run], net: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    with training(net, optimizer, method, seed=seed) as run:
        runs.append(run)
        yield


def _run(method: MaskedTraining | None, seed: int, scale: str) -> dict[str, float]:
    data, sizes, steps = (mnist5k(), (784, 256, 256, 10), 800) if scale == "full" else (digits(), (64, 32, 32, 10), 40)
    model = Mlp(sizes, seed=seed)
    runs: list[Run] = []
    context = None if method is None else partial(_entered, method, seed, runs)
    loss = train(model, data.train, steps=steps, batch=64, lr=0.1, seed=seed, context=context)
    sad = 0.0
    if runs:
        bake(model, runs[0].masks)
        sad = sum(runs[0].moved) / steps / runs[0].masks.total
    with torch.no_grad():
        right = accuracy(model, *data.test)
    return {"sad": sad, "accuracy": right, "train_loss": loss}


def _arm(method: MaskedTraining | None):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _run(method, seed, scale)


def _nm(decay: float) -> SrSte:
    return SrSte(n=1, m=16, decay=decay)


CLAIM = Claim(
    arms={
        "dense": _arm(None),
        "ste": _arm(_nm(0.0)),
        "sr_ste": _arm(_nm(DECAY)),
        "negative": _arm(_nm(-DECAY)),
        "masked_gradient": _arm(Variant(inner=_nm(0.0))),
        "pull_on_kept": _arm(Variant(inner=_nm(0.0), other=PullKept(DECAY))),
    },
    method="sr_ste",
    twin="pull_on_kept",
    effects=(
        Effect("the pull lowers SAD below plain straight-through", "sr_ste", "ste", "sad", higher=False),
        Effect("a negative pull raises SAD", "ste", "negative", "sad", higher=False),
        Effect("no less accurate than straight-through by 1 point", "sr_ste", "ste", "accuracy", "quality", -0.01),
        Effect("more accurate than a masked gradient", "sr_ste", "masked_gradient", "accuracy", "quality"),
        Effect("a negative pull is not better", "sr_ste", "negative", "accuracy", "quality", -0.01),
    ),
    paper="ResNet-50 on ImageNet, 2:4: SR-STE 77.0 top-1, straight-through about 76.4",
    trains=True,
)
