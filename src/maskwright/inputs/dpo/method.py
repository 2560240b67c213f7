"""DPO and its token-level forms TDPO1 and TDPO2: every response token counts the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import SoftMask
from maskwright.inputs.method import InputMethod
from maskwright.inputs.pairs import Pairs, PreferenceRun, TokenWeights, logits_of, still

Form = Literal["dpo", "tdpo1", "tdpo2"]


@final
@dataclass(frozen=True)
class Dpo(InputMethod):
    """-log sigmoid(beta (u - delta)), u = the log ratio to the reference of the chosen response less the rejected's.

    form: "dpo" has delta = 0; "tdpo1" the forward divergence of the rejected response less the chosen's; "tdpo2"
    `alpha` times that, with no gradient through the chosen's. beta: how dear the distance from the reference is.
    Raises BadInput for beta <= 0, alpha < 0 and another form. arXiv 2305.18290 eq. 7; TDPO: 2404.11999 eqs. 16 and 17.
    """

    beta: float = 0.1
    form: Form = "dpo"
    alpha: float = 0.5

    def validate(self) -> None:
        if not 0 < self.beta < float("inf") or not 0 <= self.alpha < float("inf"):
            raise BadInput(f"dpo needs beta > 0 and alpha >= 0, got {self.beta} and {self.alpha}")
        if self.form not in get_args(Form):
            raise BadInput(f"dpo has the forms {', '.join(get_args(Form))}, not {self.form!r}")

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> SoftMask:
        """1 for every token of x (batch, tokens, ...)."""
        return SoftMask(torch.ones(x.shape[:2], device=x.device))

    @contextmanager
    def attach(self, policy: nn.Module, reference: nn.Module) -> Iterator[PreferenceRun]:
        """A run whose `loss(batch)` trains the policy, a causal language model of transformers' form.

        The reference is another copy, frozen; it stands in eval mode meanwhile. Raises BadInput where they share weights.
        """
        weights = TokenWeights(1.0, {"dpo": 0.0, "tdpo1": 1.0, "tdpo2": self.alpha}[self.form])

        def read(pairs: Pairs) -> tuple[Tensor, TokenWeights]:
            with torch.no_grad():
                return logits_of(reference, pairs).logits, weights

        with still(reference, policy):
            yield PreferenceRun(policy, read, self.beta, hold_chosen_kl=self.form == "tdpo2")
