"""Codes over a dictionary: proximal gradient, and the least squares that takes a penalty's bias off again."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.thresholded import Proximal


def lipschitz(dictionary: Tensor) -> float:
    """||D||^2, the largest curvature of 1/2 ||x - D a||^2: a step up to 1 / ||D||^2 never raises the objective."""
    return float(torch.linalg.matrix_norm(dictionary.detach().double(), 2)) ** 2


def infer(
    dictionary: Tensor,
    x: Tensor,
    operator: Proximal,
    iterations: int,
    *,
    step: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Codes (batch, n) of rows x (batch, m) over a dictionary (m, n): a <- prox(a - step * D^T (D a - x)).

    Lowers 1/2 ||x - D a||^2 + penalty(a), where the penalty is not convex to a local minimum that depends on the start:
    0 unless given. `step` is 1 / ||D||^2 unless given. The number of iterations is fixed, so that a row's code does not
    depend on the rows beside it. Without gradients. Raises BadInput for shapes that do not fit and rows not finite.
    """
    _fits(dictionary, x)
    if step is None:
        step = 1 / max(lipschitz(dictionary), 1e-30)
    with torch.no_grad():
        m, n = dictionary.shape
        pull = step * (x @ dictionary)
        code = torch.zeros_like(pull) if start is None else start
        # The cheaper of n^2 and 2 m n a row: one product with the Gram matrix, or two with the dictionary.
        hold = torch.eye(n, dtype=x.dtype) - step * (dictionary.T @ dictionary) if n <= 2 * m else None
        for _ in range(iterations):
            if hold is not None:
                code = operator.shrink(torch.addmm(pull, code, hold), step)
            else:
                code = operator.shrink(code + pull - step * (code @ dictionary.T @ dictionary), step)
        return code + 0.0


def refit(dictionary: Tensor, x: Tensor, support: Mask) -> Tensor:
    """Codes (batch, n) that are nearest to x with the given support (batch, n): least squares on each row's own columns.

    What a support is worth when the penalty's shrinkage is taken off. In float64 inside. Raises BadInput as `infer` does.
    """
    _fits(dictionary, x)
    if support.shape != (len(x), dictionary.shape[1]):
        raise BadInput(f"a support of shape {support.shape} is none of {len(x)} codes of {dictionary.shape[1]} entries")
    columns, codes = dictionary.detach().double(), torch.zeros(support.shape, dtype=torch.float64)
    for row, (keep, target) in enumerate(zip(support.keep, x.detach().double(), strict=True)):
        if bool(keep.any()):
            found = torch.linalg.lstsq(columns[:, keep], target[:, None], driver="gelsd")
            codes[row, keep] = found.solution[:, 0]
    return codes.to(x.dtype)


def objective(dictionary: Tensor, x: Tensor, code: Tensor, operator: Proximal) -> Tensor:
    """1/2 ||x - D a||^2 + penalty(a) of each row, (batch,)."""
    return (x - code @ dictionary.T).square().sum(1) / 2 + operator.penalty(code).sum(1)


def _fits(dictionary: Tensor, x: Tensor) -> None:
    if dictionary.ndim != 2 or x.ndim != 2 or x.shape[1] != dictionary.shape[0]:
        raise BadInput(f"rows of shape {tuple(x.shape)} have no code over a dictionary of shape {tuple(dictionary.shape)}")
    if x.dtype != dictionary.dtype or not x.dtype.is_floating_point:
        raise BadInput(f"rows of {x.dtype} have no code over a dictionary of {dictionary.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise BadInput(f"rows of shape {tuple(x.shape)} hold NaN or infinity: there is nothing to code")
