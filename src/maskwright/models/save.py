"""A pruned model as a folder that plain transformers loads, written tensor by tensor where the source allows it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from maskwright.models.load import Source, quiet, stored_dtype

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KEPT = ("config.json", "generation_config.json", "model.safetensors.index.json")


def save(model: Any, tokenizer: Any, source: Source, folder: Path, changed: Collection[str]) -> None:
    """Write config, tokenizer and weights; `changed` names the parameters that differ from the source's.

    Where the source's own .safetensors files name all of them, those files are copied one tensor at a time with
    the changed ones put in (same names, dtypes and shards), so no second copy of the model is held. Otherwise
    transformers writes the model itself.
    """
    files = sorted(source.folder.glob("*.safetensors"))
    with quiet():
        if _nameable(files, {name: tuple(model.get_parameter(name).shape) for name in changed}):
            for name in _KEPT:
                if (source.folder / name).is_file():
                    shutil.copyfile(source.folder / name, folder / name)
            for file in files:
                _copy(file, folder / file.name, {name: model.get_parameter(name) for name in changed})
        else:
            model.to(stored_dtype(source)).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # weight files are written private; the folder is to be handed on


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A .safetensors header and the offset where its data begins."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return json.loads(handle.read(length)), 8 + length


def _nameable(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the files hold every one of these tensors, in this shape and as plain floats."""
    told = {name: entry for file in files for name, entry in _header(file)[0].items() if name != "__metadata__"}
    return bool(shapes) and all(
        name in told and tuple(told[name]["shape"]) == shape and told[name]["dtype"] in _FLOATS
        for name, shape in shapes.items()
    )


def _copy(source: Path, target: Path, changed: Mapping[str, Any]) -> None:
    """`source` with the tensors of `changed` replaced, in the file's own order, dtypes and header."""
    header, start = _header(source)
    with source.open("rb") as reading, target.open("wb") as writing:
        writing.write(reading.read(start))
        entries = [(name, told) for name, told in header.items() if name != "__metadata__"]
        for name, told in sorted(entries, key=lambda entry: entry[1]["data_offsets"]):
            low, high = told["data_offsets"]
            if name in changed:
                writing.write(_bytes(told["dtype"], changed[name]))
            else:
                reading.seek(start + low)
                _pipe(reading.read, writing.write, high - low)
        writing.flush()
        os.fsync(writing.fileno())


def _bytes(dtype: str, parameter: Any) -> memoryview:
    import torch

    value = parameter.detach().cpu().to(getattr(torch, _FLOATS[dtype])).contiguous()
    return value.flatten().view(torch.uint8).numpy().data


def _pipe(read: Callable[[int], bytes], write: Callable[[bytes], Any], left: int, piece: int = 1 << 22) -> None:
    while left:
        part = read(min(left, piece))
        left -= len(part)
        write(part)
