"""Model folders made from model folders: what is copied beside the weights, and how the new one appears."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from maskwright.core.cache import building
from maskwright.core.errors import BadInput
from maskwright.models.raw import Raw, one_line

CONFIG, INDEX_END = "config.json", ".safetensors.index.json"
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".partial")
_OLD = ("readme.md", "report.html", "report.json")  # they speak of the folder they were made for


@contextlib.contextmanager
def fresh(out: Path, source: Path, replace: bool) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name at the end, or is gone after an error.

    Raises BadInput when `out` is a file, holds or lies in `source`, or exists and `replace` is not set.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; a folder is written")
    apart(out, source)
    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    with set_aside(out) as aside, building(out) as work:
        yield work
        aside()


def apart(out: Path, source: Path) -> None:
    """Raise BadInput when the folder to write is, holds or lies in the one that is read."""
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise BadInput(f"{out}: lies in {source} or holds it; choose another folder to write")


def vacant(out: Path, work: Path, *, resume: bool, replace: bool) -> None:
    """Raise BadInput when `out`, or the folder of work of an unfinished run, is there and may not be taken."""
    if out.exists() and not replace:
        raise BadInput(f"{out} exists; --replace overwrites it")
    if work.exists() and not (resume or replace):
        raise BadInput(f"{work} holds an unfinished run; --resume goes on with it, --replace starts anew")


def publish(made: Path, out: Path, work: Path) -> None:
    """`made`, a finished folder inside `work`, becomes `out`; what was `out` before and the rest of `work` are gone."""
    with set_aside(out) as aside:
        aside()
        made.rename(out)
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def set_aside(out: Path) -> Iterator[Callable[[], None]]:
    """Gives what moves an `out` that is there out of the way of the new one's rename; at the end the old one is gone."""
    old = out.with_name(out.name + ".old")

    def aside() -> None:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)

    yield aside
    shutil.rmtree(old, ignore_errors=True)


def copy_others(source: Path, work: Path, made: Collection[str] = ()) -> None:
    """Copy what lies beside the weights (config, tokenizer, masks), except files of the names in `made`."""
    for path in sorted(source.iterdir()):
        name = path.name.lower()
        left = name.startswith(".") or name in _OLD or name.endswith(_WEIGHTS) or path.name in made
        if path.is_file() and (not left or _is_mask(path)):
            shutil.copyfile(path, work / path.name)


def _is_mask(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        told = Raw(path).meta.get("maskwright")
        return json.loads(told or "{}").get("format") == "maskwright.masks"
    except (BadInput, ValueError, TypeError, AttributeError, RecursionError):
        return False  # not one to hand on


def kept_texts(source: Path) -> dict[str, str]:
    """The files of a dense folder that a packed one cannot keep as they are, by name: config and shard indexes."""
    if not source.is_dir():
        paths = [source] if source.name.endswith(INDEX_END) else []
    else:
        paths = [path for path in [source / CONFIG, *sorted(source.glob(f"*{INDEX_END}"))] if path.is_file()]
    out = {}
    for path in paths:
        with one_line(path):
            out[path.name] = path.read_bytes().decode()  # not read_text: line ends stay what they are
    return out


def read_object(path: Path, text: str) -> dict[str, Any]:
    """A JSON object, or BadInput naming the file."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise BadInput(f"{path}: not a JSON object")
    return told


def dump(path: Path, told: Any) -> None:
    """Write JSON as Hugging Face does."""
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(handle: BinaryIO) -> None:
    """Have what was written reach the disk."""
    handle.flush()
    os.fsync(handle.fileno())
