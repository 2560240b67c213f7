"""What must agree before models are merged: their tensors with the base's, their methods with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from maskwright.core.errors import BadInput
from maskwright.updates.parts import Parts, Shape, Tensors


def agreeing(parts: Sequence[Parts], weights: Sequence[float], number: int) -> None:
    """Raise BadInput unless `number` models have as many methods and weights, which go together."""
    for what, told in (("methods", parts), ("weights", weights)):
        if len(told) != number:
            raise BadInput(f"{number} models but {len(told)} {what}")
    if not all(map(isfinite, weights)):
        raise BadInput(f"weights are finite numbers, got {list(weights)}")
    first = parts[0]
    if any(p.consensus != first.consensus or p.scale != first.scale for p in parts[1:]):
        raise BadInput("the models' methods must agree on consensus, normalise and scale")
    if first.consensus.normalise and (min(weights) < 0 or sum(weights) <= 0):
        raise BadInput(f"normalise divides by the sum of the weights: they must be >= 0 and not all 0, got {list(weights)}")


def same_shapes(base: Tensors, tuned: Sequence[Tensors]) -> Mapping[str, tuple[torch.dtype, Shape]]:
    """The base's shapes and dtypes. Raises BadInput naming the first tensor of a model that does not fit them."""
    mine = dict(base.shapes())
    for model in tuned:
        theirs = model.shapes()
        for what, odd in (
            ("lacks", [n for n in mine if n not in theirs]),
            ("adds", [n for n in theirs if n not in mine]),
        ):
            if odd:
                raise BadInput(f"{model.what}: {what} {_some(odd)}; the base is {base.what}")
        wrong = [name for name in mine if theirs[name][1] != mine[name][1]]
        if wrong:
            told = f"{wrong[0]} has shape {theirs[wrong[0]][1]}, in the base {mine[wrong[0]][1]}"
            raise BadInput(f"{model.what}: {told} ({len(wrong)} of {len(mine)} tensors differ)")
        wrong = [name for name in mine if theirs[name][0].is_floating_point != mine[name][0].is_floating_point]
        if wrong:
            raise BadInput(f"{model.what}: {wrong[0]} is {theirs[wrong[0]][0]}, in the base {mine[wrong[0]][0]}")
    return mine


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)} tensors)" if len(names) > 3 else "")
