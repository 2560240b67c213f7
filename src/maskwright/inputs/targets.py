"""What a token that was not seen is to be told: pixels, pixels of a normalised patch, gradients, or any function."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.apply import over
from maskwright.inputs.hog import hog_tokens
from maskwright.inputs.patches import patches, unpatched

Target = Callable[[Tensor, int], Tensor]  # images (batch, channels, h, w), patch -> (batch, tokens, features)


def normalised(images: Tensor, patch: int) -> Tensor:
    """Each patch's pixels less their mean, over their standard deviation (MAE's norm_pix_loss, arXiv 2111.06377).

    Raises BadInput for patches of one value.
    """
    rows = patches(images, patch)
    if rows.shape[2] == 1:
        told = f"images of shape {tuple(images.shape)} in patches of {patch} x {patch} have one value a patch"
        raise BadInput(f"{told}, which cannot be normalised: take larger patches or the target 'pixels'")
    mean, spread = _level(rows)
    return (rows - mean) / spread


TARGETS: Mapping[str, Target] = {"pixels": patches, "normalised": normalised, "hog": hog_tokens}


def target_of(named: str | Target) -> Target:
    """The function of a name in TARGETS, or the function given. Raises BadInput listing the names."""
    if callable(named):
        return named
    if named not in TARGETS:
        raise BadInput(f"unknown target {named!r}; known: {', '.join(TARGETS)}, or a function (images, patch) -> tokens")
    return TARGETS[named]


def made(target: Target, images: Tensor, patch: int) -> Tensor:
    """`target(images, patch)`, checked: (batch, tokens, features), finite, without gradient. Raises BadInput."""
    with torch.no_grad():
        rows = target(images, patch)
    tokens = (images.shape[-2] // patch) * (images.shape[-1] // patch)
    if rows.ndim != 3 or tuple(rows.shape[:2]) != (len(images), tokens):
        want = f"({len(images)}, {tokens}, features)"
        raise BadInput(f"the target of images of shape {tuple(images.shape)} has shape {tuple(rows.shape)}, not {want}")
    if not bool(rows.isfinite().all()):
        at = tuple(int(part) for part in (~rows.isfinite()).nonzero()[0])
        raise BadInput(f"the target of images of shape {tuple(images.shape)} is NaN or infinite at {at}")
    return rows


def painted(images: Tensor, mask: Mask, told: Tensor, target: Target, patch: int) -> Tensor:
    """`images` with every hidden patch filled from what was `told` of it (batch, tokens, features). Pixels are put in.

    Normalised ones get the hidden patch's true mean and contrast back, as MAE's own pictures do. Another target does not
    say pixels: a hidden patch is then filled with the patch seen in this batch whose target is nearest to what was told.
    mask: (batch, rows, columns) of patches.
    """
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    rows, told = patches(images, patch), told.to(images.dtype)
    if target is normalised:
        mean, spread = _level(rows)
        told = told * spread + mean
    elif target is not patches:
        seen = mask.keep.flatten()
        known, found = target(images, patch).flatten(0, 1)[seen], rows.flatten(0, 1)[seen]
        near = torch.cdist(told.flatten(0, 1), known).argmin(1)
        told = found[near].view_as(rows)
    return torch.where(over(images, mask.keep), images, unpatched(told, patch, grid))


def _level(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(-1, keepdim=True), (rows.var(-1, keepdim=True) + 1e-6).sqrt()
