"""The network that `protect` makes noise on: a small one of ours, or any function of the user's."""

from __future__ import annotations

import torch
from torch import nn

from maskwright.cli.named import made_by, shown

_WIDTHS = (16, 32, 64, 64)  # after these the last one again


def surrogate(name: str | None, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """(batch, *shape) -> logits (batch, classes), with weights from torch's generator as it stands.

    name: None for strided convolutions with batch norm down to a map of at most 8; or `package.module:function`, called with
    (channels, classes). Raises BadInput saying what is missing, and for a network that fails on an image.
    """
    if name is not None:
        net = made_by(name, "surrogate", shape[0], classes)
        return shown(net, torch.zeros(1, *shape), f"the network of surrogate {name!r}, called with ({shape[0]}, {classes}),")
    layers: list[nn.Module] = []
    inputs, side, at = shape[0], min(shape[1:]), 0
    while at < 3 or side > 8:
        outputs, kernel, stride = _WIDTHS[min(at, len(_WIDTHS) - 1)], 3 if at else 5, 2 if side > 8 else 1
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs, side, at = outputs, -(-side // stride), at + 1
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
