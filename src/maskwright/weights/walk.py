"""The streaming calibration walk: one block in memory at a time, each pruned before the next one sees its inputs.

Works on modules by name and type. A stack of blocks counts as a chain when, in one probing forward, each block's
hidden input is the very tensor the block before put out; anything else (a ResNet's stages, say) is walked as a
whole model. Keyword arguments (masks, position embeddings) are captured per block and passed through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.weights.capture import Batch, call, capture, first, probe, run
from maskwright.weights.sites import WeightSite, chains
from maskwright.weights.statistics import InputStatistics


@dataclass(frozen=True)
class Step:
    """What the walk hands out: the sites of one block with their statistics, to be pruned before going on.

    settled: once the next step has been asked for, nothing reads these weights again.
    """

    label: str
    sites: tuple[WeightSite, ...]
    settled: bool = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) and no gradients; each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Mapping[str, WeightSite],
    needs: frozenset[str],
    *,
    propagate: bool = True,
    done: frozenset[str] = frozenset(),
    sample_rows: int = 512,
) -> Iterator[Step]:
    """Yield block after block with statistics; the caller prunes the sites in place before asking for the next.

    propagate: run each pruned block again so that later blocks see pruned inputs (False: all statistics are those
    of the model as it stands). done: labels of blocks that are already pruned; they are run, not yielded.
    Raises BadInput for no batches, and naming a site that no input reached.
    """
    if not batches:
        raise BadInput("calibration needs at least one batch")
    left = dict(sites)
    with evaluating(model):
        probed = [(path, blocks, probe(model, blocks, batches[0])) for path, blocks in chains(model)]
        proven = [(path, blocks, wraps) for path, blocks, wraps in probed if wraps is not None]
        inside = {id(m) for _, blocks, _ in proven for block in blocks for m in block.modules()}
        outside = [s for s in left.values() if not any(id(owner) in inside for owner, _ in s.owners)]
        if outside and "model" not in done:
            gather = _Gather(outside, needs, len(batches), sample_rows)
            for batch in batches:
                with gather.listening():
                    run(model, batch)
            yield Step("model", gather.finish())
        streams = []
        for path, blocks, wraps in proven:
            mine = [[s for s in left.values() if _owns(block, s)] for block in blocks]
            if any(mine):
                streams.append((path, blocks, wraps, mine))
        for stream in streams:
            # An earlier chain (an encoder) is run again whole to capture what a later one (a decoder) is given.
            last = stream is streams[-1]
            for step in _stream(model, batches, *stream, needs, propagate, done, sample_rows):
                yield replace(step, settled=last and all(len(s.owners) == 1 for s in step.sites))


def _owns(block: nn.Module, site: WeightSite) -> bool:
    return any(site.owners[0][0] is module for module in block.modules())


def _stream(
    model: nn.Module,
    batches: Sequence[Batch],
    path: str,
    blocks: list[nn.Module],
    wraps: list[Any],
    mine: list[list[WeightSite]],
    needs: frozenset[str],
    propagate: bool,
    done: frozenset[str],
    sample_rows: int,
) -> Iterator[Step]:
    wanted = [i for i, found in enumerate(mine) if found and f"{path}.{i}" not in done]
    if not wanted:
        return
    hidden, calls = capture(model, blocks, wraps, batches)
    last = max(wanted)
    for i, block in enumerate(blocks[: last + 1]):
        label = f"{path}.{i}"
        fresh = bool(mine[i]) and label not in done
        if fresh:
            gather = _Gather(mine[i], needs, len(batches), sample_rows)
            for b, x in enumerate(hidden):
                with gather.listening():
                    out = first(call(block, x, calls[b][i]))
                if not propagate:
                    hidden[b] = out
            yield Step(label, gather.finish())
        if i < last and (propagate or not fresh):
            for b, x in enumerate(hidden):
                hidden[b] = first(call(block, x, calls[b][i]))


class _Gather:
    """Hooks that add each site's input to its statistics. Sites fed by the same tensor (q, k, v) share one sum."""

    def __init__(self, sites: Sequence[WeightSite], needs: frozenset[str], batches: int, sample_rows: int) -> None:
        self._sites, self._needs, self._batches, self._sample_rows = sites, needs, batches, sample_rows
        self._sums: dict[str, InputStatistics] = {}
        self._leader: dict[str, str] = {}
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        self._seen.clear()
        with ExitStack() as stack:
            for site in self._sites:
                owner = next((m for m, _ in site.owners if not isinstance(m, nn.Embedding)), None)
                if owner is None:
                    raise BadInput(f"{site.name}: an embedding has no input statistics")
                hook = owner.register_forward_pre_hook(
                    lambda m, args, kwargs, s=site: self._add(s, m, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield
        self._seen.clear()

    def _add(self, site: WeightSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        # The tensor itself is held in `_seen` for the length of one forward, so its id cannot be used again.
        plain = not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        key = (id(x), 0 if plain else id(module))
        leader = self._seen.setdefault(key, (site.name, x))[0]
        if self._leader.setdefault(site.name, leader) != leader:
            raise BadInput(f"{site.name}: it shares its input with another layer in some batches only")
        if leader == site.name:
            if site.name not in self._sums:
                self._sums[site.name] = InputStatistics(self._needs, self._batches, self._sample_rows)
            self._sums[site.name].add(module, x)

    def finish(self) -> tuple[WeightSite, ...]:
        out = []
        for site in self._sites:
            if site.name not in self._leader:
                raise BadInput(f"{site.name}: no calibration input reached this weight")
            out.append(replace(site, stats=self._sums[self._leader[site.name]].finish(site)))
        return tuple(out)
