"""Run: one method at work on one model: makes sites, keeps states, records what was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.attention.attend import attend
from maskwright.attention.cache import is_evicted, state_of
from maskwright.attention.method import AttentionMethod
from maskwright.attention.plan import KeyPlan
from maskwright.attention.site import AttentionSite, State
from maskwright.attention.structure import Causal, Padding, Structure, Window
from maskwright.core.errors import BadInput


@dataclass(frozen=True)
class Record:
    """What one call of one layer read, mean over the batch: pairs per head, and a coarse picture of them.

    kept and computed (heads,): pairs a row sees, and pairs of whole groups of rows; `allowed` the pairs the model itself
    allows. picture (heads, rows, columns) bool. kv_read, kv_stored: bytes of keys and values read by this call, and held.
    """

    layer: int
    queries: int
    keys: int
    kept: Tensor
    computed: Tensor
    allowed: int
    picture: Tensor
    kv_read: int
    kv_stored: int


@dataclass
class Run:
    """A method running on a model. `records` fills while `record` is true."""

    method: AttentionMethod
    layers: int
    impl: str = "auto"
    seed: int = 0
    record: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    stored: dict[int, int] = field(default_factory=dict)
    _states: dict[int, State] = field(default_factory=dict)
    _structure: tuple[Any, Structure | None, Tensor | None] = (None, None, None)

    def tell(self, **what: Any) -> None:
        """What only the sampler knows (step, steps, new_tokens ...). Telling step 0 begins a new request."""
        if what.get("step") == 0:
            self.reset()
        self.told.update(what)

    def reset(self) -> None:
        """Forget the states of modules without a cache: a new request begins."""
        self._states.clear()

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held by the cache after the last call of each layer."""
        return sum(self.stored.values())

    def call(
        self, module: nn.Module, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
        mask: Tensor | None = None, window: int | None = None, held: Any = None, orphan: State | None = None,
        evict: Callable[[Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """One call of one layer -> (batch, heads, queries, width).

        mask (batch, keys) bool: real keys (None: all); window: the model's sliding window; held: the layer of the cache
        that k and v come from, or None; orphan: the state to use where a cache is there but not known yet; evict: called
        after the prefill with the keys that stay, where the method drops any.
        """
        evicted = is_evicted(held)
        queries, keys = q.shape[2], k.shape[2]
        begins = queries == keys and not evicted
        if evicted:
            first = held.first.repeat_interleave(q.shape[1] // k.shape[1], 1)
            structure: Structure | None = Causal() & Padding(first, torch.full_like(first, keys))
            start = None
        else:
            structure, start = self._allowed(mask, keys, causal, window)
        state = state_of(held) if held is not None else orphan if orphan is not None else self._state(layer, causal)
        if begins and causal:
            state.clear()
        site = AttentionSite(
            layer, self.layers, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, structure, keys - queries, begins,
            self.told, module, self.seed, evicted, start,
        )  # fmt: skip
        plan = self.method.plan(site, state).within(structure)
        if (plan.queries, plan.keys) != (queries, keys):
            raise BadInput(
                f"{type(self.method).__name__}, layer {layer}: the plan is for {plan.queries} queries and {plan.keys} keys, "
                f"the call has {queries} and {keys}"
            )
        out = attend(q, k, v, plan, scale=site.scale, impl=self.impl)
        self.stored[layer] = k.nbytes + v.nbytes
        if self.record:
            self.records.append(_record(site, plan))
        if begins and causal and evict is not None:
            keep = self.method.evict(site, state)
            if keep is not None:
                evict(keep if start is None else keep & (torch.arange(keys) >= start[:, None])[:, None])
        return out

    def _allowed(
        self, mask: Tensor | None, keys: int, causal: bool, window: int | None
    ) -> tuple[Structure | None, Tensor | None]:
        """The model's own structure, made once for all layers of a forward (they share the mask tensor)."""
        known, structure, first = self._structure
        key = (id(mask), keys, causal, window)
        if known is not None and known[0] == key:
            return structure, first
        structure, first = (Causal() if causal else None), None
        if window is not None and window < keys:
            structure = _both(structure, Window(window))
        if mask is not None:
            first, last = _padding(mask, keys)
            structure = _both(structure, Padding(first, last))
        self._structure = ((key, mask), structure, first)  # holds the mask, so that its id stays its own
        return structure, first

    def _state(self, layer: int, causal: bool) -> State:
        return State() if causal else self._states.setdefault(layer, State())


def _both(one: Structure | None, two: Structure) -> Structure:
    return two if one is None else one & two


def _padding(mask: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    if mask.ndim != 2 or mask.shape[1] != keys:
        raise BadInput(
            f"a padding mask is (batch, {keys}) for {keys} keys, got {tuple(mask.shape)}: give no custom 4-D mask"
        )
    real = mask.bool()
    count = real.sum(1)
    first = real.int().argmax(1)
    at = torch.arange(keys, device=mask.device)
    whole = (at >= first[:, None]) & (at < (first + count)[:, None])
    if not torch.equal(whole, real):
        raise BadInput("a padding mask with holes: the real tokens of a sample must lie side by side")
    return first, first + count


def _record(site: AttentionSite, plan: KeyPlan) -> Record:
    kept, computed = (_by_head(x.double(), site.heads) for x in plan.pairs())
    lists, held = plan.lists, site.k.nbytes + site.v.nbytes
    # A key head is read as often as the query head of its group that reads most: the others find it in the cache.
    read = _by_head(lists.lengths().sum(-1).double(), site.heads).view(site.kv_heads, -1).amax(1)
    picture = plan.picture()[0]
    return Record(
        site.layer, site.queries, site.keys, kept, computed, int(site.dense().pairs()[0].double().mean()),
        picture.repeat_interleave(site.heads // picture.shape[0], 0),
        int(read.sum()) * held // (site.kv_heads * site.keys), held,
    )  # fmt: skip


def _by_head(counts: Tensor, heads: int) -> Tensor:
    """(B', H') -> (heads,), the mean over the batch."""
    return counts.mean(0).repeat_interleave(heads // counts.shape[1])
