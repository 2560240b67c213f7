"""What is written about a check: the code it ran, the machine, the result file. Imports no torch at the top,
so that `maskwright list` can ask whether a result is stale.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from maskwright.core.cache import write_atomic
from maskwright.core.method import Card

_PACKAGE = Path(__file__).resolve().parents[1]
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(?:[^\\]|\\.)*?"""[ \t]*$', re.MULTILINE | re.DOTALL)


# The lab's modules that only one place's claims use.
_LAB = {
    "inputs": ("decoder", "points"),
    "attention": ("ask", "associative", "decoder", "diffusion", "haystack", "lessons", "recall", "video"),
    "updates": ("encoder", "guides", "minilm", "recogniser", "retrieval", "tasks", "wordnet"),
}


def code_hash(card: Card) -> str:
    """Hash of the room's and the core's Python code (tests apart): 16 hexadecimal digits.

    Comments on lines of their own, docstrings and blank lines do not count: they cannot change a figure.
    """
    return hashlib.sha256(f"{_core()}{_digest(_python(card.path))}".encode()).hexdigest()[:16]


@cache
def _core() -> str:
    return _digest(_python(_PACKAGE / "core"))


def piece_hash(card: Card) -> str:
    """Hash for resuming a check: what code_hash covers, the place's and the lab's tools, and the versions at hand."""
    tools = [*_python(_PACKAGE / card.place)]
    lab = ("images", "made", "models", "text", "train", "whisper", *_LAB.get(card.place, ()))
    tools += [_PACKAGE / "lab" / f"{name}.py" for name in lab]
    told = json.dumps([code_hash(card), _digest(tools), versions()])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _python(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("test_"))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        source = _DOCSTRING.sub("", path.read_text(encoding="utf-8"))
        lines = [line.rstrip() for line in source.splitlines()]
        kept = [line for line in lines if line and not line.lstrip().startswith("#")]
        digest.update("\n".join([path.name, *kept, ""]).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that figures may depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("maskwright", "torch", "numpy", "scipy", "scikit-learn", "scikit-image", "transformers", "mlxtend"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def threads(jobs: int = 1) -> int:
    """Threads torch uses in each of so many processes side by side."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def machine(jobs: int = 1) -> dict[str, Any]:
    """CPU model, cores, threads torch uses in each of `jobs` processes, instruction set, memory in GiB and system."""
    import torch

    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", told, re.MULTILINE)).get("model name", platform.processor())
        memory: float | None = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError, AttributeError):
        model, memory = platform.processor(), None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads(jobs),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory this process holds now; its peak so far where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def results_dir() -> Path:
    """`results/` of the checkout this package lies in, or of the working folder when it was installed elsewhere."""
    root = _PACKAGE.parent.parent
    in_checkout = (root / "pyproject.toml").is_file() and (root / "src" / "maskwright") == _PACKAGE
    return (root if in_checkout else Path.cwd()) / "results"


def result_path(card: Card) -> Path:
    """`results/<place>/<slug>.json` of one room."""
    return results_dir() / card.place / f"{card.slug}.json"


def write_result(card: Card, result: dict[str, Any]) -> Path:
    """Write a room's result file in one step and give its path."""
    path = result_path(card)
    write_atomic(path, (to_json(result) + "\n").encode())
    return path


def to_json(value: Any) -> str:
    """Indented JSON any reader takes: a number that is not finite becomes null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
