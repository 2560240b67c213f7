"""What a run did, in three numbers a step: enough to make the trained weights again from those it began with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from maskwright.core.cache import write_atomic
from maskwright.core.errors import BadInput

FORMAT, VERSION = "maskwright.sparse_mezo.log", 1


class Row(NamedTuple):
    """One step: a seed for each direction, the slope along each, the rate. None: the step was skipped."""

    seeds: tuple[int, ...]
    gradients: tuple[float, ...] | None
    lr: float


@dataclass(eq=False)
class Log:
    """The steps of a run, with how it was made and a hash of the weights it began with."""

    made_by: Mapping[str, Any]
    base: str
    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def save(self, path: str | Path) -> None:
        """Write one JSON file; a Python float in it reads back as the same float."""
        told = {"format": FORMAT, "version": VERSION, "made_by": self.made_by, "base": self.base, "rows": self.rows}
        write_atomic(Path(path), json.dumps(told, allow_nan=False).encode())

    @staticmethod
    def load(path: str | Path) -> Log:
        """Read what `save` wrote. Raises BadInput in one line for anything else."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if told["format"] != FORMAT or told["version"] != VERSION:
                raise BadInput(f"{path}: not a log of sparse_mezo in version {VERSION}")
            rows = [_row(*row) for row in told["rows"]]
            return Log({**told["made_by"], "seed": int(told["made_by"]["seed"])}, str(told["base"]), rows)
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: no log of sparse_mezo can be read: {' '.join(str(error).split())}") from None

    def replay(self, model: nn.Module) -> None:
        """Do all steps again on a model with the weights that the run began with: they end as the run's, to the bit.

        No forward is run. Raises BadInput when the weights are others, or the settings are not sparse_mezo's.
        """
        from maskwright.updates.sparse_mezo.method import SparseMezo

        try:
            settings = dict(self.made_by["settings"])
            method = SparseMezo(**{**settings, "where": tuple(settings["where"])})
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"the log's settings are not those of sparse_mezo: {' '.join(str(error).split())}") from None
        with method.attach(model, seed=self.made_by["seed"]) as run:
            if run.log.base != self.base:
                raise BadInput("the model's trained tensors are not those the log began with (hash of names and values)")
            for row in self.rows:
                run.again(row)


def _row(seeds: Any, gradients: Any, lr: Any) -> Row:
    row = Row(tuple(map(int, seeds)), None if gradients is None else tuple(map(float, gradients)), float(lr))
    numbers = (*(row.gradients or ()), row.lr)
    if not all(map(math.isfinite, numbers)) or (row.gradients is not None and len(row.gradients) != len(row.seeds)):
        raise ValueError(f"a row of {len(row.seeds)} seeds and {numbers}")
    return row
