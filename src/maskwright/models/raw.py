"""A .safetensors file by its header: each tensor's place, read or copied alone, never mapped and never the whole file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.models.checkpoint import plain

HEADER_LIMIT = 100 << 20  # the safetensors format's own
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 22


class Entry(NamedTuple):
    """One tensor of a file: dtype code, shape, and its bytes' begin and end in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Whatever a hostile file provokes inside becomes one BadInput line that begins with `path`."""
    try:
        yield
    except BadInput as error:
        text = str(error)
        text = text if text.startswith(str(path)) else f"{path}: {plain(text)}"
        raise BadInput(text[: len(str(path)) + 300]) from None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:  # from json, torch, numpy or the file system
        raise BadInput(f"{path}: cannot be read ({type(error).__name__}: {plain(str(error))[:160]})") from None


class Raw:
    """A .safetensors file. Raises BadInput when header and size do not agree, to the byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with one_line(path):
            self.size = path.stat().st_size
            with path.open("rb") as handle:
                first = handle.read(8)
                length = int.from_bytes(first, "little")
                if len(first) < 8 or length > min(self.size - 8, HEADER_LIMIT):
                    raise BadInput(f"not a .safetensors file: its header claims {length} bytes in a file of {self.size}")
                self.header = handle.read(length).decode()
            self.start = 8 + length
            self.meta, self.entries = parse(self.header)
            promised = max((entry.end for entry in self.entries.values()), default=0)
            if self.start + promised != self.size:
                raise BadInput(f"its header promises {promised} bytes of data, the file holds {self.size - self.start}")

    def chunks(self, entry: Entry | None = None) -> Iterator[bytes]:
        """The bytes of a tensor (None: all data), a few MiB at a time."""
        begin, left = (entry.begin, entry.nbytes) if entry else (0, self.size - self.start)
        with self.path.open("rb") as handle:
            handle.seek(self.start + begin)
            while left:
                piece = handle.read(min(left, _PIECE))
                if not piece:
                    raise BadInput(f"{self.path}: ended while it was read")
                left -= len(piece)
                yield piece

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises BadInput for a dtype torch lacks."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise BadInput(f"{self.path}: {plain(name)}: dtype {plain(entry.dtype)} cannot be read")
        out = torch.empty(entry.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as handle:
            handle.seek(self.start + entry.begin)
            if handle.readinto(out.numpy().data) != entry.nbytes:
                raise BadInput(f"{self.path}: ended while it was read")
        return out.view(DTYPES[entry.dtype]).reshape(entry.shape)


def parse(header: str) -> tuple[Mapping[str, Any], dict[str, Entry]]:
    """Metadata and the tensors in file order. Raises BadInput for a header that is not exactly one."""
    told = json.loads(header)
    if not isinstance(told, dict) or not isinstance(told.get("__metadata__") or {}, dict):
        raise BadInput("not a .safetensors header")
    meta = told.pop("__metadata__", None) or {}
    found: dict[str, Entry] = {}
    for name, each in told.items():
        dtype, shape, (begin, end) = each["dtype"], each["shape"], each["data_offsets"]
        if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise BadInput(f"the header's entry of {name} is malformed")
        if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise BadInput(f"{name}: {dtype} of shape {tuple(shape)} does not fill {end - begin} bytes")
        found[name] = Entry(dtype, tuple(shape), begin, end)
    entries = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    at = 0
    for name, entry in entries.items():
        if entry.begin != at or entry.end < at:
            raise BadInput(f"{name}: its bytes begin at {entry.begin}, not at {at}")
        at = entry.end
    return meta, entries


def place(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    """(dtype code, shape, bytes) by name -> entries one after the other, in this order."""
    out: dict[str, Entry] = {}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        out[name] = Entry(dtype, shape, at, at + nbytes)
        at += nbytes
    return out


def render(entries: Mapping[str, Entry], meta: Mapping[str, str]) -> bytes:
    """A file's first bytes: length and header, padded so that the data begins at a multiple of 8."""
    told: dict[str, Any] = {"__metadata__": dict(meta)} if meta else {}
    told |= {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        for name, entry in entries.items()
    }
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
