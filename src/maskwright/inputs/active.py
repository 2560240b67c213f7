"""Active-only operators as a context: a convnet that sees only the kept patches, in every layer (SparK, arXiv 2301.03580).

    with active(model, mask):
        maps = model(images)

A place of a feature map is active when the mask keeps the patch it lies in. Convolution, pooling, normalisation and means
over space then work as if the other places did not exist: they give 0 there, and take nothing from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.inputs.active_maps import FIRST, Maps
from maskwright.inputs.active_ops import run


@contextmanager
def active(model: nn.Module, mask: Mask, *, force: bool = False) -> Iterator[None]:
    """Calls of `model` in this thread see only what `mask` (batch, rows, columns) keeps; its class is not touched.

    Input images (batch, channels, height, width) are hidden outside the mask, and every map is exactly 0 there. A place of a
    map is active when its patch is kept; on a map coarser than the mask, when anything under it is. BatchNorm takes its
    statistics, running ones too, from active places only, and so do squeeze-excite, global pools and means.
    A mask that keeps everything leaves the model its own operators, bit for bit; `force` goes by the active ones anyway.
    Contexts of several models, threads, and of one model inside itself (the inner mask counts) do not disturb each other.
    Where activations are recomputed in backward, call backward inside the context.

    Raises BadInput for a mask that keeps nothing of a sample, and naming the layer: a map whose size does not divide the
    mask's or the other way round, fewer than 2 active places for a BatchNorm that trains, an operator with no active form.
    """
    if mask.keep.ndim != 3:
        raise BadInput(f"active-only operators need a mask (batch, rows, columns), got shape {mask.shape}")
    empty = ~mask.keep.flatten(1).any(1)
    if bool(empty.any()):
        raise BadInput(f"the mask of shape {mask.shape} keeps nothing of sample {int(empty.nonzero()[0])}")
    if not force and bool(mask.keep.all()):
        with _apart(model):
            yield
        return
    scope = _Scope(model, mask)
    with _apart(model):
        handles = []
        try:
            for name, module in model.named_modules():
                _plain(name, module)
                handles.append(module.register_forward_pre_hook(partial(scope.enter, name), prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(scope.leave, always_call=True))
            yield
        finally:
            scope.close()
            for handle in handles:
                handle.remove()


class _Scope(TorchFunctionMode):
    """One context: in this thread, while a module of the model runs, every torch function goes through `run`."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.model, self.maps = model, Maps(mask.keep)
        self.thread, self.paused = get_ident(), False
        self.running: list[str] = []

    def enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a module: remember its name. The outermost one turns the mode on and has its images hidden."""
        if self.paused or get_ident() != self.thread:
            return None
        self.running.append(f"{name or 'model'} ({type(module).__name__})")
        self.maps.layer = self.running[-1]
        if len(self.running) > 1:
            return None
        self.__enter__()
        args, kwargs = tuple(self._hidden(x) for x in args), {key: self._hidden(x) for key, x in kwargs.items()}
        if module is self.model and not any(self.maps.space(x) for x in (*args, *kwargs.values())):
            self.maps.refuse("active-only operators need images (batch, channels, height, width)")
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """After a module, also one that failed. A map that came out by a way no torch function shows is masked here."""
        if not self.running or self.paused or get_ident() != self.thread:
            return None
        lost = isinstance(out, Tensor) and out.ndim == 4 and out.shape[0] == self.maps.batch and out.shape[2:].numel() > 1
        found = None
        if lost and self.maps.space(out) is None and any(self.maps.space(x) for x in args):
            found = self.maps.put(out, FIRST)
        self.running.pop()
        self.maps.layer = self.running[-1] if self.running else ""
        if not self.running:
            self.__exit__(None, None, None)
        return found

    def close(self) -> None:
        """Turn the mode off after a call that was interrupted."""
        if self.running:
            self.running.clear()
            self.__exit__(None, None, None)

    def _hidden(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 4 or self.maps.space(x) is not None:
            return x
        if len(x) != self.maps.batch:
            self.maps.refuse(f"a mask over {self.maps.batch} samples does not lie on {len(x)} (shape {tuple(x.shape)})")
        x = self.maps.put(x, FIRST)
        if bool(x.detach().isnan().any()):
            self.maps.refuse(f"images of shape {tuple(x.shape)} are NaN where the mask keeps them")
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else dict(kwargs)
        return func(*args, **kwargs) if self.paused else run(self.maps, func, args, kwargs)


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Let an outer context of this model and thread rest; refuse one of a model that shares modules with it."""
    found = set()
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            scope = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(scope, _Scope) and scope.thread == get_ident() and not scope.paused:
                if scope.model is not model:
                    raise BadInput(f"a part of {type(model).__name__} is under active() with another model already")
                found.add(scope)
    for scope in found:
        scope.paused = True
    try:
        yield
    finally:
        for scope in found:
            scope.paused = False


def _plain(name: str, module: nn.Module) -> None:
    """Refuse what runs out of sight of torch functions."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    spread_out = (
        isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_available() and torch.distributed.is_initialized()
    )
    if compiled or spread_out or isinstance(module, torch.jit.ScriptModule):
        what = "a SyncBatchNorm over several processes" if spread_out else "a compiled or scripted module"
        raise BadInput(f"{name or 'model'} ({type(module).__name__}): {what} has no active-only form; pass the plain module")
