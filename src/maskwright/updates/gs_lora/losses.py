"""The terms of GS-LoRA's loss, each a plain function, and the figures that forgetting is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput

Batch = tuple[Tensor, Tensor]
Outputs = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def bounded(value: Tensor, bound: float) -> Tensor:
    """ReLU(bound - value): minimising it raises `value` to the bound, where the gradient ends."""
    return F.relu(bound - value)


def group_norm(matrices: Sequence[Tensor]) -> Tensor:
    """Root of the sum of squares over all matrices of a group. Its gradient is M / norm, and 0 where the norm is 0."""
    return torch.linalg.vector_norm(torch.cat([matrix.flatten() for matrix in matrices]))


def group_lasso(groups: Mapping[str, Sequence[Tensor]], size_weighted: bool = False) -> Tensor:
    """Sum of the groups' norms; `size_weighted` multiplies each by the root of its number of entries."""
    weights = [sqrt(sum(m.numel() for m in group)) if size_weighted else 1.0 for group in groups.values()]
    return torch.stack([w * group_norm(group) for w, group in zip(weights, groups.values(), strict=True)]).sum()


@torch.no_grad()
def proximal(matrices: Sequence[Tensor], step: float) -> None:
    """M <- M max(0, 1 - step / norm) in place: the lasso's exact step, with exact zeros."""
    norm = float(group_norm(matrices))
    for matrix in matrices:
        matrix.mul_(max(0.0, 1 - step / norm)) if norm > step else matrix.zero_()


def divergence(target: Tensor, output: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(target) || softmax(output)), both (rows, width)."""
    return F.kl_div(F.log_softmax(output, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")


def of_classes(centres: Mapping[int, Tensor], y: Tensor) -> Tensor:
    """The prototype of each row's class, (rows, width). Raises BadInput for a class that has none."""
    missing = sorted(set(y.tolist()) - set(centres))
    if missing:
        raise BadInput(f"class {missing[0]} has no prototype; there are {len(centres)}: give data of it, or leave it out")
    return torch.stack([centres[label] for label in y.tolist()])


@torch.no_grad()
def prototypes(model: nn.Module, batches: Iterable[Batch], outputs: Outputs | None = None) -> dict[int, Tensor]:
    """Mean output of each class that occurs, by the model as it is, in eval mode.

    outputs: (model, x) -> (logits, embedding); the embedding is averaged. Without it the logits are (the paper's text;
    its code averages embeddings). Raises BadInput when there are no rows.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    try:
        for x, y in batches:
            out = model(x) if outputs is None else outputs(model, x)[1]
            for row, label in zip(out, y.tolist(), strict=True):
                sums[label] = sums[label] + row.double() if label in sums else row.double()
                counts[label] = counts.get(label, 0) + 1
    finally:
        for module, mode in modes:
            module.training = mode
    if not sums:
        raise BadInput("prototypes of no rows: the batches are empty")
    return {label: (total / counts[label]).float() for label, total in sums.items()}


def harmonic(drop: float, remain: float) -> float:
    """H = 2 drop remain / (drop + remain) of the fall in accuracy on the forgotten and the accuracy on the rest."""
    return 2 * drop * remain / (drop + remain) if drop > 0 and remain > 0 else 0.0
