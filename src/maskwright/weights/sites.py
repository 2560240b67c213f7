"""What a mask can lie on here: the weights of a module, found by name and type, never by model class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskwright.core.errors import BadInput
from maskwright.core.pattern import NM, Block, Group, Pattern, Unstructured

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Owner = tuple[nn.Module, str]


@dataclass(frozen=True)
class Layout:
    """How a parameter is read as a matrix (outputs, inputs), and where its dims lie.

    Linear (out, in); transposed (in, out), GPT-2's Conv1D; conv (out, in, *kernel), whose matrix is
    (out, kernel x in) with the input channels last, so that N:M groups run along them.
    """

    out: tuple[int, ...]
    ins: tuple[int, ...]
    step: int  # the dim along which consecutive inputs lie

    def matrix(self, tensor: Tensor) -> Tensor:
        """The parameter, or anything of its shape, as (outputs, inputs)."""
        order = (*self.out, *(d for d in self.ins if d != self.step), self.step)
        return tensor.permute(order).reshape(prod(tensor.shape[d] for d in self.out), -1)

    def tensor(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix` for a parameter of `shape`."""
        order = (*self.out, *(d for d in self.ins if d != self.step), self.step)
        back = [order.index(d) for d in range(len(shape))]
        return matrix.reshape([shape[d] for d in order]).permute(back).contiguous()

    def localise(self, pattern: Pattern, shape: Sequence[int]) -> Pattern:
        """A pattern stated on the matrix, in the parameter's own dims. Raises BadInput for what has no such form."""
        sides = {0: self.out, 1: self.ins, -1: self.ins, -2: self.out}
        linear = len(shape) == 2 and self.out == (0,)
        if linear:
            return pattern
        if isinstance(pattern, Unstructured):
            return Unstructured(tuple(d for side in pattern.within for d in sides[side]))
        if isinstance(pattern, NM):
            along = sides[pattern.dim]
            return NM(pattern.n, pattern.m, self.step if along == self.ins else along[-1])
        if isinstance(pattern, Group):
            return Group(tuple(sorted(d for side in pattern.dims for d in sides[side])))
        if isinstance(pattern, Block) and len(pattern.shape) == 2:
            block = [1] * len(shape)
            block[self.out[-1]], block[self.step] = pattern.shape
            within = tuple(d for side in pattern.within for d in (self.out if side == 0 else self.ins))
            return Block(tuple(block), within, pattern.pad)
        raise BadInput(f"{pattern} has no meaning on a weight of shape {tuple(shape)}")


LINEAR, TRANSPOSED = Layout((0,), (1,), 1), Layout((1,), (0,), 0)


@dataclass(frozen=True, eq=False)
class WeightSite:
    """One weight a mask can lie on. `value` is the live parameter's data; stats are filled by a calibration walk."""

    name: str
    parameter: nn.Parameter
    layout: Layout
    owners: tuple[Owner, ...]
    block: int | None = None
    seed: int = 0
    pattern: Pattern = field(default_factory=Unstructured)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()  # the other names of a tied parameter

    def named(self, pattern: str) -> bool:
        """Whether a `where` pattern matches the site's name, or another name of the same tied parameter."""
        return any(matches(name, pattern) for name in (self.name, *self.aliases))

    @property
    def value(self) -> Tensor:
        return self.parameter.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs)."""
        return self.layout.matrix(self.value)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Anything shaped like `matrix`, back in the parameter's shape."""
        return self.layout.tensor(matrix, self.shape)

    def stat(self, name: str) -> Tensor:
        """A gathered statistic, inputs in the order of `matrix`'s columns. Raises BadInput when it was not gathered."""
        if name not in self.stats:
            raise BadInput(f"{self.name}: the score needs {name}, which was not gathered (give calibration batches)")
        return self.stats[name]


def _layout(module: nn.Module, parameter: nn.Parameter) -> Layout:
    if isinstance(module, _CONVS):
        return Layout((0,), tuple(range(1, parameter.ndim)), 1)
    # transformers' Conv1D keeps (inputs, outputs); it is known by its type's name, so transformers is not imported.
    if type(module).__name__ == "Conv1D" and parameter.ndim == 2 and hasattr(module, "nf"):
        return TRANSPOSED
    return (
        LINEAR
        if parameter.ndim == 2
        else Layout(tuple(range(parameter.ndim - 1)), (parameter.ndim - 1,), parameter.ndim - 1)
    )


