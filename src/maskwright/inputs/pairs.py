"""Preference pairs as two models read them, and a run that gives the loss of a batch to the user's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.inputs.preference import IGNORE, Preference, response_tokens, token_preference_loss


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """2n rows, the n chosen ones first, then the rejected ones of the same prompts: ids, attention and labels (2n, length).

    Padded on the right; labels hold the response's tokens, IGNORE elsewhere. Raises BadInput for shapes that differ,
    an odd number of rows, padding on the left, a response in the padding, and a row without a response.
    """

    ids: Tensor
    attention: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = self.ids.shape
        if self.ids.ndim != 2 or len(self.ids) % 2 or self.attention.shape != shape or self.labels.shape != shape:
            told = ", ".join(str(tuple(t.shape)) for t in (self.ids, self.attention, self.labels))
            raise BadInput(f"ids, attention and labels of pairs are (2 n, length), got shapes {told}")
        if bool((self.attention.long().diff(dim=1) > 0).any()):
            raise BadInput(f"pairs of shape {tuple(shape)} are padded on the left: pad on the right")
        if bool(((self.labels != IGNORE) & (self.attention == 0)).any()):
            raise BadInput(f"labels of shape {tuple(shape)} have a response token in the padding")
        response_tokens(self.labels)

    @property
    def response(self) -> Tensor:
        """(2n, length - 1) bool: the tokens that count, each one column before its place."""
        return response_tokens(self.labels)

    @classmethod
    def of(cls, batch: Pairs | Mapping[str, Any]) -> Pairs:
        """From `input_ids`, `attention_mask` and `completion_mask` (what TRL's DataCollatorForPreference gives) or
        `labels` of 2n rows; or from the same names with `chosen_` and `rejected_` before them, n rows each."""
        if isinstance(batch, Pairs):
            return batch
        if "chosen_input_ids" in batch:
            sides = [cls._rows(batch, side) for side in ("chosen_", "rejected_")]
            if len(sides[0][0]) != len(sides[1][0]):
                raise BadInput(f"{len(sides[0][0])} chosen and {len(sides[1][0])} rejected responses are no pairs")
            width = max(rows[0].shape[1] for rows in sides)
            return cls(*(torch.cat([_wider(a, width, fill), _wider(b, width, fill)])
                         for a, b, fill in zip(*sides, (0, 0, IGNORE), strict=True)))  # fmt: skip
        return cls(*cls._rows(batch, ""))

    @staticmethod
    def _rows(batch: Mapping[str, Any], side: str) -> tuple[Tensor, Tensor, Tensor]:
        lacks = [side + name for name in ("input_ids", "attention_mask") if side + name not in batch]
        if not {side + "labels", side + "completion_mask"} & set(batch):
            lacks.append(f"{side}labels or {side}completion_mask")
        if lacks:
            raise BadInput(f"a batch of pairs lacks {', '.join(lacks)}; it has {', '.join(batch) or 'nothing'}")
        ids, attention = batch[side + "input_ids"], batch[side + "attention_mask"]
        if side + "labels" in batch:
            return ids, attention, batch[side + "labels"]
        chosen = batch[side + "completion_mask"]
        if chosen.shape != ids.shape:
            raise BadInput(f"{side}completion_mask of shape {tuple(chosen.shape)} lies on ids of {tuple(ids.shape)}")
        return ids, attention, ids.masked_fill(chosen == 0, IGNORE)


def _wider(rows: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """The weights of the tokens' rewards and divergences, (2n, length - 1) or a number for all, and a penalty (n,)."""

    reward: Tensor | float = 1.0
    kl: Tensor | float = 1.0
    penalty: Tensor | None = None


Read = Callable[[Pairs], tuple[Tensor, TokenWeights]]


def logits_of(model: nn.Module, pairs: Pairs, **more: Any) -> Any:
    """The output of a causal language model of transformers' form on the rows of the pairs."""
    return model(input_ids=pairs.ids, attention_mask=pairs.attention, use_cache=False, **more)


@final
class PreferenceRun:
    """`loss(batch)` for the user's own loop. `read(pairs)` gives the reference's logits and the tokens' weights."""

    def __init__(self, policy: nn.Module, read: Read, beta: float, *, hold_chosen_kl: bool = False) -> None:
        self.policy, self.read, self.beta, self.hold_chosen_kl = policy, read, beta, hold_chosen_kl

    def loss(self, batch: Pairs | Mapping[str, Any]) -> tuple[Tensor, Preference]:
        """The mean loss of a batch (see `Pairs.of`) with its graph, and what it was made of."""
        pairs = Pairs.of(batch)
        reference, weights = self.read(pairs)
        policy = logits_of(self.policy, pairs).logits
        half = len(pairs.ids) // 2
        m_u, m_d = (w if isinstance(w, int | float) else (w[:half], w[half:]) for w in (weights.reward, weights.kl))
        loss, told = token_preference_loss(
            policy[:half], policy[half:], reference[:half], reference[half:], pairs.labels[:half], pairs.labels[half:],
            m_u, m_d, self.beta, hold_chosen_kl=self.hold_chosen_kl,
        )  # fmt: skip
        return (loss if weights.penalty is None else loss + weights.penalty.mean()), told


@contextmanager
def still(reference: nn.Module, policy: nn.Module) -> Iterator[None]:
    """The reference in eval mode, its modes put back on leaving. Raises BadInput where it would train with the policy."""
    mine = {id(parameter) for parameter in policy.parameters()}
    for name, parameter in reference.named_parameters():
        if id(parameter) in mine:
            raise BadInput(f"the reference's {name} is the policy's own: give it a copy (copy.deepcopy(policy))")
        if parameter.requires_grad:
            raise BadInput(f"the reference's {name} asks for a gradient: reference.requires_grad_(False)")
    modes = [(module, module.training) for module in reference.modules()]
    reference.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
