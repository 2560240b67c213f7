"""One merge from start to end: open and check, plan, stream tensor after tensor, score, describe; resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from maskwright import __version__
from maskwright.cli.job import free_disk
from maskwright.cli.merge_recipe import DTYPES, MergeRecipe, build_methods
from maskwright.cli.merge_scores import Scoring
from maskwright.cli.merge_tokenizers import same_tokenizer
from maskwright.core.errors import BadInput
from maskwright.lab.record import machine, peak_bytes, versions
from maskwright.models.folder import apart, copy_others, dump, kept_texts, read_object
from maskwright.models.load import find
from maskwright.models.streams import FileTensors, Folder, refuse_pickled
from maskwright.report.merge_card import merge_card
from maskwright.updates import Merging
from maskwright.updates.merging import CHUNK, SMALL
from maskwright.updates.parts import TensorReport


@dataclass(frozen=True)
class MergePlan:
    """What a merge reads, writes and takes. Bytes, seconds."""

    tensors: int
    parameters: int
    read: int
    written: int
    seconds: float
    memory: int


class MergeJob:
    """The merge of one recipe. `open` checks everything; `plan` is an estimate; `run` does the work."""

    def __init__(self, recipe: MergeRecipe) -> None:
        self.recipe = recipe
        self.out = Path(recipe.out or "unnamed")
        self.threads = recipe.threads or torch.get_num_threads()
        self.seconds: dict[str, float] = {}

    def open(self) -> None:
        """Find and check the models. Raises BadInput before any long work."""
        recipe = self.recipe
        if not recipe.base:
            raise BadInput(f"{recipe.method} needs the base that the models were tuned from: --base")
        if not recipe.models:
            raise BadInput("nothing to merge: give at least one --model")
        if recipe.dtype is not None and recipe.dtype not in DTYPES:
            raise BadInput(f"dtype {recipe.dtype!r} cannot be written, only {', '.join(DTYPES)}")
        self.methods = build_methods(recipe)
        self.paths = [_resolve(name) for name in (recipe.base, *(member.model for member in recipe.models))]
        for path in self.paths:
            apart(self.out, path if path.is_dir() else path.parent)
        self.base, *self.tuned = [FileTensors(path) for path in self.paths]
        if not recipe.any_tokenizer:
            for path in self.paths[1:]:
                same_tokenizer(self.paths[0], path)
        self._some_match(recipe.base_only)
        self.left = self.base.leave_out(recipe.base_only)
        for model in self.tuned:
            model.leave_out(recipe.base_only)
        self.pool = ThreadPoolExecutor(self.threads)
        self.merging = Merging(
            self.base, self.tuned, self.methods, weights=[member.weight for member in recipe.models], seed=recipe.seed,
            stats=recipe.stats, pool=self.pool,
        )  # fmt: skip
        self.dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
        dtypes = {} if self.dtype is None else dict.fromkeys(self.merging.names, self.dtype)
        inputs = {str(path): model.mark() for path, model in zip(self.paths, (self.base, *self.tuned), strict=True)}
        identity = recipe.identity() | {"version": __version__, "inputs": inputs}
        self.folder = Folder(self.out, self.base, dtypes, identity)
        self.scoring = Scoring.of(recipe.evaluate, self.paths, recipe.windows, recipe.length) if recipe.evaluate else None

    def _some_match(self, patterns: Sequence[str]) -> None:
        names = {name for model in (self.base, *self.tuned) for name in model.shapes()}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise BadInput(f"--base-only {pattern!r} matches no tensor of the base or of a model")

    def plan(self) -> MergePlan:
        """Sizes exactly, time from a trial on one tensor that is thrown away, memory from what is in flight."""
        sizes = {name: prod(shape) for name, (_, shape) in self.merging.shapes.items()}
        total = sum(sizes.values())
        models = (self.base, *self.tuned)
        read = sum(raw.size for model in models for raw in model.raws)
        trial = max(self.merging.names, key=lambda name: (sizes[name] <= 16 * CHUNK, sizes[name]), default=None)
        seconds = 0.0
        if trial is not None and sizes[trial]:
            own = self.merging.shapes[trial][0]
            with self._quiet_threads():
                start = time.perf_counter()
                Merging(self.base, self.tuned, self._by_tensor(), weights=self.merging.weights, pool=self.pool).tensor(
                    trial, lambda start, stop: torch.empty(stop - start, dtype=self.dtype or own), self.dtype
                )
                seconds = (time.perf_counter() - start) * total / sizes[trial]
        # A thread has a piece of every model and of the result, or a whole tensor of every model if that is small.
        great = max((self.merging.pieces.nbytes(name) for name in self.merging.names), default=0)
        flight = self.threads * (CHUNK * 4 * (len(models) + 2) + min(great, SMALL))
        return MergePlan(
            len(sizes), total, read, self.folder.nbytes, seconds + self.folder.nbytes / 2e9, (400 << 20) + flight
        )

    def _by_tensor(self) -> list[Any]:
        # A threshold over all tensors reads everything: the trial takes the tensor's own.
        first = self.methods[0]
        swap: dict[str, Any] = {"group": "tensor"} if getattr(first, "group", "") == "global" else {}
        swap |= {"zero": "plus"} if getattr(first, "zero", "") == "majority" else {}
        return [replace(method, **swap) for method in self.methods]

    @contextmanager
    def _quiet_threads(self) -> Iterator[None]:
        """The pool's threads are the parallel ones: inside each, torch works alone."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def run(self, say: Callable[[str], None], progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Do it and return the report. `progress(entries done, in all)`. Raises BadInput when the disk is too small."""
        need = self.folder.nbytes + (1 << 20)
        if not self.folder.work.exists() and free_disk(self.folder.work) < need:
            raise BadInput(f"{self.out.parent}: {need >> 20} MiB are needed, {free_disk(self.out) >> 20} MiB are free")
        self.folder.begin(self.recipe.resume, self.recipe.replace)
        start = time.perf_counter()
        told: dict[str, TensorReport] = {}
        with self.folder.opened(), closing(self):  # in this order: no thread may write once the files are closed
            if self.folder.done:
                say(f"resuming after {len(self.folder.done)} tensors")
            with self._quiet_threads():
                try:
                    self.merging.prepare(say)
                    self._stream(told, progress)
                except BadInput:
                    self.folder.discard()  # the same inputs would fail again
                    raise
            self.seconds["merge"] = time.perf_counter() - start
            self._others()
            report = self._report(told)
            if self.scoring:
                names = ["base", *(member.model for member in self.recipe.models), "merged"]
                report["quality"] = self.scoring.scores(names, [*self.paths, self.folder.work], say)
            dump(self.folder.work / "report.json", report)
            (self.folder.work / "README.md").write_text(merge_card(report), encoding="utf-8")
            self.folder.finish()
        return report

    def _stream(self, told: dict[str, TensorReport], progress: Callable[[int, int], None]) -> None:
        sizes = {name: self.base.length(name) for name in (*self.merging.shapes, *self.left)}
        total, at = sum(sizes.values()), sum(size for name, size in sizes.items() if name in self.folder.done)
        to_do = [name for name in sizes if name not in self.folder.done]

        def copied() -> Iterator[tuple[str, None]]:
            for name in to_do:
                if name in self.left:
                    for start in range(0, sizes[name], CHUNK):
                        self.folder.write(name, start, self.base.read(name, start, min(start + CHUNK, sizes[name])))
                    yield name, None

        merged = self.merging.run([name for name in to_do if name not in self.left], self.folder.place, self.dtype)
        for name, report in chain(copied(), merged):
            if report is not None:
                told[name] = report
            self.folder.whole(name)
            at += sizes[name]
            progress(at, total)

    def _others(self) -> None:
        source = self.paths[0]
        if not source.is_dir():
            return
        copy_others(source, self.folder.work)
        if self.dtype is not None and (text := kept_texts(source).get("config.json")) is not None:
            config = read_object(source / "config.json", text)
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            dump(self.folder.work / "config.json", config | {key: self.recipe.dtype})

    def _report(self, told: dict[str, TensorReport]) -> dict[str, Any]:
        recipe = self.recipe
        models = []
        for i, (member, method) in enumerate(zip(recipe.models, self.methods, strict=True)):
            kept = sum(report.kept[i] for report in told.values())
            total = sum(report.total for report in told.values())
            counted = {"kept": kept, "total": total} if recipe.stats else {}
            models.append({"model": member.model, "weight": member.weight, "settings": asdict(method), **counted})  # type: ignore[call-overload]
        out: dict[str, Any] = {
            "format": "maskwright.merge", "version": 1, "method": recipe.method, "base": recipe.base, "models": models,
            "seed": recipe.seed, "dtype": recipe.dtype, "base_only": self.left, "command": recipe.command,
            "parameters": sum(prod(shape) for _, shape in self.merging.shapes.values()), "bytes": self.folder.nbytes,
            "seconds": self.seconds, "peak_bytes": peak_bytes(), "machine": machine(), "versions": versions(), "quality": [],
        }  # fmt: skip
        if recipe.stats:  # of the tensors merged in this run: a resumed one has not seen the others
            total = sum(report.total for report in told.values())
            out["overlap"] = sum(report.overlap for report in told.values()) / max(1, total)
            out["conflict"] = sum(report.conflict for report in told.values()) / max(1, total)
            out["tensors"] = {name: asdict(report) for name, report in told.items()}
        return out

    def close(self) -> None:
        """Let go of files and threads."""
        self.pool.shutdown(cancel_futures=True)
        for model in (self.base, *self.tuned):
            model.close()


def _resolve(model: str) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        refuse_pickled(path)
        if (path / "adapter_config.json").is_file():
            raise BadInput(f"{path}: a PEFT adapter, not a model: merge it into its base first")
        if path.is_file() or not (path / "config.json").is_file():
            return path
    return find(model).folder