def chains(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Stacks of repeated blocks, (path, blocks), outermost only, in the order they are registered.

    A stack is a ModuleList or Sequential with at least two children of one class that themselves hold weights
    in submodules. Whether they are called in a chain is for the calibration walk to prove.
    """
    found: list[tuple[str, list[nn.Module]]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module)
        kinds = [type(child) for child in children if any(True for _ in child.children())]
        if any(kinds.count(kind) > 1 for kind in kinds) and any(True for _ in module.parameters()):
            found.append((path, children))
    return found


def maskable(model: nn.Module) -> dict[str, WeightSite]:
    """Every parameter of two or more dims, by its full name; a tied parameter is one site, found by identity."""
    owners: dict[int, list[Owner]] = {}
    names: dict[int, list[str]] = {}
    found: dict[str, WeightSite] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim < 2 or isinstance(module, parametrize.ParametrizationList):
                continue
            owners.setdefault(id(parameter), []).append((module, attribute))
            name = f"{path}.{attribute}" if path else attribute
            known = names.setdefault(id(parameter), [])
            known.append(name)
            if len(known) == 1:
                found[name] = WeightSite(name, parameter, _layout(module, parameter), ())
    block_of: dict[int, int] = {}
    for _, blocks in chains(model):
        start = len(set(block_of.values()))
        block_of |= {id(m): start + i for i, block in enumerate(blocks) for m in block.modules()}
    out = {}
    for name, site in found.items():
        own = tuple(owners[id(site.parameter)])
        block = block_of.get(id(own[0][0]))
        out[name] = replace(site, owners=own, block=block, aliases=tuple(names[id(site.parameter)][1:]))
    return out


def _default(model: nn.Module, every: Mapping[str, WeightSite]) -> list[str]:
    """Linear and convolution weights inside the repeated blocks; without blocks, all but the last Linear (the head)."""
    kinds = (nn.Linear, *_CONVS)
    plain = [n for n, s in every.items() if isinstance(s.owners[0][0], kinds) or s.layout == TRANSPOSED]
    inside = [n for n in plain if every[n].block is not None]
    if inside:
        return inside
    heads = [n for n in plain if isinstance(every[n].owners[0][0], nn.Linear)]
    return [n for n in plain if not heads or n != heads[-1] or len(plain) == 1]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a contiguous run of the name's dotted segments.

    `*` stands for one segment (or part of one: `q_*`), `**` for any number, `re:` starts a regular expression
    searched in the whole name. Raises BadInput for an expression that does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise BadInput(f"where {pattern!r} is not a regular expression: {error}") from None
    segments, parts = name.split("."), pattern.split(".")
    return any(_run(segments[start:], parts) for start in range(len(segments)))


def _run(segments: list[str], parts: list[str]) -> bool:
    if not parts:
        return True
    if parts[0] == "**":
        return any(_run(segments[skip:], parts[1:]) for skip in range(len(segments) + 1))
    return bool(segments) and fnmatchcase(segments[0], parts[0]) and _run(segments[1:], parts[1:])


def sites(model: nn.Module, where: str | Iterable[str] = ()) -> dict[str, WeightSite]:
    """The sites that `where` names, in model order; without patterns, those a pruning paper would take.

    Default: Linear and convolution weights inside the repeated blocks (so no embedding, head, norm or bias);
    in a model without blocks, all of them but the last Linear. Raises BadInput when a pattern matches nothing.
    """
    every = maskable(model)
    wanted = [where] if isinstance(where, str) else list(where)
    if not wanted:
        chosen = _default(model, every)
        if not chosen:
            raise BadInput(f"{type(model).__name__} holds no Linear or convolution weight")
        return {name: every[name] for name in chosen}
    for pattern in wanted:
        if not any(site.named(pattern) for site in every.values()):
            near = ", ".join(list(every)[:3])
            raise BadInput(f"where {pattern!r} matches no weight; names look like {near}")
    return {name: site for name, site in every.items() if any(site.named(pattern) for pattern in wanted)}


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a full name, also when a gate hangs on it. Raises BadInput when there is none."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise BadInput(f"no parameter named {name}") from None
    if parametrize.is_parametrized(module, attribute):
        return module.parametrizations[attribute].original  # type: ignore[union-attr,index,return-value]
    found = getattr(module, attribute, None)
    if not isinstance(found, nn.Parameter):
        raise BadInput(f"no parameter named {name}")
    return found


def refuse_bad_values(found: Mapping[str, WeightSite]) -> None:
    """Raise BadInput naming the first site whose weight is not finite, is empty, or sits on the meta device."""
    for name, site in found.items():
        if site.parameter.is_meta:
            raise BadInput(f"{name}: the weight has no data (meta device)")
        if not site.value.numel():
            raise BadInput(f"{name}: the weight of shape {site.shape} is empty")
        if not bool(torch.isfinite(site.value).all()):
            bad = int((~torch.isfinite(site.value)).sum())
            raise BadInput(f"{name}: {bad} weights of shape {site.shape} are NaN or infinite")
