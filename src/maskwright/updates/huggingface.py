"""Sparse fine-tuning inside the Hugging Face Trainer: one callback."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask

try:
    from transformers import TrainerCallback
except ImportError:  # the class is then only a reason
    TrainerCallback = object  # type: ignore[assignment,misc]

from maskwright.updates.restriction import restrict


class RestrictCallback(TrainerCallback):  # type: ignore[misc]
    """`Trainer(..., callbacks=[RestrictCallback(masks)])`: only kept entries move, as in `restrict`.

    rest: whether parameters without a mask move freely. Raises BadInput when training begins, for masks that do not fit.
    """

    def __init__(self, masks: Mapping[str, Mask], *, rest: bool = True) -> None:
        if TrainerCallback is object:
            raise BadInput("the Trainer needs the extra `lm`: pip install 'maskwright[lm]'")
        self.masks, self.rest = masks, rest
        self._inside: ExitStack | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        optimizer, model = given["optimizer"], given["model"]
        # accelerate wraps the optimiser and calls the step of what it wraps: hooks belong there.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._inside = ExitStack()
        self._inside.enter_context(restrict(optimizer, self.masks, model, rest=self.rest))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._inside is not None:
            self._inside.close()
            self._inside = None
