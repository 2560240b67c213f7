"""SparK's claim: active-only layers keep the mask to the last map, and what is learned helps with few labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.mask import Mask
from maskwright.core.method import Claim, Effect
from maskwright.core.select import generator
from maskwright.inputs.active_maps import Maps
from maskwright.inputs.pretraining import Pretrain, Recipe
from maskwright.inputs.probe import linear_probe
from maskwright.inputs.spark import Spark
from maskwright.inputs.spark.learner import SparkLearner
from maskwright.inputs.spark.stages import still
from maskwright.lab import images as lab_images
from maskwright.lab.models import seeded
from maskwright.lab.train import accuracy, train

METHOD, TWIN = "spark", "zero_outing"
SPARK = Spark(width=32)  # 60% hidden, as in the paper; patches of 8 x 8 pixels, the net's whole stride
Labelled = tuple[Tensor, Tensor]


class Stage(nn.Module):
    """Half the size: a convolution with stride 2, and one with a residual."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(x)))


class Net(nn.Module):
    """Three stages, mean pool, a line: (batch, 1, 32, 32) -> (batch, 10)."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        with seeded(seed):
            self.stages = nn.Sequential(Stage(1, width), Stage(width, 2 * width), Stage(2 * width, 4 * width))
            self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).mean((2, 3)))


@cache
def _data(scale: str) -> tuple[Tensor, Labelled, Labelled]:
    """Images without labels (n, 1, 32, 32) uint8; 100 labelled ones, 10 a class; and the test part."""
    if scale == "full":
        found, free, test, size = lab_images.fashion_mnist(), 10_000, 3000, 28
    else:
        found, free, test, size = lab_images.digits(), 16, 20, 8
    pad = (32 - size) // 2

    def square(x: Tensor) -> Tensor:
        return F.pad(x, (pad, pad, pad, pad))

    x, y = found.train
    few = torch.cat([(y[free:] == label).nonzero().flatten()[:10] + free for label in range(10)])
    return (
        (square(x[:free]) * 255).to(torch.uint8),
        (square(x[few]), y[few]),
        (square(found.test_x[:test]), found.test_y[:test]),
    )


@contextmanager
def _dense(module: nn.Module, mask: Mask) -> Iterator[None]:
    """The twin's context: the plain dense net, on an image whose hidden patches are 0."""
    yield


@cache
def _learner(arm: str, seed: int, scale: str) -> SparkLearner:
    """The backbone of this seed, pre-trained; same order of images, crops and masks in every arm."""
    unlabelled, full = _data(scale)[0], scale == "full"
    method = replace(SPARK, hierarchy=arm != "coarsest_only", width=SPARK.width if full else 8)
    backbone = Net(seed, 32 if full else 4)
    learner = method.learner(backbone, unlabelled[:1].float() / 255, seed=seed)
    if arm == TWIN:
        learner.under = _dense
    if arm != "random":
        recipe = Recipe(steps=1000 if full else 1, batch=64 if full else 4, lr=2e-3, seed=seed)
        for _ in Pretrain(learner, len(unlabelled), lambda at: unlabelled[at], recipe).steps():
            pass
    return learner


def _quality(learner: SparkLearner, seed: int, scale: str) -> dict[str, float]:
    """With 100 labels: a line on frozen features of whole images, and all weights tuned."""
    _, few, test = _data(scale)
    with torch.no_grad():
        probe = linear_probe((learner.features(few[0]), few[1]), (learner.features(test[0]), test[1]), penalty=0.1)
    net = cast(Net, copy.deepcopy(learner.backbone))
    steps = 200 if scale == "full" else 1
    train(net, few, steps=steps, batch=50, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup=10, seed=seed)
    return {"probe": probe, "accuracy": accuracy(net, *test)}


