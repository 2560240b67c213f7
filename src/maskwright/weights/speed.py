"""How fast one linear layer runs in each of its forms: side by side, weights outside the caches, as in decoding."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.cache import cache_dir, write_atomic
from maskwright.kernels.packed_linear import MOST, NEVER, Indexed, Packed, PackedLinear, engine, linear
from maskwright.kernels.packed_linear.native import version

_COLD = 64 << 20  # bytes read before a weight is read again: more than the caches of the chips this runs on
_MOST_COPIES = 48
_FEW = 8  # copies, below which a weight is large enough for its caches to be emptied by reading something else
_LARGE = (4, 8, 16, 64, 256)  # rows of input at which the packed kernel is held against the expanded weight


@dataclass(frozen=True)
class Speed:
    """Milliseconds a call, by form; `dense_from`, the rows of input from which expanding a packed weight is faster."""

    times: Mapping[str, float]
    dense_from: int = NEVER

    def best(self, *kinds: str) -> str:
        """The fastest among `kinds` of those that were measured."""
        return min((kind for kind in kinds if kind in self.times), key=lambda kind: self.times[kind])


def interleaved(calls: Mapping[str, Sequence[Callable[[], Any]]], turns: int, flush: bool = False) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns, the copies of one in rotation; `flush` empties the caches before each."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    other = torch.ones(_COLD // 4) if flush else None
    for turn in range(turns + 1):
        for name, copies in calls.items():
            call = copies[turn % len(copies)]
            if other is not None:
                other.sum()
            start = time.perf_counter()
            call()
            if turn:  # the first call prepares what is made once
                found[name].append((time.perf_counter() - start) * 1e3)
    return found


def median(values: list[float]) -> float:
    """The middle of the sorted values (the upper one of two)."""
    return sorted(values)[len(values) // 2]


@torch.inference_mode()
def layer_speed(
    weight: Tensor, forms: Mapping[str, Packed | Indexed], turns: int = 9, dense: Mapping[str, Tensor] | None = None,
    batch: int = 1,
) -> Speed:  # fmt: skip
    """Time one layer (out, in) on `batch` rows of input: torch's Linear, the kernels' dense loop, each packed form.

    dense: further weights to give to torch, by name, e.g. the same in another dtype.
    """
    x = torch.randn(batch, weight.shape[1], generator=torch.Generator().manual_seed(0))
    given = {"torch": weight, **(dense or {})}
    # One round over all forms reads this much. Code and tables stay in the caches, as in decoding, where many copies of
    # a small weight pass through them; a large one is put out of them by reading something else.
    size = sum(w.numel() * w.element_size() for w in given.values()) + sum(form.nbytes for form in forms.values())
    many = min(_MOST_COPIES, 2 * _COLD // max(1, size))
    copies = range(many if many >= _FEW else 1)
    calls: dict[str, list[Callable[[], Any]]] = {
        name: [partial(F.linear, x.to(one.dtype), one.clone() if i else one) for i in copies] for name, one in given.items()
    }
    x = x.to(weight.dtype)
    if engine().native and batch <= MOST:
        same = [call.args[1] for call in calls["torch"]]  # type: ignore[attr-defined]
        # Half a rotation away from torch's turn, or it would find what torch has just read.
        calls["loop"] = [partial(linear, x, same[i - len(same) // 2]) for i in copies]
    # As modules: what is found out once about a weight is not found out at every call.
    calls |= {
        name: [partial(deepcopy(PackedLinear(form)) if i else PackedLinear(form), x) for i in copies]
        for name, form in forms.items()
    }
    found = interleaved(calls, max(turns, len(copies)), flush=len(copies) == 1)
    times = {name: median(values) for name, values in found.items()}
    return Speed(times, _dense_from(forms[min(forms, key=lambda name: times[name])], x) if forms else NEVER)


def _dense_from(form: Packed | Indexed, x: Tensor) -> int:
    for rows in _LARGE:
        many = x[:1].expand(rows, -1).contiguous()
        calls = {name: [partial(PackedLinear(form, None, at), many)] for name, at in (("packed", NEVER), ("dense", 1))}
        times = interleaved(calls, 1)
        if median(times["dense"]) < median(times["packed"]):
            return rows
    return NEVER


@cache
def _machine() -> tuple[str, str]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(errors="replace").splitlines() if cpu.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return name, torch.backends.cpu.get_cpu_capability()


class Known:
    """Speeds measured before on this machine, kept in a JSON file of the cache beside the kernels they are of."""

    def __init__(self) -> None:
        self.path = cache_dir() / "kernels" / f"speeds-{version()}.json"

    def key(self, weight: Tensor, density: float, values: torch.dtype, forms: Mapping[str, Any], batch: int) -> str:
        """What a speed depends on: machine, engine, threads, shape, batch, dtypes and the density to the nearest 0.02."""
        told = (*_machine(), engine().name, torch.get_num_threads(), tuple(weight.shape), batch)
        return json.dumps([*map(str, told), str(weight.dtype), str(values), round(density * 50) / 50, sorted(forms)])

    def read(self) -> dict[str, Any]:
        """Everything kept; nothing when the file is absent or damaged."""
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    def get(self, key: str) -> Speed | None:
        """The speed kept under `key`, if it is a whole one."""
        told: Any = self.read().get(key)
        try:
            times = {str(name): float(value) for name, value in told["times"].items()}
            return Speed(times, int(told["dense_from"]))
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def put(self, key: str, speed: Speed) -> None:
        """Keep one more."""
        write_atomic(self.path, json.dumps(self.read() | {key: asdict(speed)}, indent=1).encode())
