"""A model under GS-LoRA, between entering and leaving `GsLora.attach`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates.branch import Branched
from maskwright.updates.gs_lora.losses import Batch, bounded, divergence, group_lasso, group_norm, of_classes, proximal
from maskwright.updates.lora import LowRank

if TYPE_CHECKING:
    from maskwright.updates.gs_lora.method import GsLora

GROUPS = ("block", "module", "matrix")


@dataclass(eq=False)
class GsLoraRun:
    """`groups`: by name, the matrices that live or die together; `trainable`: all A and B."""

    method: GsLora
    seed: int
    branched: Branched
    pairs: dict[str, LowRank]
    groups: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, pair in self.pairs.items():
            path = name.removesuffix(".weight")
            for side, matrix in (("A", pair.A), ("B", pair.B)):
                block = self.branched.sites[name].block or path
                key = {"block": block, "module": path, "matrix": f"{path}.{side}"}[self.method.group_by]
                self.groups.setdefault(key, []).append(matrix)
        self._scale = max(self.group_norms().values())

    @property
    def trainable(self) -> list[nn.Parameter]:
        return self.branched.trainable

    def penalty(self) -> Tensor:
        """The group lasso, without alpha."""
        return group_lasso(self.groups, self.method.size_weighted)

    def loss(
        self, remain: Batch, forget: Batch, *, alpha: float | None = None, centres: Mapping[int, Tensor] | None = None,
        outputs: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """The whole loss and its terms. remain, forget: (logits, true classes) of one batch each.

        alpha: instead of the method's. centres: prototypes by class, which the ++ terms need. outputs: what is
        compared with them, of the remain and the forget batch (default: the logits).
        Raises BadInput when a ++ weight is set and there are no prototypes, and when every group is at 0.
        """
        m = self.method
        if not self.alive:
            raise BadInput(
                f"gs_lora: all {len(self.groups)} groups are 0, nothing is left to train; a smaller alpha may help"
            )
        alpha = m.alpha if alpha is None else alpha
        ce_remain, ce_forget = (F.cross_entropy(logits, y) for logits, y in (remain, forget))
        total = ce_remain + m.beta * bounded(ce_forget, m.bound)
        parts = {"remain": ce_remain, "forget": ce_forget}
        if alpha and not m.proximal:
            parts["lasso"] = self.penalty()
            total = total + alpha * parts["lasso"]
        if m.forget_weight or m.remain_weight:
            if centres is None:
                raise BadInput("gs_lora: forget_weight or remain_weight is set, but no prototypes are given")
            out_remain, out_forget = (remain[0], forget[0]) if outputs is None else outputs
            kl_forget = divergence(of_classes(centres, forget[1]), out_forget)
            total = total + m.forget_weight * bounded(kl_forget, m.proto_bound)
            parts["kl_forget"] = kl_forget
            if m.remain_weight:
                parts["kl_remain"] = divergence(of_classes(centres, remain[1]), out_remain)
                total = total + m.remain_weight * parts["kl_remain"]
        return total, {name: float(part.detach()) for name, part in parts.items()}

    def shrink(self, lr: float, alpha: float | None = None) -> None:
        """proximal=True: the lasso's step after an optimiser step of rate `lr`; a group at 0 stays there, frozen."""
        if self.method.proximal:
            for group in self.groups.values():
                weight = sum(m.numel() for m in group) ** 0.5 if self.method.size_weighted else 1.0
                proximal(group, lr * (self.method.alpha if alpha is None else alpha) * weight)
            self._drop()

    @torch.no_grad()
    def group_norms(self) -> dict[str, float]:
        """Norm by group, as the penalty takes it. Differs: the code reports the sum of the matrices' norms."""
        return {name: float(group_norm(group)) for name, group in self.groups.items()}

    @torch.no_grad()
    def effects(self) -> dict[str, float]:
        """|scale B A| by weight: A is never 0 by itself, so a group of large norm may still do nothing."""
        return {name: float(torch.linalg.vector_norm(pair.delta())) for name, pair in self.pairs.items()}

    def zero_groups(self, share: float = 0.01) -> list[str]:
        """Groups of norm up to `share` of the largest norm, of now or of the start (with all shrunk, all are zero)."""
        norms = self.group_norms()
        least = share * max(self._scale, *norms.values())
        return [name for name, norm in norms.items() if not norm > least]

    @torch.no_grad()
    def prune_groups(self, share: float = 0.01) -> list[str]:
        """Set those groups to exactly 0 and freeze them there; gives their names."""
        names = self.zero_groups(share)
        for name in names:
            for matrix in self.groups[name]:
                matrix.zero_()
        self._drop()
        return names

    def _drop(self) -> None:
        # Frozen, not only zeroed: Adam's moments would move a matrix of zeros that gets no gradient, and revive it.
        dead = [m for group in self.groups.values() if not any(bool(m.any()) for m in group) for m in group]
        started = self.method.group_by != "matrix" or any(bool(pair.B.any()) for pair in self.pairs.values())
        for matrix in dead:
            if started or not any(matrix is pair.B for pair in self.pairs.values()):  # B is 0 at the start
                matrix.requires_grad_(False).grad = None
        self.dropped |= {n for n, p in self.pairs.items() if not (p.A.requires_grad and p.B.requires_grad)}

    @property
    def alive(self) -> bool:
        """Whether there is a group left to train."""
        return any(parameter.requires_grad for parameter in self.trainable)

    def masks(self) -> MaskSet:
        """All entries of a weight whose pair lives, none of one whose group was zeroed."""
        found = {}
        for name, site in self.branched.sites.items():
            found[name] = Mask(torch.full(tuple(site.weight.shape), name not in self.dropped))
        return MaskSet(found, self.method.made_by(self.seed))

    def merge(self) -> None:
        """Write W + scale B A into the weights. The next task attaches anew, with fresh A and B = 0."""
        self.branched.merge()
