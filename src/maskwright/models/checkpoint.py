"""A checkpoint's tensors, one at a time: a .safetensors file, a shard index, or a model folder. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maskwright.core.errors import BadInput

PACKED = '"format":"maskwright.packed"'  # stands in a packed file's manifest and in no other


class Checkpoint:
    """The tensors of a .safetensors file, a shard index or a model folder, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where: dict[str, Path] = {}  # tensor -> its file
        for file, promised in self._files():
            held = set(self._keys(file))
            absent = sorted(promised - held)
            if absent:
                raise BadInput(f"{file}: lacks {some(absent)}, which the index promises")
            self.where |= dict.fromkeys(sorted(promised or held), file)
        if not self.where:
            raise BadInput(f"{path}: holds no tensors")

    def _files(self) -> list[tuple[Path, set[str]]]:
        path = self.path
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if not path.is_dir():
            return shard_index(path) if path.suffix == ".json" else [(path, set())]
        # The order in which transformers looks.
        if (whole := path / "model.safetensors").is_file():
            return [(whole, set())]
        if (index := path / "model.safetensors.index.json").is_file():
            return shard_index(index)
        indexes = sorted(path.glob("*.safetensors.index.json"))
        others = [f for f in sorted(path.glob("*.safetensors")) if not self._is_mask(f)]
        if len(indexes) == 1:
            return shard_index(indexes[0])
        if len(others) == 1 and not indexes:
            return [(others[0], set())]
        told = "no .safetensors weights here" if not others else f"which one? {some([f.name for f in indexes or others])}"
        raise BadInput(f"{path}: {told}")

    def _is_mask(self, file: Path) -> bool:
        with _opened(file) as handle:
            meta = handle.metadata() or {}
        return "maskwright" in meta and PACKED not in meta["maskwright"]

    def _keys(self, file: Path) -> list[str]:
        with _opened(file) as handle:
            meta = handle.metadata() or {}
            if PACKED in meta.get("maskwright", ""):
                raise BadInput(f"{file}: a packed checkpoint: `maskwright unpack` gives it back dense")
            if "maskwright" in meta:
                raise BadInput(f"{file}: a mask file, not a checkpoint")
            return list(handle.keys())

    def each(self, only: Iterable[str] | None = None) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
        """Name, shape and a reader of each tensor, file by file; nothing is read until the reader is called."""
        by_file: dict[Path, list[str]] = {}
        for key in self.where if only is None else only:
            by_file.setdefault(self.where[key], []).append(key)
        for file, keys in by_file.items():
            with _opened(file) as handle:
                for key in keys:
                    yield key, tuple(handle.get_slice(key).get_shape()), partial(handle.get_tensor, key)


class _opened:
    """safe_open whose failures are one line naming the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self.handle = safe_open(self.file, framework="pt")
            return self.handle.__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"{self.file}: cannot be read as .safetensors: {plain(str(error))[:160]}") from None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from safetensors import SafetensorError

        self.handle.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise BadInput(f"{self.file}: {plain(str(error))[:160]}") from None


def shard_index(path: Path) -> list[tuple[Path, set[str]]]:
    """The files a shard index names and the tensors promised of each. Raises BadInput for what is not one."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        shards: dict[str, set[str]] = {}
        for key, file in told["weight_map"].items():
            shards.setdefault(file, set()).add(key)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not a shard index") from None
    for file in shards:
        if not isinstance(file, str) or Path(file).name != file:
            raise BadInput(f"{path}: {plain(repr(file))} is not the name of a file beside it")
        if not (path.parent / file).is_file():
            raise BadInput(f"{path}: the shard {plain(file)} is missing")
    return [(path.parent / file, keys) for file, keys in shards.items()]


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def match(names: Sequence[str], files: Checkpoint) -> dict[str, str]:
    """Site -> tensor: the exact name, else the one tensor that differs by a prefix either side may lack.

    Raises BadInput for a site without a tensor, with several, or with another site's.
    """
    longer: dict[str, list[str]] = {}
    for key in files.where:
        for tail in _suffixes(key):
            longer.setdefault(tail, []).append(key)
    out: dict[str, str] = {}
    missing = []
    for name in names:
        found = [name] if name in files.where else longer.get(name, []) + [t for t in _suffixes(name) if t in files.where]
        if len(found) > 1:
            raise BadInput(f"{files.path}: {name} could be {some(found)}")
        if found:
            out[name] = found[0]
        else:
            missing.append(name)
    if missing:
        raise BadInput(f"{files.path}: holds no tensor for {some(missing)} ({len(missing)} of {len(names)} sites)")
    taken: dict[str, str] = {}
    for name, key in out.items():
        if key in taken:
            raise BadInput(f"{files.path}: {taken[key]} and {name} would both be {key}")
        taken[key] = name
    return out


def some(names: Sequence[str]) -> str:
    """The first three names, as one line."""
    return plain(", ".join(names[:3]) + (" ..." if len(names) > 3 else ""))


def plain(text: str) -> str:
    """One line without control characters: names come from files."""
    return "".join(c if c.isprintable() else " " for c in text)
