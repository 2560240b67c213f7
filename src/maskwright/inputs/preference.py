"""Preference losses that weigh every response token: DPO and its kin as one formula over per-token rewards and divergences.

Logits (n, length, vocabulary) at position t tell token t + 1, so whatever belongs to a token stands at column t - 1 of
(n, length - 1). Labels hold the tokens of the response and IGNORE elsewhere; what the models say of prompt and padding
never enters, NaN included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskwright.core.errors import BadInput

IGNORE = -100
CHUNK = 1 << 22  # entries of (tokens, vocabulary) worked on at a time
Weight = float | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Terms:
    """Of each token, (n, length - 1) and 0 outside the response: `reward` = log pi - log pi_r of the token, and `kl` =
    sum over the vocabulary of pi_r (log pi_r - log pi) before it (None where not asked for). `response` is boolean."""

    reward: Tensor
    kl: Tensor | None
    response: Tensor


@dataclass(frozen=True, eq=False)
class Preference:
    """What a loss was made of, one value a pair, in nats, detached.

    losses: per pair, their mean is the loss. margin: u - delta, before beta. reward_*: weighted sums of token rewards.
    kl_*: the divergences' plain sums (NaN where the loss has no such term).
    """

    losses: Tensor
    margin: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor
    kl_chosen: Tensor
    kl_rejected: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is ahead (a tie is not)."""
        return float((self.margin > 0).double().mean())


def response_tokens(labels: Tensor) -> Tensor:
    """(n, length) labels -> (n, length - 1) bool: the tokens that count. Raises BadInput for a row without one."""
    if labels.ndim != 2 or labels.shape[1] < 2 or not len(labels):
        raise BadInput(f"labels are (n, length of at least 2), got shape {tuple(labels.shape)}")
    response = labels[:, 1:] != IGNORE
    if not bool(response.any(1).all()):
        row = int((~response.any(1)).nonzero()[0])
        raise BadInput(f"row {row} of labels of shape {tuple(labels.shape)} has no response token behind its first")
    return response