@torch.no_grad()
def _mechanism(learner: SparkLearner, seed: int, scale: str) -> dict[str, float]:
    """On test images: where maps are not 0, and how far their channels' means are from those on the whole images.

    outside: share of the inactive places that are not 0, mean over stages. nonzero_N: share of all places of the map of
    stride N. shift_N: mean over channels of |mean under the mask - mean of whole images|, over the deviation on the whole
    ones; means are over active places for a net that has some, else over all. shift: mean over stages. shift_kept: over
    kept places for every net.
    """
    x = _data(scale)[2][0][:500]
    mask = learner.mask(x, generator(seed, "claim"))
    everything = Mask(torch.ones_like(mask.keep))
    with still(learner):
        masked, whole = learner.maps(x, mask), learner.maps(x, everything)
        error = float(learner.loss(x, generator(seed, "claim")))
    found: dict[str, float] = {}
    outside, shifts, kept = [], [], []
    for stage, part, full in zip(learner.stages, masked, whole, strict=True):
        active = Maps(mask.keep).at(part.shape[2], part.shape[3], part.device)
        some = (part != 0).any(1)
        found[f"nonzero_{stage.stride}"] = float(some.float().mean())
        outside.append(float(some[~active].float().mean()))
        rows, base = part.movedim(1, -1), full.movedim(1, -1).flatten(0, 2)
        spread = base.std(0).clamp(min=1e-6)
        seen = rows[active] if outside[-1] == 0 else rows.flatten(0, 2)
        shifts.append(float(((seen.mean(0) - base.mean(0)).abs() / spread).mean()))
        found[f"shift_{stage.stride}"] = shifts[-1]
        kept.append(float(((rows[active].mean(0) - base.mean(0)).abs() / spread).mean()))
    found |= {
        "outside": sum(outside) / len(outside),
        "shift": sum(shifts) / len(shifts),
        "shift_kept": sum(kept) / len(kept),
    }
    return {**found, "density": mask.density, "error": error}


def _pretrained(arm: str, seed: int, scale: str) -> Mapping[str, float]:
    learner = _learner(arm, seed, scale)
    return {**_quality(learner, seed, scale), **_mechanism(learner, seed, scale)}


CLAIM = Claim(
    arms={
        METHOD: partial(_pretrained, METHOD),
        TWIN: partial(_pretrained, TWIN),  # the broken twin: dense layers on the zeroed image, all else the same
        "coarsest_only": partial(_pretrained, "coarsest_only"),
        "random": lambda seed, scale: _quality(_learner("random", seed, scale), seed, scale),
        "target": lambda seed, scale: {"outside": 0.5},  # between none and all
    },
    method=METHOD, twin=TWIN,
    effects=(
        Effect("maps stay empty where the mask is, to the last stage", METHOD, "target", "outside", higher=False),
        Effect("100 labels: tuned from it better than from random weights", METHOD, "random", "accuracy"),
        # Quality, though the sheet of the paper expects it: where a patch is one place of the last map, most of a place's
        # neighbours are missing there, and a pilot showed that this moves its means more than zeros in the image do.
        Effect("channel means under the mask are nearer whole images'", METHOD, TWIN, "shift", "quality", higher=False),
        Effect("the same at the first map", METHOD, TWIN, "shift_2", "quality", higher=False),
        Effect("100 labels: better than from zero-outing", METHOD, TWIN, "accuracy", "quality"),
        Effect("a line on its features: no worse than zero-outing, to a point", METHOD, TWIN, "probe", "quality", -0.01),
        Effect("and better than on random features", METHOD, "random", "probe", "quality"),
        Effect("the hierarchy helps tuning", METHOD, "coarsest_only", "accuracy", "quality"),
    ),
    paper="ImageNet, ConvNeXt-S tuned: SparK 84.1, zero-outing 83.2, no hierarchy 83.6, no pre-training 83.1 (from memory)",
    # Seeds 0 to 2 left the tuning undecided; eight new ones, their number set from that spread before any was run.
    seeds=(10, 11, 12, 13, 14, 15, 16, 17), needs=(f"debian:{lab_images.FASHION_MNIST}",), trains=True,
)  # fmt: skip
