"""Where maskwright keeps what it can make or fetch again: one folder outside every checkout. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$MASKWRIGHT_CACHE`, or `~/.cache/maskwright`. Made if it is not there."""
    chosen = os.environ.get("MASKWRIGHT_CACHE")
    path = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "maskwright"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; on success it becomes `target` in one rename.

    A reader therefore never sees half a folder, whatever kills the writer. When another process was faster its
    folder is kept (same source, same content). An error inside leaves nothing behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private; the finished folder is like any other
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one, or the new one whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
