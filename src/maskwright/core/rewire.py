"""rewire: drop the worst of what is kept, grow the best of what is not, the count unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.score import force
from maskwright.core.select import select


def rewire(old: Mask, drop: Tensor, grow: Tensor, fraction: float, *, regrow: bool = True) -> Mask:
    """A mask of the same count in every group: int(fraction x kept) units leave by `drop`, as many enter by `grow`.

    drop, grow: scores of the mask's shape, greater means keep or enter. Only kept units can be dropped (a kept
    weight of exactly 0 is still kept). `regrow=True` lets the just-dropped compete to come back, as in SET and
    RigL's code. Raises BadInput for a fraction outside [0, 1], or when there is too little to grow.
    """
    if not 0 <= fraction <= 1:
        raise BadInput(f"rewire takes a fraction in [0, 1], got {fraction}")
    kept_now = (old.pattern.fold(old.keep.float()) > 0).sum(1)
    stay = kept_now - (kept_now.double() * fraction + 1e-9).to(torch.int64)
    if old.pattern.fixed is not None:
        raise BadInput(f"{old.pattern} fixes its count; rewire moves units between groups of free count only")
    survivors = select(force(drop, drop=~old.keep), old.pattern, stay)
    dropped = old.keep & ~survivors.keep
    return select(force(grow, keep=survivors.keep, drop=None if regrow else dropped), old.pattern, kept_now)
