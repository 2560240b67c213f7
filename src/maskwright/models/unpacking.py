"""A packed checkpoint written back as the dense one it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from maskwright.kernels.packed_linear import layout
from maskwright.models.folder import CONFIG, INDEX_END, copy_others, dump, fresh, read_object, sync
from maskwright.models.packed import PackedCheckpoint
from maskwright.models.packed_format import VALUES, Weight
from maskwright.models.raw import DTYPES, Entry, parse, place, raw_bytes, render


def unpack(source: Path, out: Path, replace: bool = False) -> None:
    """Write the dense folder of a packed folder, index or file; `out` appears whole or not at all.

    Float values in the source's dtype give its files byte for byte, int8 gives float32 tensors, and other values stay
    in their dtype. A legacy checkpoint becomes one model.safetensors. The digest is checked first. Raises BadInput
    for what PackedCheckpoint refuses, for some parts of a model only, and for `out` as `pack` does.
    """
    with fresh(out, source, replace) as work:
        held = PackedCheckpoint(source)
        made = _ours(held, work) if held.parts else _foreign(held, work)
        if source.is_dir():
            copy_others(source, work, made)


def _code(weight: Weight) -> str:
    return "F32" if weight.values == "int8" else VALUES[weight.values]


def _ours(held: PackedCheckpoint, work: Path) -> list[str]:
    held.complete()
    held.verify()
    same, size = True, 0
    for part in held.parts:
        text = part.manifest["source"]["header"].encode()
        head, entries = len(text).to_bytes(8, "little") + text, dict(part.source)
        codes = {weight.name: _code(weight) for weight in part.weights}
        if any(entries[name].dtype != code for name, code in codes.items()):
            same = False
            entries = _converted(entries, codes)
            head = render(entries, parse(part.manifest["source"]["header"])[0])
        size += sum(entry.nbytes for entry in entries.values())
        _write(work / part.manifest["source"]["file"], head, entries, held)
    restore = held.parts[0].manifest["restore"]
    for name, text in restore.items():
        path = work / name
        if name.endswith(INDEX_END) and not same:
            told = read_object(path, text)
            meta = told.get("metadata")
            dump(path, told | {"metadata": (meta if isinstance(meta, dict) else {}) | {"total_size": size}})
        else:
            path.write_bytes(text.encode())
    return list(restore)


def _converted(source: Mapping[str, Entry], codes: Mapping[str, str]) -> dict[str, Entry]:
    """The source's entries in their order, with other dtypes."""
    return place(
        {
            name: (code, entry.shape, prod(entry.shape) * DTYPES[code].itemsize)
            if (code := codes.get(name))
            else (entry.dtype, entry.shape, entry.nbytes)
            for name, entry in source.items()
        }
    )


def _foreign(held: PackedCheckpoint, work: Path) -> list[str]:
    tensors = {w.name: (_code(w), w.shape, w.dense_bytes) for w in held.weights.values()}
    for name, _ in held.dense():
        entry = held.entry(name)[1]
        tensors[name] = (entry.dtype, entry.shape, entry.nbytes)
    order = sorted(tensors, key=lambda name: (-DTYPES[code].itemsize if (code := tensors[name][0]) in DTYPES else 0, name))
    entries = place({name: tensors[name] for name in order})
    _write(work / "model.safetensors", render(entries, {"format": "pt"}), entries, held)
    config = held.path / CONFIG
    if not config.is_file():
        return []
    dump(work / CONFIG, _dense_config(read_object(config, config.read_text(encoding="utf-8"))))
    return [CONFIG]


def _dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """Without what says that the weights are packed: transformers would try to unpack them again."""
    out = {key: value for key, value in config.items() if key != "sparsity_config"}
    for key in ("compression_config", "quantization_config"):
        if isinstance(out.get(key), dict) and "sparsity_config" in out[key]:
            out[key] = {inner: value for inner, value in out[key].items() if inner != "sparsity_config"}
            if not out[key].get("config_groups"):
                del out[key]
    return out


def _write(path: Path, head: bytes, entries: Mapping[str, Entry], held: PackedCheckpoint) -> None:
    with path.open("wb") as handle:
        handle.write(head)
        for name in entries:
            for piece in _dense_bytes(name, held):
                handle.write(piece)
        sync(handle)


def _dense_bytes(name: str, held: PackedCheckpoint) -> Iterator[bytes | memoryview]:
    if name in held.weights:
        yield raw_bytes(layout.unpack(held.packed(name)))
    else:
        raw, entry = held.entry(name)
        yield from raw.chunks(entry)
