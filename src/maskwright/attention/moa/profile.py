"""MoA's profile: what each block of attention entries contributes to the loss of the model's own answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.attention import AttentionMethod, use
from maskwright.core.errors import BadInput

Absolute = Literal["after", "before"]
_ENTRIES = 1 << 24  # attention entries made at a time


def entries(share: Tensor, gain: Tensor, alone: Tensor | bool = False) -> Tensor:
    """First-order change of the loss when an entry is removed and its row renormalised (the paper's equation 3).

    share A and gain G = dL/dA (..., queries, keys): E = A / (1 - A) (sum_k G A - G); `alone` marks the rows of a single
    entry, where nothing is left to renormalise: E = -G A. Exact where the loss is linear in the attention's output.
    """
    room = 1 - share + (1e-6 if share.dtype == torch.float32 else 1e-15)
    left = share / room * ((gain * share).sum(-1, keepdim=True) - gain)
    return torch.where(torch.as_tensor(alone), -gain * share, left)


def influence(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, block: int, absolute: Absolute = "after"
) -> Tensor:
    """`entries` of causal attention summed over blocks. -> (batch, heads, n, n), n = ceil(length / block).

    q, grad (batch, heads, length, width), grad the loss's gradient of the attention output; k, v (batch, kv_heads, length,
    width). Worked in runs of rows: length^2 entries never exist at once. "before" takes |E| before summing.
    """
    batch, heads, length = q.shape[:3]
    group, n = heads // k.shape[1], -(-length // block)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    step = max(1, _ENTRIES // (batch * heads * length * block)) * block
    at, found = torch.arange(length, device=q.device), []
    for start in range(0, length, step):
        row = at[start : start + step, None]
        stop = start + len(row)
        future = at[:stop] > row
        logits = (q[:, :, start:stop] @ k[:, :, :stop].mT * scale).masked_fill(future, -torch.inf)
        lost = entries(logits.softmax(-1), grad[:, :, start:stop] @ v[:, :, :stop].mT, row == 0).masked_fill(future, 0.0)
        lost = F.pad(lost.abs() if absolute == "before" else lost, (0, n * block - stop, 0, -len(row) % block))
        found.append(lost.unflatten(3, (n, block)).unflatten(2, (-1, block)).sum((3, 5)))
    return torch.cat(found, 2)


@torch.no_grad()
def answered(model: nn.Module, prompts: Tensor, length: int) -> Tensor:
    """(samples, p) prompts continued by the model itself, greedily, to (samples, length)."""
    if not 0 < prompts.shape[1] < length:
        raise BadInput(f"moa: prompts of {prompts.shape[1]} tokens leave no answer up to length {length}")
    ids, held = prompts, {}  # type: Tensor, dict[str, Any]
    cached = "past_key_values" in inspect.signature(model.forward).parameters
    for _ in range(length - prompts.shape[1]):
        told: Any = model(ids[:, -1:] if held else ids, use_cache=True, **held) if cached else model(ids)
        held = {"past_key_values": told.past_key_values} if cached else {}
        ids = torch.cat([ids, _logits(told)[:, -1:].argmax(-1)], 1)
    return ids


def answer_loss(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Mean cross entropy of the last `count` tokens of ids (samples, length): the response mask."""
    keep = {"logits_to_keep": count + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        keep["use_cache"] = False
    logits = _logits(model(ids, **keep))[:, -count - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -count:].flatten())


def profile(
    model: nn.Module, ids: Tensor, count: int, block: int, dense: AttentionMethod, *, batch: int = 8,
    absolute: Absolute = "after",
) -> Tensor:  # fmt: skip
    """Mean influence of every causal block on the loss of the last `count` tokens. (layers, heads, n, n), signed unless
    `absolute` is "before".

    ids (samples, length), no padding. dense: a method that masks nothing. A layer's entries are made, summed to blocks
    and forgotten as its gradient arrives in the backward pass.
    """
    total: dict[int, Tensor] = {}
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]

        def see(layer: int, told: tuple[Tensor, Tensor, Tensor, float], grad: Tensor, share: float) -> None:
            q, k, v, scale = told
            with torch.no_grad():
                lost = influence(q.detach(), k.detach(), v.detach(), grad, scale, block, absolute).sum(0) * share
            total[layer] = total[layer] + lost if layer in total else lost

        with _watched(model, dense) as seen, torch.enable_grad():
            loss = answer_loss(model, part, count)
            for layer, (*told, out) in seen.items():
                if layer:
                    out.register_hook(_hook(see, layer, tuple(told), len(part) / len(ids)))
            (grad,) = torch.autograd.grad(loss, seen[0][-1])
            see(0, seen[0][:4], grad, len(part) / len(ids))
    return torch.stack([total[layer] for layer in sorted(total)])


def _hook(see: Callable[..., None], layer: int, told: Any, share: float) -> Callable[[Tensor], None]:
    return lambda grad: see(layer, told, grad, share)


@contextmanager
def _watched(model: nn.Module, dense: AttentionMethod) -> Iterator[dict[int, tuple[Any, ...]]]:
    """Inside, every attention layer's (q, k, v, scale, output) of the last forward; the first output starts the graph."""
    seen: dict[int, tuple[Any, ...]] = {}
    with use(model, dense) as run:
        attend = run.call

        def call(module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
            scale, window = told.get("scale"), told.get("window")
            if told.get("mask") is None and (window is None or window >= q.shape[2]):
                # torch's own attention: same numbers, and the fastest backward there is.
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            else:
                out = attend(module, layer, q, k, v, **told)
            if not seen:
                out = out.detach().requires_grad_()  # nothing before the first layer's output is asked for
            seen[layer] = (q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, out)
            return out

        run.call = call  # type: ignore[method-assign]
        yield seen


def _logits(told: Any) -> Tensor:
    logits = getattr(told, "logits", told)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise BadInput("moa: the model must give logits (samples, length, vocabulary)")
    return logits
