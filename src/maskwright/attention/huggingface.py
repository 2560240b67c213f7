"""Methods inside Hugging Face models, through AttentionInterface; model code is not touched.

`register()` names every room "maskwright:<slug>", so that `model.set_attn_implementation("maskwright:quest")` works.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from maskwright.attention.cache import evicted_layer, is_evicted, layer_of, state_of
from maskwright.attention.run import Run
from maskwright.attention.site import ModelShape, State
from maskwright.core.errors import BadInput
from maskwright.core.method import get, methods

if TYPE_CHECKING:
    from types import ModuleType

ACTIVE = "maskwright:active"
_WHERE = "transformers.modeling_utils"
_RUNS: WeakKeyDictionary[nn.Module, Run] = WeakKeyDictionary()  # the run of `use`, by attention module
_NAMED: WeakKeyDictionary[nn.Module, tuple[str, Run]] = WeakKeyDictionary()  # runs of set_attn_implementation
_CACHES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # the cache a module was called with
_ORPHANS: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()  # states made before a module's cache was known


def hosts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's attention modules that ask AttentionInterface, by name, in the order of their layers."""
    found = [(name, module) for name, module in model.named_modules() if _is_host(module)]
    return sorted(found, key=lambda pair: pair[1].layer_idx)  # type: ignore[arg-type, return-value]


def _is_host(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "_attn_implementation") and isinstance(getattr(module, "layer_idx", None), int) and (
        hasattr(module, "is_causal") or hasattr(module, "head_dim")
    )  # fmt: skip


def shape_of(module: nn.Module) -> ModelShape:
    """What methods may ask of a model, from one of its attention modules."""
    config: Any = module.config
    heads = config.num_attention_heads
    width = getattr(module, "head_dim", None) or config.hidden_size // heads
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelShape(config.num_hidden_layers, heads, kv_heads, int(width), _causal(module), sliding)


def _causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True)) and bool(getattr(module.config, "is_causal", True))


def install(module: nn.Module, run: Run) -> Callable[[], None]:
    """Let a module run `run` under the name ACTIVE, knowing its cache. Gives what undoes it."""
    _RUNS[module] = run
    handle = module.register_forward_pre_hook(_before, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        for known in (_RUNS, _CACHES, _ORPHANS):
            known.pop(module, None)  # type: ignore[attr-defined]

    return undo


def _before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Note the cache of the coming call, and settle what had to wait for it."""
    cache = kwargs.get("past_key_values")
    _CACHES[module] = cache
    layer, orphan = layer_of(cache, module.layer_idx), _ORPHANS.pop(module, None)  # type: ignore[arg-type]
    if layer is None or orphan is None or is_evicted(layer) or not layer.get_seq_length() or state_of(layer):
        return
    told = deepcopy(orphan)
    if told.pop("length", None) != layer.get_seq_length():
        return
    _ORPHANS[module] = orphan  # another copy of the same cache may ask for it too
    keep = told.pop("evict", None)
    state_of(layer).update(told)
    if keep is not None:
        _evict(cache, module.layer_idx, keep)  # type: ignore[arg-type]


def forward(
    slug: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What AttentionInterface calls. -> (batch, queries, heads, width), no weights.

    Raises BadInput for dropout, soft capping, attention sinks and 4-D masks, none of which a plan can hold.
    """
    index: int = module.layer_idx  # type: ignore[assignment]
    for what, given in (("attention dropout", dropout), ("soft capping", softcap), ("sink logits", kwargs.get("s_aux"))):
        if given is not None and not (isinstance(given, (int, float)) and given == 0):
            raise BadInput(f"maskwright:{slug}, layer {index}: {what} is not supported")
    run = _run(slug, module)
    known = module in _CACHES
    cache: Any = _CACHES.get(module)
    held, orphan = layer_of(cache, index), None
    if held is not None and getattr(held, "is_compileable", False):
        raise BadInput(f"maskwright:{slug}, layer {index}: a static cache holds empty keys; use the dynamic cache")
    evict: Callable[[Tensor], None] | None = None
    if not known:  # the first call ever under set_attn_implementation: the hook that shows the cache comes after it
        module.register_forward_pre_hook(_before, with_kwargs=True)
        orphan = _ORPHANS[module] = State()
        _CACHES[module] = None
        evict = partial(orphan.__setitem__, "evict")
    elif held is not None:
        if key.shape[2] > held.get_seq_length() and not is_evicted(held):
            raise BadInput(f"maskwright:{slug}, layer {index}: {type(held).__name__} hands out more keys than were seen")
        evict = partial(_evict, cache, index)
    if getattr(held, "is_sliding", False):
        evict = None  # such a layer drops its old keys by itself
    out = run.call(
        module, index, query, key, value, causal=_causal(module), scale=scaling, mask=attention_mask, window=sliding_window,
        held=held, orphan=orphan, evict=evict,
    )  # fmt: skip
    if orphan is not None:
        orphan["length"] = key.shape[2]
    if held is not None:
        now = layer_of(cache, index)
        run.stored[index] = now.keys.nbytes + now.values.nbytes
    return out.transpose(1, 2).contiguous(), None


def _evict(cache: Any, index: int, keep: Tensor) -> None:
    cache.layers[index] = evicted_layer(cache.layers[index], keep)


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """What AttentionMaskInterface calls: the 2-D padding mask or None; no (queries x keys) mask is ever made.

    Raises BadInput for a mask function of the model's own, which a 2-D mask cannot carry.
    """
    if kwargs.get("use_vmap") and kwargs.get("local_size") is None:
        raise BadInput("this model builds a mask function of its own (prefix, chunks or packed documents): not supported")
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.shape[1] == kv_length and bool(attention_mask.all()):
        return None
    return attention_mask


def _run(slug: str, module: nn.Module) -> Run:
    if slug == "active":
        run = _RUNS.get(module)
        if run is None:
            raise BadInput("attention 'maskwright:active' works inside `with maskwright.attention.use(model, method)`")
        return run
    named = _NAMED.get(module)
    if named is None or named[0] != slug:
        method, shape = get(slug)(), shape_of(module)
        method.fits(shape)
        named = _NAMED[module] = (slug, Run(method, shape.layers))
    return named[1]


def register() -> None:
    """Name every room of the place, and the one that `use` runs, in transformers' two registries."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for slug in ["active", *(card.slug for card in methods("attention") if card.contract.kind == "mask")]:
        AttentionInterface.register(f"maskwright:{slug}", partial(forward, slug))
        AttentionMaskInterface.register(f"maskwright:{slug}", mask)


class _Late(importlib.abc.MetaPathFinder):
    """Registers when transformers is loaded after us: importing it here would cost seconds where nobody asked for it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != _WHERE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register now if transformers' models are loaded, else as soon as they are."""
    if _WHERE in sys.modules:
        register()
    elif not any(isinstance(finder, _Late) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Late())
