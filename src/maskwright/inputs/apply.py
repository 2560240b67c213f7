"""The three things to do with a mask over inputs: hide what it drops, take out what it keeps, weigh a loss by it.

A mask has shape (batch, *grid). The data have one dim more, the features: the second of four dims or more (images and
video are channels first), else the last (token rows, points); `features` says otherwise, None means there is none.
Entries are left out by `where`, never by a product: NaN under the mask changes nothing, NaN on a kept entry is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.inputs.patches import spread

_ASK: Literal["auto"] = "auto"
Features = int | Literal["auto"] | None


def over(x: Tensor, keep: Tensor, features: Features = _ASK) -> Tensor:
    """`keep` (batch, *grid) brought to the dims of `x`, ready to broadcast: 1 at the features, spread over a finer grid.

    Raises BadInput naming both shapes where they do not fit.
    """
    if x.ndim == keep.ndim and features in (_ASK, None):
        at = None
    else:
        if features is None or x.ndim != keep.ndim + 1:
            raise BadInput(f"a mask of shape {tuple(keep.shape)} does not lie on data of shape {tuple(x.shape)}")
        at = (1 if x.ndim >= 4 else x.ndim - 1) if features == _ASK else int(features) % x.ndim
    size = tuple(side for dim, side in enumerate(x.shape) if dim != at)
    if size[0] != keep.shape[0]:
        raise BadInput(f"a mask over {keep.shape[0]} samples does not lie on {size[0]} (data of shape {tuple(x.shape)})")
    wide = spread(keep, size[1:])
    return wide if at is None else wide.unsqueeze(at)


def hide(x: Tensor, mask: Mask, fill: float | Tensor = 0.0, *, features: Features = _ASK) -> Tensor:
    """`x` with what the mask drops replaced by `fill` (a number, or a tensor that broadcasts: a learned token).

    A new tensor; no gradient reaches what is hidden. Raises BadInput for shapes that do not fit and NaN on kept entries.
    """
    keep = over(x, mask.keep, features)
    hidden = torch.where(keep, x, torch.as_tensor(fill, dtype=x.dtype, device=x.device))
    _refuse_nan(torch.where(keep, x.detach(), x.new_zeros(())), "hide")
    return hidden


@dataclass(frozen=True, eq=False)
class Visible:
    """The kept entries of each sample, in order: `values` (batch, kept, features), `index` (batch, kept) into the grid."""

    values: Tensor
    index: Tensor
    entries: int

    def put_back(self, values: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """(batch, kept, features) -> (batch, entries, features): each where its entry was, `fill` elsewhere."""
        if values.shape[:2] != self.index.shape:
            raise BadInput(
                f"values of shape {tuple(values.shape)} do not go back to {tuple(self.index.shape)} places (batch, kept)"
            )
        width = values.shape[2]
        base = torch.as_tensor(fill, dtype=values.dtype, device=values.device)
        base = base.expand(len(values), self.entries, width).clone()
        return base.scatter(1, self.index.unsqueeze(-1).expand(-1, -1, width), values)


def visible(x: Tensor, mask: Mask) -> Visible:
    """Token rows (batch, tokens, features) -> only the kept ones; the mask is (batch, tokens), or a grid with as many.

    Raises BadInput where the samples keep different numbers (no rectangle holds them), and for NaN on kept entries.
    """
    keep = mask.keep.flatten(1)
    if x.ndim != 3 or x.shape[:2] != keep.shape:
        raise BadInput(f"a mask of shape {mask.shape} does not lie on token rows of shape {tuple(x.shape)}")
    counts = keep.sum(1)
    if len(counts.unique()) != 1:
        raise BadInput(
            f"the samples of a mask of shape {mask.shape} keep {int(counts.min())} to {int(counts.max())} tokens; "
            "taking them out needs one number"
        )
    index = keep.nonzero()[:, 1].reshape(len(x), -1)
    values = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    _refuse_nan(values.detach(), "visible")
    return Visible(values, index, x.shape[1])


def weigh(
    loss: Tensor,
    mask: Mask | SoftMask,
    *,
    over: Literal["entries", "samples", "none"] = "entries",
    features: Features = _ASK,
) -> Tensor:
    """The mean of a loss (one value an entry) over kept entries; a SoftMask weighs them, and divides by its sum.

    over: "entries" divides the sum of the whole batch by the number of kept entries; "samples" takes each sample's mean
    first, then their mean; "none" gives the sum. An entry with features counts once for each of them. Raises BadInput
    when nothing is kept (of a sample, for "samples") or a kept entry is NaN. Where the loss was computed from NaN under
    the mask, its gradient is NaN times 0: use `masked_loss`, which leaves them out before.
    """
    share = mask.keep if isinstance(mask, Mask) else mask.values
    weight = _over(loss, share, features).expand(loss.shape).to(loss.dtype)
    part = torch.where(weight != 0, loss, loss.new_zeros(())) * weight
    _refuse_nan(part.detach(), "weigh")
    if over == "none":
        return part.sum()
    if over == "entries":
        return part.sum() / _some(weight.sum(), loss)
    return (part.flatten(1).sum(1) / _some(weight.flatten(1).sum(1), loss)).mean()


def masked_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Mask,
    loss: Callable[..., Tensor] = F.mse_loss,
    *,
    over: Literal["entries", "samples", "none"] = "entries",
    features: Features = _ASK,
) -> Tensor:
    """`weigh(loss(prediction, target, reduction="none"), mask)` with the dropped entries set to 0 on both sides before.

    So whatever lies there, NaN included, reaches neither the value nor any gradient. Raises BadInput as `weigh` does.
    """
    if prediction.shape != target.shape:
        raise BadInput(f"a prediction of shape {tuple(prediction.shape)} has a target of shape {tuple(target.shape)}")
    keep = _over(prediction, mask.keep, features)
    zero = prediction.new_zeros(())
    each = loss(torch.where(keep, prediction, zero), torch.where(keep, target, zero), reduction="none")
    return weigh(each, mask, over=over, features=features)


_over = over  # `weigh` has a word `over` of its own


def _some(total: Tensor, loss: Tensor) -> Tensor:
    if bool((total == 0).any()):
        which = "" if total.ndim == 0 else f" of sample {int((total == 0).nonzero()[0])}"
        raise BadInput(f"the mask keeps no entry{which} of a loss of shape {tuple(loss.shape)}: there is no mean")
    return total


def _refuse_nan(kept: Tensor, verb: str) -> None:
    if bool(kept.isnan().any()):
        where = tuple(int(part) for part in kept.isnan().nonzero()[0])
        raise BadInput(f"{verb}: data of shape {tuple(kept.shape)} are NaN at {where}, which the mask keeps")
