"""The inverse-Hessian factor that SparseGPT's updates and scores stand on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from maskwright.core.errors import BadInput


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread; the number is put back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# LAPACK's factorisations round differently under another number of threads. The last bit of a factor decides a tie
# somewhere, and from there on every later column and block differs: 2% of the mask of a 135 M model.
@one_thread()
def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """U with H^-1 = U^T U (upper), the dead columns, and the damping that was really used.

    gram: (C, C) X^T X. Dead columns (zero diagonal) get 1 on the diagonal. H += damping x mean(diag) x I; when
    the factorisation fails, damping is raised tenfold, up to three times. All in float64; never a silent fallback.
    Raises BadInput when it still fails (SparseGPT, arXiv 2301.00774, section 3.4).
    """
    base = gram.double()
    dead = base.diagonal() == 0
    base = base + torch.diag(dead.double())
    mean = base.diagonal().mean()
    for raised in range(4):
        used = damping * 10**raised
        lower, failed = torch.linalg.cholesky_ex(base + used * mean * torch.eye(len(base), dtype=torch.float64))
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper, dead, used
    raise BadInput(f"the Hessian of {len(base)} inputs is singular even with damping {used:g}; give more calibration text")
