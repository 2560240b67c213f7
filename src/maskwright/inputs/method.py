"""What a room of this place is: settings that say which entries stay, and for pre-training a learner around a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from maskwright import __version__
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask

_PLAIN: Mapping[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a word"),
}


class InputMethod(ABC):
    """A final frozen dataclass of a paper's settings, every one with a default. Checks its settings when made.

    Raises BadInput where a field that is annotated as plain `bool`, `int`, `float` or `str` is given anything else.
    """

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value, (kind, words) = getattr(self, field.name), _PLAIN.get(str(field.type), (object, ""))
            if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
                raise BadInput(f"{type(self).__name__}: {field.name}: {words} is needed, got {value!r:.80}")
        self.validate()

    def validate(self) -> None:
        """Raise BadInput for settings that make no sense."""
        return None

    @abstractmethod
    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask | SoftMask:
        """The mask this method lays on `x`, (batch, *grid): drawn for its shape, or chosen by its values as scores."""

    def made_by(self, seed: int) -> dict[str, Any]:
        """How masks of this method were made, as stored beside them."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
        slug = type(self).__module__.split(".")[-2]
        return {"method": slug, "version": __version__, "settings": plain, "seed": seed}


@dataclass(frozen=True, eq=False)
class Shown:
    """What a learner sees and says of images: as they are, with the hidden part grey, and filled in. (n, c, h, w) each."""

    images: Tensor
    hidden: Tensor
    filled: Tensor


class Learner(nn.Module, ABC):
    """A backbone with what its pre-training adds. Trained by the user's optimiser on `loss`; the backbone is kept."""

    backbone: nn.Module

    @abstractmethod
    def loss(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """The loss of one batch (batch, channels, height, width), its masks drawn from `rng`."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(batch, features) of whole images: what a linear probe reads."""

    @abstractmethod
    def reconstruct(self, images: Tensor, rng: torch.Generator) -> Shown:
        """What is seen and what is made of it, in the images' own units, without gradients."""


class Pretraining(InputMethod):
    """A method that pre-trains a backbone on images without labels."""

    @abstractmethod
    def learner(self, backbone: nn.Module, example: Tensor, *, seed: int = 0) -> Learner:
        """Build the learner around a backbone; `example` (1 or more, channels, height, width) gives the sizes.

        The backbone stays the user's own class with its own names: its state dict afterwards loads into a fresh one.
        Raises BadInput naming a module that this method cannot treat.
        """
