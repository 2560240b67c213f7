"""R-AMT: few-shot tuning that only switches weights off; scores learn which, and old knowledge has a say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.gate import gated
from maskwright.core.mask import Mask
from maskwright.updates import Tuning
from maskwright.updates.r_amt.attention import ATTENTION, chosen
from maskwright.updates.r_amt.gate import ScoreGate
from maskwright.updates.r_amt.run import RAmtRun
from maskwright.updates.untouched import untouched


@final
@dataclass(frozen=True)
class RAmt(Tuning):
    """w' = w where M > threshold, else 0: the scores M learn by dL/dM = w dL/dw', the weights never change.

    M starts at `init` everywhere, so the model starts as itself. Every score's task gradient (cross-entropy plus
    `norm_weight` times the sum of the tensors' norms |M|_2) is taken whole where the gradient of the old knowledge
    (`temperature`^2 times cross-entropy to the untouched model's answers) agrees by chance P, and times
    1 - `drop_lambda` elsewhere (`gradient_dropout`); 0 is plain AMT, and no old knowledge is asked.
    where: "attention" (q, k, v and output maps, stacked ones too) and/or patterns of names as in the weights place.
    The paper trains by Adam at 8e-5 without decay and a cosine schedule, 30 epochs of batches of 32: a score needs
    some 60 steps of one sign to cross. Mind: under Adam the small norm term alone moves scores without a gradient.
    Raises BadInput for settings that cannot be. arXiv 2307.15049; code wuw2019/R-AMT.
    """

    where: tuple[str, ...] = (ATTENTION,)
    init: float = 0.01
    threshold: float = 0.005
    drop_lambda: float = 0.3
    temperature: float = 1.0
    norm_weight: float = 1e-4

    def validate(self) -> None:
        object.__setattr__(self, "where", (self.where,) if isinstance(self.where, str) else tuple(self.where))
        if not self.where:
            raise BadInput("r_amt: where names no weight")
        # As the float32 scores will see them: a start on the threshold is a model without its attention.
        first, threshold = torch.tensor([self.init, self.threshold]).tolist()
        if not threshold < first < float("inf"):
            raise BadInput(
                f"r_amt starts with every weight on: needs threshold < init, got {self.threshold} and {self.init}"
            )
        if not 0 <= self.drop_lambda <= 1 or not self.temperature > 0 or not self.norm_weight >= 0:
            raise BadInput(f"r_amt needs drop_lambda in 0..1, temperature > 0 and norm_weight >= 0, got {self}")

    @contextmanager
    def attach(self, model: nn.Module, *, seed: int = 0) -> Iterator[RAmtRun]:
        """Hang scores on the weights, freeze the rest; yields the run. seed: of the uniform draws.

        Raises BadInput where `where` finds nothing, or a weight is not finite, parametrized or shares memory.
        """
        found = chosen(model, self.where)
        with ExitStack() as stack:
            gates = {name: ScoreGate.of(site.value, self.init, self.threshold) for name, site in found.items()}
            run = RAmtRun(self, model, seed, found, gates)
            stack.enter_context(untouched(model, merged=lambda: run.merged))
            for name, site in found.items():
                everything = Mask(torch.ones(site.shape, dtype=torch.bool))
                slot = stack.enter_context(gated(list(site.owners), everything, cast(Any, gates[name])))
                # Registered there, the scores move with the model and stand in its state_dict while they hang on it.
                slot.register_parameter("scores", gates[name].scores)
            yield run
