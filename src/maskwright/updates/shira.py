"""Sparse differences as PEFT's SHiRA adapters (arXiv 2406.13175): written so that PEFT loads them, and read back.

SHiRA holds r * (rows + cols) entries of every target, with one r for all: shorter deltas are filled up with zeros.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.updates.adapter_folder import CONFIG, PREFIX, WEIGHTS, write_adapter
from maskwright.updates.deltas import Delta, Deltas

_VALUES, _INDICES = ".shira_weight", ".shira_indices"


def write_shira(folder: str | Path, deltas: Deltas, *, base: str = "") -> None:
    """Write an adapter that `PeftModel.from_pretrained(model, folder)` loads. base: the base model's name or path.

    Raises BadInput for deltas that SHiRA cannot hold (other than weights of Linear layers; tensors stored whole; so many
    entries that r * (rows + cols) exceeds the layer), naming the first.
    """
    if deltas.full:
        raise BadInput(f"{next(iter(deltas.full))} is stored whole, which SHiRA cannot hold: use without_full()")
    odd = [name for name, delta in deltas.items() if not name.endswith(".weight") or len(delta.shape) != 2]
    if odd or not len(deltas):
        told = f"{odd[0]} is none ({len(odd)} tensors)" if odd else "there is none"
        raise BadInput(f"SHiRA holds differences of Linear weights; {told}")
    rank = max(1, *(-(-delta.count // sum(delta.shape)) for delta in deltas.values()))
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        rows, cols = delta.shape
        if rank * (rows + cols) > rows * cols:
            raise BadInput(f"{name}: r {rank} needs {rank * (rows + cols)} entries of a weight of shape {delta.shape}")
        free = rank * (rows + cols) - delta.count
        where = torch.cat([delta.indices, torch.zeros(free, dtype=torch.int64)])
        path = PREFIX + name.removesuffix(".weight")
        tensors[path + _VALUES] = torch.cat([delta.values.float(), torch.zeros(free)])
        tensors[path + _INDICES] = torch.stack([where // cols, where % cols]).to(torch.int32)
    config = {
        "peft_type": "SHIRA", "base_model_name_or_path": base or None, "task_type": None, "inference_mode": True, "r": rank,
        "mask_type": "random", "random_seed": None, "init_weights": True, "fan_in_fan_out": False, "modules_to_save": None,
        "target_modules": [name.removesuffix(".weight") for name in deltas],
    }  # fmt: skip
    write_adapter(Path(folder), tensors, config)


def read_shira(folder: str | Path, shapes: dict[str, tuple[int, int]]) -> Deltas:
    """A SHiRA adapter as PEFT saves it. shapes: of the base's weights by name, which the adapter does not hold.

    Raises BadInput in one line for a folder that is not one, and for indices outside a weight.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # missing, not JSON, not safetensors
        raise BadInput(f"{folder}: not a readable adapter: {' '.join(str(error).split())[:160]}") from None
    if kind != "SHIRA":
        raise BadInput(f"{folder / CONFIG}: peft_type is {kind!r}, not 'SHIRA'")
    out = {}
    for key in sorted(k for k in tensors if k.endswith(_VALUES)):
        path = key.removesuffix(_VALUES)
        name = path.removeprefix(PREFIX) + ".weight"
        indices = tensors.get(path + _INDICES)
        if name not in shapes or indices is None or indices.shape != (2, len(tensors[key])):
            raise BadInput(f"{folder / WEIGHTS}: {name} is unknown, or its indices do not fit its values")
        rows, cols = shapes[name]
        if bool((indices < 0).any()) or bool((indices >= torch.tensor([[rows], [cols]])).any()):
            raise BadInput(f"{folder / WEIGHTS}: {name} of shape {shapes[name]} has indices outside it")
        where, place = (indices[0].long() * cols + indices[1].long()).unique(return_inverse=True)
        values = torch.zeros(len(where)).index_add_(0, place, tensors[key].float())
        moved = values != 0
        out[name] = Delta((rows, cols), where[moved], values[moved])
    return Deltas(out, made_by={"method": "shira"})
