"""Native libraries: compiled once for this torch into the cache, or the reason why they cannot run, in one line."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from maskwright.core.cache import building, cache_dir

COMMON = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")


class Unavailable(Exception):
    """Why native operators cannot run here, in one line."""


@dataclass(frozen=True)
class Native:
    """A library of operators: `sources`/<set>.cpp for every set, each compiled with that set's own flags.

    The sets' order is the order they are linked in: first the code for every CPU, since where two files hold the same
    library function the linker takes the first copy.
    """

    name: str
    sources: Path
    sets: Mapping[str, Sequence[str]]

    def version(self) -> str:
        """What the built operators depend on, as 16 hexadecimal digits: sources, flags and torch."""
        digest = hashlib.sha256(repr((torch.__version__, COMMON, self.sets)).encode())
        for path in sorted(self.sources.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    def load(self) -> str | None:
        """Build (once) and load the operators; None when they run, else why not. `MASKWRIGHT_NATIVE=0` turns them off."""
        if os.environ.get("MASKWRIGHT_NATIVE") == "0":
            return "turned off by MASKWRIGHT_NATIVE=0"
        try:
            if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
                raise Unavailable(f"no native kernels for {platform.system()} {platform.machine()}")
            if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
                raise Unavailable("this CPU has neither AVX2 nor AVX-512")
            torch.ops.load_library(self._built())
        except Unavailable as reason:
            return str(reason)
        except OSError as error:
            return f"the native kernels do not load: {' '.join(str(error).split())[:160]}"
        return None

    def _built(self) -> Path:
        folder = cache_dir() / "kernels" / f"{self.name}-{self.version()}"
        library = folder / f"{self.name}.so"
        if library.is_file():
            return library
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
        if compiler is None:
            raise Unavailable("no C++ compiler found (g++) to build the native kernels with")
        root = Path(torch.__file__).parent
        with building(folder) as scratch:
            make = [compiler, *COMMON]
            include = f"-I{root / 'include'}"
            _run(
                [
                    [*make, *flags, include, "-c", str(self.sources / f"{part}.cpp"), "-o", f"{part}.o"]
                    for part, flags in self.sets.items()
                ],
                scratch,
            )
            # torch's own OpenMP: with a second one, at::parallel_for would run serially or two pools would fight.
            own = sorted((root / "lib").glob("libgomp*.so*"))
            objects = [f"{part}.o" for part in self.sets]
            link = [compiler, "-shared", *objects, *(map(str, own) if own else ["-fopenmp"]), f"-L{root / 'lib'}"]
            link += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}", "-o", library.name]
            _run([link], scratch)
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
