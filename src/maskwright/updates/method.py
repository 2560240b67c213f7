"""Tuning: what a training room of this place is. It attaches to a model; the user's own optimiser and loop do the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, Protocol

from torch import nn

from maskwright import __version__
from maskwright.core.maskset import MaskSet


class TuningRun(Protocol):
    """A model under a tuning method, between entering and leaving `attach`."""

    trainable: list[nn.Parameter]

    def masks(self) -> MaskSet:
        """The entries of each site that the update may touch, exact, as they are now."""
        ...

    def merge(self) -> None:
        """Write the update into the model's own weights: on leaving it is a plain module that computes the same."""
        ...


class Tuning(ABC):
    """A final frozen dataclass of a paper's settings, every one with a default. Checks its settings when made."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise BadInput for settings that make no sense."""
        return None

    @abstractmethod
    def attach(self, model: nn.Module, *, seed: int = 0) -> AbstractContextManager[Any]:
        """Hang the method on a model; yields a run (`trainable`, `masks()`, `merge()` and what the method adds).

        On leaving, the model is as before but for what was merged or trained in place: no hook, no parametrization.
        """

    def made_by(self, seed: int) -> dict[str, Any]:
        """How masks of this method were made, as stored in mask and delta files."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
        slug = type(self).__module__.split(".")[-2]
        return {"method": slug, "version": __version__, "settings": plain, "seed": seed}
