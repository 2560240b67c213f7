"""Checkpoints out of core: tensors read in flat pieces, and a new folder written piece by piece that a kill cannot spoil."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.models.checkpoint import Checkpoint, plain, some
from maskwright.models.folder import INDEX_END, dump, read_object, set_aside, vacant
from maskwright.models.raw import CODES, DTYPES, Entry, Raw, place, raw_bytes, render

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHORT = "ended while it was read"


class FileTensors:
    """The tensors of a .safetensors file, a shard index or a model folder, read in pieces; nothing is mapped or kept.

    Raises BadInput for a pickled checkpoint, a missing shard, a tensor that is in two files.
    """

    def __init__(self, path: Path) -> None:
        refuse_pickled(path)
        self.path, self.what = path, str(path)
        files = Checkpoint(path)
        self.raws = [Raw(file) for file in sorted(set(files.where.values()))]
        self._where: dict[str, Raw] = {}
        for raw in self.raws:
            for name in raw.entries:
                if name in self._where:
                    raise BadInput(f"{path}: {plain(name)} is in {self._where[name].path.name} and {raw.path.name}")
                self._where[name] = raw
        self._shapes = {name: (self._dtype(name), raw.entries[name].shape) for name, raw in self._where.items()}
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _dtype(self, name: str) -> torch.dtype:
        code = self._where[name].entries[name].dtype
        if code not in DTYPES:
            raise BadInput(f"{self.path}: {plain(name)}: dtype {plain(code)} cannot be read")
        return DTYPES[code]

    def shapes(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self._shapes

    def place(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Where entries start..stop are, row-major: an open file, and the byte that they begin at."""
        raw = self._where[name]
        return self._handle(raw.path), raw.start + raw.entries[name].begin + start * self._dtype(name).itemsize

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) entries, row-major, in memory of their own. Safe from several threads."""
        out = torch.empty(stop - start, dtype=self._dtype(name))
        (handle, at), left = self.place(name, start, stop), memoryview(raw_bytes(out))
        while left:
            got = os.preadv(handle, [left], at)
            if not got:
                raise BadInput(f"{self._where[name].path}: {_SHORT}")
            at, left = at + got, left[got:]
        return out

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def leave_out(self, patterns: Sequence[str]) -> list[str]:
        """Forget the tensors that match one of the patterns, and give their names: they can still be read."""
        left = [name for name in self._shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
        self._shapes = {name: told for name, told in self._shapes.items() if name not in left}
        return left

    def shape(self, name: str) -> tuple[int, ...]:
        """Of any tensor, left out or not."""
        return self._where[name].entries[name].shape

    def length(self, name: str) -> int:
        """Entries of one tensor."""
        return prod(self._where[name].entries[name].shape)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def mark(self) -> list[list[Any]]:
        """What tells whether these are still the same files: name, size, time of change."""
        return [[raw.path.name, raw.size, raw.path.stat().st_mtime_ns] for raw in self.raws]


def refuse_pickled(path: Path) -> None:
    """Raise BadInput where only a pickled checkpoint lies: reading one runs whatever code it holds."""
    found = [path] if path.suffix in _PICKLED else []
    if path.is_dir() and not any(path.glob("*.safetensors")):
        found = sorted(each for each in path.iterdir() if each.suffix in _PICKLED)
    if found:
        raise BadInput(
            f"{found[0]}: a pickled checkpoint, which can run code when it is read; convert it where you trust it: "
            "transformers' save_pretrained, or safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
        )


class Folder:
    """A model folder in the making: `OUT.partial/` until `finish`, with a journal of the tensors that are whole.

    The files' names and the order of tensors are the source's. After a kill the same plan opened with `resume` goes on
    after the last whole tensor. Raises BadInput when `out` exists, or the unfinished folder had another plan.
    """

    def __init__(
        self, out: Path, source: FileTensors, dtypes: Mapping[str, torch.dtype], identity: Mapping[str, Any]
    ) -> None:
        self.out, self.work = out, out.with_name(out.name + ".partial")
        self._journal = self.work / "done.jsonl"
        self._plan = self.work / "plan.json"
        self.identity = json.loads(json.dumps(identity))
        self.files: dict[str, tuple[bytes, Mapping[str, Entry]]] = {}
        for raw in source.raws:
            told = {}
            for name, entry in raw.entries.items():
                dtype = dtypes.get(name, DTYPES[entry.dtype])
                size = entry.nbytes // DTYPES[entry.dtype].itemsize * dtype.itemsize
                told[name] = (CODES[dtype], entry.shape, size)
            entries = place(told)
            name = raw.path.name if source.path.is_dir() or len(source.raws) > 1 else "model.safetensors"
            self.files[name] = (render(entries, {"format": "pt"}), entries)
        self._where = {name: file for file, (_, entries) in self.files.items() for name in entries}
        self._open: dict[str, int] = {}
        self.done: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(len(head) + sum(entry.nbytes for entry in entries.values()) for head, entries in self.files.values())

    def begin(self, resume: bool, replace: bool) -> None:
        """Make the work folder, or go on in it. Raises BadInput also for an unfinished one whose plan cannot be read."""
        vacant(self.out, self.work, resume=resume, replace=replace)
        if self.work.exists() and resume and self._plan.is_file():
            theirs = self._theirs()
            for key, value in self.identity.items():
                if theirs.get(key) != value:
                    raise BadInput(f"{self.work}: the unfinished run has another {key} ({theirs.get(key)}, now {value})")
            self.done = {name for name in _lines(self._journal) if name in self._where}
            _swap(self._journal, "".join(map(_line, sorted(self.done))))  # or the next line would join a torn one
        else:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        for file, (head, entries) in self.files.items():
            handle = os.open(self.work / file, os.O_RDWR | os.O_CREAT, 0o644)
            self._open[file] = handle
            os.pwrite(handle, head, 0)
            os.truncate(handle, len(head) + sum(entry.nbytes for entry in entries.values()))
        if not self._plan.is_file():
            _swap(self._plan, json.dumps(self.identity))  # last: what has a plan has its files

    def _theirs(self) -> dict[str, Any]:
        try:
            return read_object(self._plan, self._plan.read_text(encoding="utf-8", errors="replace"))
        except BadInput as error:
            raise BadInput(f"{error}, so the run cannot go on; --replace starts anew") from None

    def place(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Where entries start..stop of one tensor go: the open file, and the byte that they begin at."""
        file = self._where[name]
        head, entries = self.files[file]
        dtype = DTYPES[entries[name].dtype]
        return self._open[file], len(head) + entries[name].begin + start * dtype.itemsize

    def write(self, name: str, start: int, piece: Tensor) -> None:
        """Entries `start` and on of one tensor. Safe from several threads."""
        handle, at = self.place(name, start, start + len(piece))
        left = memoryview(raw_bytes(piece))
        while left:
            put = os.pwrite(handle, left, at)
            at, left = at + put, left[put:]

    def whole(self, name: str) -> None:
        """Note that a tensor is written."""
        with self._journal.open("a", encoding="utf-8") as handle:
            handle.write(_line(name))
        self.done.add(name)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Close the files at the end, whatever happens."""
        try:
            yield
        finally:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def discard(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        """Have everything on the disk and give the folder its name. Raises BadInput when a tensor is missing."""
        missing = [name for name in self._where if name not in self.done]
        if missing:
            raise BadInput(f"{self.work}: {some(missing)} was not written")
        if len(self.files) > 1:
            size = sum(entry.nbytes for _, entries in self.files.values() for entry in entries.values())
            told = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._where.items()))}
            dump(self.work / f"model{INDEX_END}", told)
        for handle in self._open.values():
            os.fsync(handle)
        self._journal.unlink(missing_ok=True)
        self._plan.unlink(missing_ok=True)
        with set_aside(self.out) as aside:
            aside()
            self.work.rename(self.out)


def _line(name: str) -> str:
    return json.dumps(name) + "\n"


def _lines(path: Path) -> Iterator[str]:
    """The journal's names. A line that a kill cut off does not count: its tensor is written again."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            name = json.loads(line)
            if isinstance(name, str):
                yield name


def _swap(path: Path, text: str) -> None:
    """Write a file whole or not at all. What a kill leaves beside it is of one name, which the next run takes again."""
    partial = path.with_suffix(".new")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
