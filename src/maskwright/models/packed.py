"""Packed checkpoints read back weight by weight: ours (see packed_format.py) and compressed-tensors' legacy ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear.layout import Packed, check, row_counts
from maskwright.models.checkpoint import Checkpoint, plain, shard_index, some
from maskwright.models.packed_format import INDEX, VALUES, WHOLE, Weight, read_part
from maskwright.models.raw import Entry, Raw, one_line

_LEGACY = ("shape", "compressed", "bitmask", "row_offsets")


class PackedCheckpoint:
    """A packed folder or file of ours, or a legacy `sparse-bitmask` or `sparse-24-bitmask` one of compressed-tensors.

    weights: the packed ones by name. parts: our files in order; none for a legacy checkpoint. Raises BadInput, one
    line naming the file, for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights: dict[str, Weight] = {}
        self._tensors: dict[str, dict[str, str]] = {}  # weight -> its part -> the stored tensor
        with one_line(path):
            raws, whole = _files(path)
            self.parts = [read_part(raw) for raw in raws if "maskwright" in raw.meta]
            self._where = {key: raw for raw in raws for key in raw.entries}
            if len(self.parts) < len(raws) and (
                self.parts or any(raw.path.name == WHOLE or "digest" in raw.meta for raw in raws)
            ):
                raise BadInput("a packed file without its manifest")
            if sum(len(raw.entries) for raw in raws) != len(self._where):
                raise BadInput("a tensor is in two of its files")
            for weight in (weight for part in self.parts for weight in part.weights):
                self.weights[weight.name] = weight
                self._tensors[weight.name] = {key.rpartition(".")[2]: key for key in weight.parts()}
            if not self.parts:
                self._legacy()
            elif whole:
                self.complete()
        taken = {key for keys in self._tensors.values() for key in keys.values()}
        self._dense = [key for key in self._where if key not in taken]

    def _legacy(self) -> None:
        for key in self._where:
            prefix, _, last = key.rpartition(".")
            if last != "compressed":
                continue
            # The first versions put the tensor's name in front, the later ones the module's.
            name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
            held = {part: full for part in _LEGACY if (full := f"{prefix}.{part}") in self._where}
            absent = [part for part in _LEGACY[:3] if part not in held]
            if absent or name in self._where or name in self.weights:
                raise BadInput(f"{name}: " + (f"its {absent[0]} is missing" if absent else "is there twice"))
            code = self.entry(key)[1].dtype
            values = next((values for values in ("float32", "bfloat16", "float16") if VALUES[values] == code), None)
            if values is None:
                raise BadInput(f"{name}: {code} values (8-bit floats, quantized) are not read, only 16 and 32-bit floats")
            told = self.entry(held["shape"])[1]
            shape = self.read(held["shape"]).flatten().tolist() if told.dtype == "I64" and told.nbytes <= 64 else []
            if not shape or min(shape) < 0:
                raise BadInput(f"{name}: its shape tensor holds no shape")
            kept = prod(self.entry(key)[1].shape)
            self.weights[name] = Weight(name, tuple(shape), values, values, kept)
            self._tensors[name] = held
        if not self.weights:
            raise BadInput(f"not a packed checkpoint: no tensor is named *.compressed{_said(self.path)}")

    def complete(self) -> None:
        """Raise BadInput unless all parts of the model are here, each once and made from a file of its own."""
        told = sorted(part.manifest["part"] for part in self.parts)
        if told != [[i + 1, len(told)] for i in range(len(told))]:
            raise BadInput(f"{self.path}: has part {told[0][0]} of {told[0][1]}, not every part of one model")
        if len({part.manifest["source"]["file"].lower() for part in self.parts}) < len(told):
            raise BadInput(f"{self.path}: two parts come from one file")

    def packed(self, name: str) -> Packed:
        """One weight, read and checked. Raises BadInput for what does not hold."""
        weight = self.weights.get(name)
        if weight is None:
            raise BadInput(f"{self.path}: holds no packed weight {plain(name)}")
        keys = self._tensors[name]
        with one_line(self._where[keys["compressed"]].path):
            try:
                held = {part: self.read(key) for part, key in keys.items()}
                if held["shape"].flatten().tolist() != list(weight.shape):
                    raise BadInput(f"its shape tensor says {held['shape'].flatten().tolist()}, not {list(weight.shape)}")
                bitmask, offsets = held["bitmask"], held.get("row_offsets")
                if offsets is None:  # the 2:4 form: every row keeps half, so they are not stored
                    counts = row_counts(bitmask)
                    offsets = counts.cumsum(0) - counts
                values = held["compressed"].flatten()
                return check(Packed(weight.shape, values, bitmask, offsets.flatten(), held.get("scale")))
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from None

    def dense(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Name and reader of every tensor that is not packed; nothing is read until the reader is called."""
        for name in self._dense:
            yield name, partial(self.read, name)

    def read(self, key: str) -> Tensor:
        """One stored tensor."""
        raw = self._where[key]
        with one_line(raw.path):
            return raw.read(key)

    def entry(self, key: str) -> tuple[Raw, Entry]:
        """The file of a stored tensor, and its place there."""
        return self._where[key], self._where[key].entries[key]

    def verify(self) -> None:
        """Raise BadInput when a file of ours does not match its digest. A legacy checkpoint has none."""
        for part in self.parts:
            part.verify()


def _files(path: Path) -> tuple[list[Raw], bool]:
    """The files, and whether they are to be all of a model (a folder or an index) or just one."""
    index = path / INDEX if path.is_dir() else path
    if path.is_dir() and (path / WHOLE).is_file():
        return [Raw(path / WHOLE)], True
    if index.suffix == ".json" and index.is_file():
        pairs = shard_index(index)
    elif path.is_dir():
        pairs = Checkpoint(path)._files()
    else:
        pairs = [(path, set[str]())]
    raws = [Raw(file) for file, _ in pairs]
    for raw, (_, promised) in zip(raws, pairs, strict=True):
        absent = sorted(promised - set(raw.entries))
        if absent:
            raise BadInput(f"{raw.path}: lacks {some(absent)}, which the index promises")
    return raws, index.suffix == ".json" or path.is_dir()


def _said(path: Path) -> str:
    """What the config beside says of its format, to explain a refusal."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        held = [config, *(config.get(key) for key in ("compression_config", "quantization_config"))]
        formats = [each.get("sparsity_config", each).get("format") for each in held if isinstance(each, Mapping)]
        told = next(text for text in formats if isinstance(text, str))
    except (OSError, ValueError, AttributeError, RecursionError, StopIteration):
        return ""
    return f" (its config names the format {plain(told)[:60]})"
