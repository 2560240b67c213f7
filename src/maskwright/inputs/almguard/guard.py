"""What ALMGuard makes: bin gradients of both losses, the chosen bins, and the perturbation that lies in them alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.store import replacing

_NAMES = ("safety", "utility", "keep", "delta")


@dataclass(frozen=True)
class Visit:
    """One clip's turn in training: Adam steps done and the last loss seen."""

    epoch: int
    clip: int
    steps: int
    loss: float


@dataclass(frozen=True, eq=False)
class Guard:
    """safety, utility: (bins,) mean |gradient|. mask: (1, bins). delta: (1, bins, frames), 0 outside the kept bins.

    skipped: clips without a transcript, which both averages leave out. log: the visits in order (not saved).
    """

    safety: Tensor
    utility: Tensor
    mask: Mask
    delta: Tensor
    made_by: Mapping[str, Any]
    skipped: int = 0
    log: tuple[Visit, ...] = field(default=())

    def apply(self, features: Tensor) -> Tensor:
        """features + delta, (batch, bins, frames), for every clip, harmless ones too.

        Differs: the reference knows one length (30 s, padded); here a shorter clip takes delta's first frames and a longer
        one repeats it from the start. Raises BadInput for another number of bins and for values that are not finite.
        """
        check(features, self.delta.shape[1])
        frames, have = features.shape[2], self.delta.shape[2]
        return features + self.delta.repeat(1, 1, -(-frames // have))[:, :, :frames].to(features)

    def save(self, path: Path | str) -> None:
        """One .safetensors, which appears whole or not at all: both averaged gradients, the mask and delta."""
        tensors = dict(zip(_NAMES, (self.safety, self.utility, self.mask.keep, self.delta), strict=True))
        told = {"made_by": json.dumps(dict(self.made_by), sort_keys=True), "skipped": str(self.skipped)}
        with replacing(Path(path)) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, told)

    @staticmethod
    def load(path: Path | str) -> Guard:
        """Read what `save` wrote. Raises BadInput for any other file, and for a delta that is not 0 outside the mask."""
        try:
            with safe_open(path, "pt") as file:
                safety, utility, keep, delta = (file.get_tensor(name) for name in _NAMES)
                told = file.metadata() or {}
            made_by, skipped = json.loads(told["made_by"]), int(told["skipped"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"{path} is not a saved guard: {' '.join(str(error).split())}") from None
        bins = tuple(safety.shape)
        fits = len(bins) == 1 and utility.shape == bins and keep.shape == (1, *bins) and keep.dtype == torch.bool
        if not fits or delta.ndim != 3 or delta.shape[:2] != keep.shape or bool(delta[~keep].ne(0).any()):
            raise BadInput(f"{path} is not a saved guard: its mask and its perturbation do not fit each other")
        return Guard(safety, utility, Mask(keep, Unstructured((0,))), delta, made_by, skipped)


def check(features: Tensor, bins: int | None = None) -> None:
    """Raise BadInput unless features are finite reals (batch, bins, frames) with this number of bins."""
    if not isinstance(features, Tensor):
        raise BadInput(f"features are a tensor (batch, bins, frames), got a {type(features).__name__}")
    if features.ndim != 3 or 0 in features.shape or not features.dtype.is_floating_point:
        raise BadInput(f"features are real (batch, bins, frames), got {features.dtype} of shape {tuple(features.shape)}")
    if bins is not None and features.shape[1] != bins:
        raise BadInput(f"features of shape {tuple(features.shape)} have {features.shape[1]} bins, expected {bins}")
    if not bool(features.isfinite().all()):
        raise BadInput(f"features of shape {tuple(features.shape)} are not finite")
