"""Run a sparse model from packed weights: every linear layer in the form that is fastest here, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear import (
    Engine,
    Indexed,
    LoopLinear,
    Packed,
    PackedLinear,
    dense_module,
    engine,
    index,
    pack,
    unpack,
)
from maskwright.weights.speed import Known, Speed, layer_speed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDEX_BELOW = 0.35  # above this density the index layout takes more bytes than the bitmask, and is no faster
SPARSE_BELOW = 0.95  # a denser weight is taken for a dense one
SLACK = 1.05  # how much slower than dense a packed layer may be for the memory it saves


@dataclass(frozen=True)
class Layer:
    """What one linear layer runs as, and why. `bytes` are of its weight, before and after."""

    name: str
    shape: tuple[int, int]
    density: float
    form: str  # bitmask, indexed, loop (the kernels' dense loop) or torch
    speed: Speed
    dense_bytes: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Time of the fastest dense form over that of the fastest packed one."""
        times = self.speed.times
        return times[self.speed.best("torch", "loop")] / times[self.speed.best("bitmask", "indexed")]

    @property
    def verdict(self) -> str:
        """One line: by how much packed wins, or why it does not."""
        if self.ratio >= 1:
            return f"packed is faster: {self.ratio:.2f} x dense"
        if self.form in ("bitmask", "indexed") and self.ratio * SLACK >= 1:
            return f"as fast as dense ({self.ratio:.2f} x) in {self.bytes / self.dense_bytes:.2f} of the bytes"
        if self.density > 0.8:
            why = "too few zeros to save reading"
        elif self.shape[0] * self.shape[1] < 1 << 20:
            why = "a call costs more than so small a weight's memory"
        else:
            why = "spreading the values costs more than reading the zeros"
        return f"dense is faster here ({self.ratio:.2f} x): {why}"


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: the engine, and every linear layer it looked at."""

    engine: Engine
    layers: list[Layer] = field(default_factory=list)

    @property
    def packed(self) -> list[Layer]:
        """The layers that run packed."""
        return [layer for layer in self.layers if layer.form in ("bitmask", "indexed")]

    def __str__(self) -> str:
        before, after = (sum(getattr(layer, key) for layer in self.layers) for key in ("dense_bytes", "bytes"))
        told = f"{len(self.packed)} of {len(self.layers)} linear layers run packed ({self.engine.name}), "
        told += f"their weights take {after / 2**20:.1f} MiB instead of {before / 2**20:.1f}"
        return told + (f"; no native kernels: {self.engine.reason}" if self.engine.reason else "")


def _dense_weight(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a Linear, of GPT-2's Conv1D (known by name, so transformers is not imported), or None."""
    if type(module) in (nn.Linear, LoopLinear):
        return module.weight.detach()  # type: ignore[operator,union-attr]
    transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return module.weight.detach().T if transposed else None  # type: ignore[operator,union-attr]


