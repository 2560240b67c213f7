"""MaPO's mask: how active the frozen reference is before each response token. Nothing is learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput

TYPES = ("mlp", "attention", "residual", "logits")
_ATTENTION = r"(self_)?attn|(self_)?attention|self"
_MLP = r"mlp|feed_forward|ffn"
# What a module is, told by the last part of its name, as transformers' causal models call it.
_ACTIVATION, _VALUES = r"act(_fn|ivation|ivation_fn)?", r"(o|out|c)_proj|dense|out_lin|wo"
_QUERY = r"(q|k|v)_(proj|lin)|query|key|value|c_attn|query_key_value|qkv(_proj)?|Wqkv"


@torch.no_grad()
def activation_mask(
    model: nn.Module, ids: Tensor, response: Tensor, hooks: str | Iterable[str] = "all", *, attention: Tensor | None = None
) -> Tensor:
    """(n, length - 1) weights in [0, 1] of the response tokens, 0 elsewhere, for a causal model of transformers' form.

    ids: (n, length); response: (n, length - 1) bool, a token one column before its place. hooks: "all", or some of
    "mlp" (behind its activation), "attention" (query, key, value, and the mixed values), "residual" (into and out of
    every norm, and what attention and MLP add) and "logits". Each tensor's features are averaged and brought to [0, 1]
    over a response; then the tensors of a type are averaged, then the types. Raises BadInput for an unknown type, and
    one of which the model has no module. arXiv 2410.05102, section 3.1.

    Differs: rotated queries and keys, which no module gives, are left out; a fused query-key-value is one tensor; a
    block's output, which the code takes again as the next one's input, counts once.
    """
    with Watch(model, hooks) as watch:
        out = model(input_ids=ids, attention_mask=attention, use_cache=False)
    return watch.mask(out.logits, response)


def rescaled(active: Tensor, response: Tensor) -> Tensor:
    """(n, tokens) -> the same, brought to [0, 1] over each row's response, 0 elsewhere; 1 where a response is constant.

    Normalising by mean and deviation first, as the paper's code does, changes nothing: both are affine. Raises BadInput
    for what is not finite.
    """
    if not bool(torch.isfinite(active[response]).all()):
        raise BadInput(f"activations of shape {tuple(active.shape)} are not finite on a response token")
    low = active.masked_fill(~response, torch.inf).amin(1, keepdim=True)
    high = active.masked_fill(~response, -torch.inf).amax(1, keepdim=True)
    span = high - low
    share = torch.where(span > 0, (active - low) / span.clamp_min(torch.finfo(active.dtype).tiny), 1.0)
    return torch.where(response, share, 0.0)


class Watch(ExitStack):
    """While open, the mean activity at every watched point of a forward pass is noted; `mask` then makes the mask of it."""

    def __init__(self, model: nn.Module, hooks: str | Iterable[str] = "all") -> None:
        super().__init__()
        self.types = types(hooks)
        self.seen: dict[str, list[Tensor]] = {kind: [] for kind in self.types}
        self.model = model

    def __enter__(self) -> Watch:
        super().__enter__()
        for name, module in self.model.named_modules():
            parent, last = ["", *name.split(".")][-2:]
            self._hang(parent, last, module)
        return self

    def _hang(self, parent: str, last: str, module: nn.Module) -> None:
        norm = "Norm" in type(module).__name__
        attention = re.fullmatch(_ATTENTION, parent) is not None
        whole = re.fullmatch(f"{_ATTENTION}|{_MLP}", last) is not None and bool(list(module.children()))
        wanted = (
            ("mlp", False, re.fullmatch(_ACTIVATION, last) and not attention),
            ("attention", False, re.fullmatch(_QUERY, last)),
            ("attention", True, attention and re.fullmatch(_VALUES, last)),
            ("residual", True, norm and not attention),
            ("residual", False, norm and not attention),
            ("residual", False, whole),
        )
        for kind, incoming, found in wanted:
            if found and kind in self.seen:
                self.callback(module.register_forward_hook(self._note(kind, incoming)).remove)

    def _note(self, kind: str, incoming: bool) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            told = args if incoming else out
            told = told[0] if isinstance(told, tuple) and told else told
            if isinstance(told, Tensor) and told.ndim == 3:
                self.seen[kind].append(told.detach().float().mean(-1))

        return note

    def mask(self, logits: Tensor, response: Tensor) -> Tensor:
        """(n, length - 1) weights, detached."""
        if "logits" in self.seen:
            self.seen["logits"] = [logits.detach().float().mean(-1)]
        for kind, found in self.seen.items():
            if not found:
                raise BadInput(f"{type(self.model).__name__} has no module of the type {kind!r} that MaPO could watch")
        means = [torch.stack([rescaled(a[:, :-1], response) for a in found]).mean(0) for found in self.seen.values()]
        return torch.stack(means).mean(0)


def types(hooks: str | Iterable[str]) -> tuple[str, ...]:
    """The types named, "all" spelt out. Raises BadInput for an unknown one, or none."""
    told = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    found = TYPES if told == ("all",) else told
    if not found or set(found) - set(TYPES):
        raise BadInput(f"MaPO watches all, or some of {', '.join(TYPES)}; got {', '.join(told) or 'none'}")
    return found
