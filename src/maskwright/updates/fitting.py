"""What must agree where models are merged or compared: tensors, methods with each other, patterns with names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
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
    """The base's shapes and dtypes. Raises BadInput naming the first tensors of a model that do not fit them."""
    mine = dict(base.shapes())
    for model in tuned:
        theirs = model.shapes()
        for what, odd in (
            ("lacks", [n for n in mine if n not in theirs]),
            ("adds", [n for n in theirs if n not in mine]),
        ):
            if odd:
                more = f" ... ({len(odd)} tensors)" if len(odd) > 3 else ""
                raise BadInput(plain(f"{model.what}: {what} {', '.join(odd[:3])}{more}; the base is {base.what}"))
        both = [(name, theirs[name], mine[name]) for name in mine]
        shapes = [f"{name} has shape {it[1]}, in the base {own[1]}" for name, it, own in both if it[1] != own[1]]
        kinds = [
            f"{name} is {it[0]}, in the base {own[0]}"
            for name, it, own in both
            if it[0].is_floating_point != own[0].is_floating_point
        ]
        for wrong in (shapes, kinds):
            if wrong:
                told = f"{'; '.join(wrong[:3])} ({len(wrong)} of {len(mine)} tensors differ)"
                raise BadInput(plain(f"{model.what}: {told}"))
    return mine


def plain(text: str) -> str:
    """One line without control characters: names come from files."""
    return "".join(c if c.isprintable() else " " for c in text)


def matching(names: Iterable[str], full: Sequence[str]) -> list[str]:
    """The names of tensors to store whole: those that a pattern matches. Raises BadInput for one that matches nothing."""
    every = list(names)
    for pattern in full:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise BadInput(f"full {pattern!r} matches no tensor; names look like {', '.join(every[:3])}")
    return [name for name in every if any(fnmatchcase(name, pattern) for pattern in full)]