@torch.no_grad()
def accelerate(
    model: nn.Module, *, values: torch.dtype | None = None, batch: int = 1, force: bool = False,
    remeasure: bool = False, say: Callable[[str], Any] | None = None,
) -> Acceleration:  # fmt: skip
    """Replace the sparse linear layers of `model`, in place, by packed ones where that is faster on this machine.

    Each kind of layer (shape, density, dtype) is timed once against torch and against the kernels' own dense loop;
    speeds are kept in the cache (`remeasure` times them again). A weight that several modules share, or that keeps
    more than 95%, stays as it is. values: dtype to store (None: the weight's own; torch.int8 is per row); layers that are
    packed already keep theirs.
    batch: rows of input a call that the forms are timed on, 1 for decoding one text; packed wins less, the more there are.
    force: run every sparse layer packed, also where dense is faster. The model is for inference afterwards.

    Raises BadInput when no linear layer is sparse, saying how dense the sparsest is.
    """
    told = Acceleration(engine())
    known, fresh = Known(), set()
    sparsest = 1.0
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path in [name for name, _ in model.named_modules()]:  # by name: a replaced layer must be free to go
        module = model.get_submodule(path)
        if isinstance(module, PackedLinear):
            packed = module.packed
            if not isinstance(packed, Packed):  # already placed by an earlier call
                continue
            weight = unpack(packed)
        else:
            found = _dense_weight(module)
            if found is None or uses[id(module.weight)] > 1 or found.dtype not in FLOATS:
                continue
            weight, keep = found, found != 0
            density = int(keep.sum()) / max(1, weight.numel())
            sparsest = min(sparsest, density)
            if density > SPARSE_BELOW:
                continue
            packed = pack(weight, keep, values)  # by the mask, so that -0.0, which adds nothing, takes no room
        forms = forms_of(packed)
        key = known.key(weight, packed.density, packed.values.dtype, forms, batch)
        speed = None if remeasure and key not in fresh else known.get(key)
        if speed is None:
            if say:
                say(f"timing {weight.shape[0]} x {weight.shape[1]} at density {packed.density:.2f}")
            other = torch.float32 if weight.dtype != torch.float32 else torch.bfloat16
            speed = layer_speed(weight.contiguous(), forms, dense={f"torch {_name(other)}": weight.to(other)}, batch=batch)
            known.put(key, speed)
            fresh.add(key)
        told.layers.append(_replace(model, path, module, weight, forms, speed, force))
    if not told.layers:
        raise BadInput(f"not sparse: the sparsest linear layer keeps {sparsest:.4f} of its weights")
    return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(told: Acceleration) -> list[dict[str, Any]]:
    """One row a kind of layer, as plain data: times in milliseconds a call, bytes of one weight, and the verdict."""
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in told.layers:
        kind = ".".join([part for part in layer.name.split(".") if not part.isdigit()][-2:])
        groups.setdefault((kind, layer.shape, layer.form), []).append(layer)
    out = []
    for (kind, shape, form), group in groups.items():
        times = group[0].speed.times
        best = min((name for name in times if name == "loop" or name.startswith("torch")), key=lambda name: times[name])
        out.append({
            "kind": kind, "number": len(group), "shape": list(shape),
            "density": sum(layer.density for layer in group) / len(group), "form": form,
            "dense_ms": times[group[0].speed.best("torch", "loop")], "best_dense": best, "best_dense_ms": times[best],
            "packed_ms": times[group[0].speed.best("bitmask", "indexed")], "ratio": group[0].ratio,
            "dense_bytes": group[0].dense_bytes, "bytes": group[0].bytes, "dense_from": group[0].speed.dense_from,
            "times": dict(times), "verdict": group[0].verdict,
        })  # fmt: skip
    return out


def forms_of(packed: Packed) -> dict[str, Packed | Indexed]:
    """The layouts worth measuring for a weight."""
    forms: dict[str, Packed | Indexed] = {"bitmask": packed}
    if packed.density < INDEX_BELOW:
        forms["indexed"] = index(packed)
    return forms


def _replace(
    model: nn.Module, path: str, module: nn.Module, weight: Tensor, forms: dict[str, Packed | Indexed], speed: Speed,
    force: bool,
) -> Layer:  # fmt: skip
    packed, dense = speed.best(*forms), speed.best("torch", "loop")
    form = packed if force or speed.times[packed] <= SLACK * speed.times[dense] else dense
    bias: Tensor | None = getattr(module, "bias", None)
    if form in forms:
        made: nn.Module = PackedLinear(forms[form], bias, speed.dense_from)
    elif isinstance(module, nn.Linear) and form == "torch":
        made = module
    else:
        made = dense_module(weight.contiguous(), bias, LoopLinear if form == "loop" else nn.Linear)
    if made is not module:
        model.set_submodule(path, made.train(module.training))
    size = weight.numel() * weight.element_size()
    shape, density = (weight.shape[0], weight.shape[1]), forms["bitmask"].values.numel() / max(1, weight.numel())
    return Layer(path, shape, density, form, speed, size, forms[form].nbytes if form in forms else size)
