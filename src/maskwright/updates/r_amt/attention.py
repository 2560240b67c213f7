"""Which weights R-AMT takes, and the refusal of weights that share memory without being one parameter."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from maskwright.core.errors import BadInput
from maskwright.weights import WeightSite
from maskwright.weights.sites import maskable, matches, refuse_bad_values

ATTENTION = "attention"  # the word that stands for `is_attention`


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a matrix is a map of an attention: in an nn.MultiheadAttention, or a linear one of a module so named.

    Named so: "attn" or "attention" stands in one of the last three segments of the module's path, which takes in
    BERT's `attention.self.query` and `attention.output.dense`, CLIP's `attn.in_proj_weight` and `attn.out_proj`.
    """
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):  # an nn.MultiheadAttention's output map
        return True
    if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):  # Conv1D: GPT-2's linear map
        return False
    return any(word in part.lower() for part in name.split(".")[-4:-1] for word in ("attn", "attention"))


def chosen(model: nn.Module, where: tuple[str, ...]) -> dict[str, WeightSite]:
    """The sites that `where` names, in model order: "attention", or patterns as in the weights place.

    Raises BadInput where a pattern finds nothing, a weight is not finite, hangs on a parametrization already, or
    shares memory with another parameter (a parameter that stands in two places is one site, and fine).
    """
    for path, module in model.named_modules():
        for attribute in getattr(module, "parametrizations", ()) if parametrize.is_parametrized(module) else ():
            name = f"{path}.{attribute}" if path else attribute
            if any(_named((name,), module, pattern) for pattern in where):
                raise BadInput(f"{name}: the weight hangs on a parametrization already; merge or leave that first")
    every = maskable(model)
    found: set[str] = set()
    for pattern in where:
        some = {n for n, s in every.items() if _named((n, *s.aliases), s.owners[0][0], pattern)}
        if not some:
            more = (
                "; name the weights by where=" if pattern == ATTENTION else f"; names look like {', '.join(list(every)[:3])}"
            )
            raise BadInput(f"r_amt: {type(model).__name__} has no weight that {pattern!r} matches{more}")
        found |= some
    out = {name: site for name, site in every.items() if name in found}
    refuse_bad_values(out)
    _refuse_shared(model, {id(site.parameter) for site in out.values()})
    return out


def _named(names: tuple[str, ...], module: nn.Module, pattern: str) -> bool:
    if pattern == ATTENTION:
        return any(is_attention(name, module) for name in names)
    return any(matches(name, pattern) for name in names)


def _refuse_shared(model: nn.Module, mine: set[int]) -> None:
    """Two parameters over the same memory would need one score between them."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name, id(p) in mine)
        for name, p in model.named_parameters()
        if p.numel() and not p.is_meta
    )
    end, owner, owner_mine = 0, "", False
    for start, stop, name, is_mine in spans:
        if start < end and (is_mine or owner_mine):
            raise BadInput(f"{name}: shares its memory with {owner}, and the two would need one score: tie the parameters")
        if stop > end:
            end, owner, owner_mine = stop, name, is_mine
