"""The native operators: compiled once for this torch into the cache, or the reason why the portable twin runs."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from maskwright.core.cache import building, cache_dir

_SOURCES = Path(__file__).with_name("native")
_COMMON = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")
_SETS = {  # first the code for every CPU: where two files hold the same library function, the linker takes its copy
    "ops": (),
    "avx2": ("-mavx2", "-mfma", "-mbmi2", "-mpopcnt", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2", "-mavx512bf16",
        "-mfma", "-mbmi2", "-mpopcnt", "-mf16c",
    ),
}  # fmt: skip


class Unavailable(Exception):
    """Why the native operators cannot run here, in one line."""


@cache
def load() -> str | None:
    """Build (once, some 20 s) and load the native operators; None when they run, else the reason they do not.

    `MASKWRIGHT_NATIVE=0` turns them off.
    """
    if os.environ.get("MASKWRIGHT_NATIVE") == "0":
        return "turned off by MASKWRIGHT_NATIVE=0"
    try:
        if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
            raise Unavailable(f"no native kernels for {platform.system()} {platform.machine()}")
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            raise Unavailable("this CPU has neither AVX2 nor AVX-512")
        torch.ops.load_library(_built())
    except Unavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the native kernels do not load: {' '.join(str(error).split())[:160]}"
    return None


@cache
def version() -> str:
    """What the built operators depend on, as 16 hexadecimal digits: sources, flags and torch."""
    digest = hashlib.sha256(repr((torch.__version__, _COMMON, _SETS)).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _built() -> Path:
    folder = cache_dir() / "kernels" / f"packed_linear-{version()}"
    library = folder / "packed_linear.so"
    if library.is_file():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler found (g++) to build the native kernels with")
    root = Path(torch.__file__).parent
    with building(folder) as scratch:
        steps = [
            [compiler, *_COMMON, *flags, f"-I{root / 'include'}", "-c", str(_SOURCES / f"{name}.cpp"), "-o", f"{name}.o"]
            for name, flags in _SETS.items()
        ]
        _run(steps, scratch)
        # torch's own OpenMP: with a second one, at::parallel_for would run serially or two pools would fight.
        own = sorted((root / "lib").glob("libgomp*.so*"))
        objects = [f"{name}.o" for name in _SETS]
        link = [compiler, "-shared", *objects, *(map(str, own) if own else ["-fopenmp"]), f"-L{root / 'lib'}", "-ltorch_cpu"]
        _run([[*link, "-lc10", f"-Wl,-rpath,{root / 'lib'}", "-o", library.name]], scratch)
        for name in objects:
            (scratch / name).unlink()
    return library


def _run(steps: list[list[str]], folder: Path) -> None:
    """The commands side by side. Raises Unavailable with the first error."""
    running = [
        subprocess.Popen(step, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for step in steps
    ]
    for told in [process.communicate()[1] for process in running]:
        errors = [line for line in told.splitlines() if "error" in line.lower()]
        if errors:
            raise Unavailable(f"the native kernels do not build: {errors[0][:160]}")
    if any(process.returncode for process in running):
        raise Unavailable("the native kernels do not build")