def token_terms(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, *, kl: bool = True, chunk: int = CHUNK) -> Terms:
    """Rewards and forward divergences of every response token, over the full vocabulary, `chunk` entries at a time.

    logits: (n, length, vocabulary), labels: (n, length). Half precision is widened to float32. Raises BadInput for
    shapes that differ, reference logits that carry a gradient, labels outside the vocabulary, a row without a
    response, and a token on which either model is not finite.
    """
    response = response_tokens(labels)
    if policy_logits.shape != ref_logits.shape or policy_logits.ndim != 3 or policy_logits.shape[:2] != labels.shape:
        shapes = f"{tuple(policy_logits.shape)}, {tuple(ref_logits.shape)} and {tuple(labels.shape)}"
        raise BadInput(f"policy logits, reference logits and labels do not fit: shapes {shapes}")
    if ref_logits.requires_grad:
        raise BadInput("the reference's logits carry a gradient: run it under torch.no_grad()")
    row, column = response.nonzero(as_tuple=True)
    token, size = labels[row, column + 1], labels.shape[1]
    if bool(((token < 0) | (token >= policy_logits.shape[2])).any()):
        raise BadInput(f"labels hold {int(token.min())} to {int(token.max())}, the vocabulary is {policy_logits.shape[2]}")
    now, before = (logits.flatten(0, 1) for logits in (policy_logits, ref_logits))
    parts = []
    for at, told in zip(*((t.split(max(1, chunk // now.shape[1]))) for t in (row * size + column, token)), strict=True):
        pieces = (now.index_select(0, at), before.index_select(0, at), told, kl)
        # A second chunk means that the vocabulary's tensors are large: they are made again in the backward pass.
        many = len(at) < len(token) and now.requires_grad
        parts.append(checkpoint(_terms, *pieces, use_reentrant=False) if many else _terms(*pieces))
    reward, divergence = (torch.cat(part) for part in zip(*parts, strict=True))
    _finite(reward, divergence, row, column)
    blank = reward.new_zeros(response.shape)
    spread = [blank.masked_scatter(response, part) for part in (reward, divergence)]
    return Terms(spread[0], spread[1] if kl else None, response)


def _terms(policy: Tensor, ref: Tensor, token: Tensor, kl: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(policy.dtype, torch.float32)
    now, before = (logits.to(wide).log_softmax(-1) for logits in (policy, ref))
    gap = now - before
    reward = gap.gather(1, token[:, None])[:, 0]
    # Where the reference gives no probability at all the divergence has no term, whatever the policy says there.
    divergence = torch.where(before > -torch.inf, before.exp() * -gap, 0.0).sum(1) if kl else torch.zeros_like(reward)
    return reward, divergence


def token_preference_loss(
    policy_logits_w: Tensor, policy_logits_l: Tensor, ref_logits_w: Tensor, ref_logits_l: Tensor,
    labels_w: Tensor, labels_l: Tensor, m_u: Weight = 1.0, m_d: Weight = 1.0, beta: float = 0.1, *,
    hold_chosen_kl: bool = False, chunk: int = CHUNK,
) -> tuple[Tensor, Preference]:  # fmt: skip
    """`preference_loss` of logits and labels: chosen (w) and rejected (l) responses to the same n prompts."""
    if len(labels_w) != len(labels_l):
        raise BadInput(f"{len(labels_w)} chosen and {len(labels_l)} rejected responses are no pairs")
    kl = not (isinstance(m_d, int | float) and m_d == 0)
    chosen = token_terms(policy_logits_w, ref_logits_w, labels_w, kl=kl, chunk=chunk)
    rejected = token_terms(policy_logits_l, ref_logits_l, labels_l, kl=kl, chunk=chunk)
    return preference_loss(chosen, rejected, m_u, m_d, beta, hold_chosen_kl=hold_chosen_kl)


def preference_loss(
    chosen: Terms, rejected: Terms, m_u: Weight = 1.0, m_d: Weight = 1.0, beta: float = 0.1, *, hold_chosen_kl: bool = False
) -> tuple[Tensor, Preference]:
    """-log sigmoid(beta (u - delta)), the mean over pairs, and what it was made of.

    u = sum m_u reward (chosen) - the same (rejected); delta = sum m_d kl (rejected) - the same (chosen); sums over
    response tokens, not divided by their number. m_u, m_d: a number, or weights >= 0 of the (chosen, rejected) tokens.
    m_u = 1 with m_d = 0 is DPO (arXiv 2305.18290), m_d = 1 is TDPO1, and m_d = alpha without a gradient through the
    chosen response's divergence (`hold_chosen_kl`) TDPO2 (2404.11999); token weights: SparsePO (2410.05102).
    Raises BadInput for weights of another shape, negative or not finite, and for beta <= 0.
    """
    if not 0 < beta < float("inf"):
        raise BadInput(f"beta must be positive and finite, got {beta}")
    plus, minus = (_weighted(t.reward, m_u, side, t, "m_u") for side, t in enumerate((chosen, rejected)))
    margin = plus - minus
    if chosen.kl is not None and rejected.kl is not None:
        kl_w = chosen.kl.detach() if hold_chosen_kl else chosen.kl
        margin = margin + _weighted(kl_w, m_d, 0, chosen, "m_d") - _weighted(rejected.kl, m_d, 1, rejected, "m_d")
    elif not (isinstance(m_d, int | float) and m_d == 0):
        raise BadInput("m_d weighs divergences that were not computed (kl=False)")
    losses = -F.logsigmoid(beta * margin)
    blank = torch.full_like(losses, torch.nan)
    sums = [blank if part.kl is None else part.kl.sum(1) for part in (chosen, rejected)]
    told = (part.detach() for part in (losses, margin, plus, minus, *sums))
    return losses.mean(), Preference(*told)


def _weighted(values: Tensor, weight: Weight, side: int, terms: Terms, name: str) -> Tensor:
    """(n,) sums over the response; a weight outside of it never enters."""
    told = weight[side] if isinstance(weight, tuple) else torch.as_tensor(weight, device=values.device)
    if told.ndim and told.shape != terms.response.shape:
        raise BadInput(f"{name} of shape {tuple(told.shape)} does not lie on tokens of shape {tuple(terms.response.shape)}")
    used = torch.where(terms.response, told.to(values.dtype), 0.0)
    if not bool(torch.isfinite(used.detach()).all()) or bool((used.detach() < 0).any()):
        raise BadInput(f"{name} holds a weight that is negative or not finite on a response token")
    return (used * values).sum(1)


def _finite(reward: Tensor, divergence: Tensor, row: Tensor, column: Tensor) -> None:
    bad = ~(torch.isfinite(reward.detach()) & torch.isfinite(divergence.detach()))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        place = f"row {int(row[first])}, token {int(column[first]) + 1}"
        raise BadInput(f"{place}: the models' probabilities give a reward or divergence that is not finite")
