"""One run of `maskwright protect`: images, surrogate, rounds of noise, PNG files, report and card; resumable.

Everything is made in `OUT.partial/`: run.json (what was asked), state.safetensors (after each round), and the finished
folder, renamed to OUT at the end. The input is only read.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright import __version__
from maskwright.cli.job import free_disk
from maskwright.cli.protect_card import protect_card
from maskwright.cli.recipe import built, found
from maskwright.cli.surrogate import surrogate
from maskwright.core.errors import BadInput
from maskwright.inputs.images import open_images, told
from maskwright.lab.record import machine, peak_bytes, versions
from maskwright.models.folder import apart, dump, publish, vacant

STATE, RUN = "state.safetensors", "run.json"


@dataclass(frozen=True)
class ProtectRecipe:
    """What `protect` was asked for."""

    method: str
    folder: str
    out: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    surrogate: str | None = None
    size: int | None = None
    grey: bool | None = None
    skip_unreadable: bool = False
    command: str | None = None

    def identity(self) -> dict[str, Any]:
        """What a stopped run must have in common with the one that goes on."""
        same = {key: value for key, value in asdict(self).items() if key not in ("out", "command", "folder")}
        return json.loads(json.dumps(same | {"version": __version__}))  # type: ignore[no-any-return]


class ProtectJob:
    """The run of one recipe. `open` checks everything, `plan` is an estimate, `begin` makes the folder, `work` works."""

    def __init__(self, asked: ProtectRecipe, say: Callable[[str], None]) -> None:
        self.asked, self.say = asked, say
        self.out = Path(asked.out or "unnamed")
        self.partial = self.out.with_name(self.out.name + ".partial")

    def open(self) -> None:
        """Read the folder and set the run up. Raises BadInput before any long work."""
        asked = self.asked
        self.card, self.method = _method(asked)
        if self.method.eps < 1 / 255 - 1e-12:
            raise BadInput(f"eps {self.method.eps:g} is less than 1/255: no 8-bit value could change")
        self.images = open_images(
            asked.folder, labelled=True, size=asked.size, grey=asked.grey, skip_unreadable=asked.skip_unreadable
        )
        if len(self.images.classes) < 2:
            raise BadInput(f"{told(self.images.root)}: one class; noise is made against telling at least two apart")
        if asked.out is not None:
            apart(self.out, self.images.root)
        self.names = _targets(self.images.names)
        _windows(self.method, self.images.shape)
        labels = self.images.labels
        shape, classes = self.images.shape, len(self.images.classes)
        self.run = self.method.start(
            self.images.load(), labels, lambda: surrogate(asked.surrogate, shape, classes), seed=asked.seed, optimizer=_adam
        )
        self.parameters = sum(each.numel() for each in self.run.model.parameters())

    def plan(self) -> dict[str, Any]:
        """Sizes exactly, the greatest time from one batch of noise."""
        some = torch.arange(min(len(self.images), self.method.batch))
        self._gradient(some)  # the first one also sets things up
        start = time.perf_counter()
        self._gradient(some)
        an_image = (time.perf_counter() - start) / len(some)
        each = (self.method.noise_steps + 2) * len(self.images) + 2 * self.method.model_steps * len(some)
        values = len(self.images) * math.prod(self.images.shape)
        return {
            "images": len(self.images), "shape": list(self.images.shape), "classes": len(self.images.classes),
            "skipped": [name for name, _ in self.images.skipped], "pixels": int(self.pixels()),
            "levels": self.levels(), "rounds": self.method.rounds, "parameters": self.parameters,
            "seconds": an_image * each * self.method.rounds, "memory": peak_bytes() + 4 * values,
            "disk": 7 * values,
        }  # fmt: skip

    def pixels(self) -> int:
        """Pixels of an image that may change."""
        return int(self.method.keep(torch.zeros(1, *self.images.shape[1:])).count)

    def levels(self) -> int:
        """Steps of 1/255 that a value may move."""
        return int(self.run.result().levels)

    def _gradient(self, some: Tensor) -> None:
        x = self.images.read(some).float().div_(255).requires_grad_()
        torch.autograd.grad(self.run.model.eval()(x).sum(), x)

    def begin(self, resume: bool, replace: bool) -> None:
        """Make or take up the folder of work. Raises BadInput when OUT or an unfinished run is in the way."""
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"{self.out} is a file; a folder is written")
        vacant(self.out, self.partial, resume=resume, replace=replace)
        mark, state = self.partial / RUN, self.partial / STATE
        if resume and mark.is_file():
            theirs = json.loads(mark.read_text(encoding="utf-8"))
            for key, value in self.asked.identity().items():
                if theirs.get(key) != value:
                    raise BadInput(f"{self.partial}: the unfinished run has {key} {theirs.get(key)}, now {value}")
            if state.is_file():
                self.run.load(state)  # refuses other images, by their pixels
                self.say(f"resuming after round {self.run.rounds}")
            return
        need = 10 * len(self.images) * math.prod(self.images.shape)
        if free_disk(self.partial) < need:
            raise BadInput(f"{self.out.parent}: {need >> 20} MiB are needed, {free_disk(self.partial) >> 20} MiB are free")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        dump(mark, self.asked.identity())

    def work(self, progress: Callable[[int, float], None]) -> dict[str, Any]:
        """All rounds, then the folder. `progress(round, error)` is called after each. Returns the report."""
        start = time.perf_counter()
        try:
            while not self.run.done:
                error = self.run.round()
                self.run.save(self.partial / STATE)
                progress(self.run.rounds, error)
        except BadInput:
            if not self.run.rounds:
                shutil.rmtree(self.partial, ignore_errors=True)  # there is nothing to go on from
            raise
        made = self.run.result()
        target = self.partial / self.out.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        at = 0
        for before, after in made.pairs():
            for clean, image in zip(before, after, strict=True):
                _write(target / self.names[at], clean, image, made.levels)
                at += 1
        report = self._report(made.report(), time.perf_counter() - start)
        dump(target / "report.json", report)
        (target / "README.md").write_text(protect_card(report), encoding="utf-8")
        publish(target, self.out, self.partial)
        return report

    def _report(self, figures: dict[str, float], seconds: float) -> dict[str, Any]:
        labels = self.images.labels
        counts = [] if labels is None else labels.bincount().tolist()
        return {
            "format": "maskwright.protect", "version": 1,
            "method": {"slug": self.card.slug, "name": self.card.entry, "title": self.card.title, "arxiv": self.card.arxiv,
                       "settings": asdict(self.method), "seed": self.asked.seed},
            "surrogate": {"name": self.asked.surrogate or "small-convnet", "parameters": self.parameters},
            "data": {"images": len(self.images), "shape": list(self.images.shape),
                     "classes": dict(zip(self.images.classes, counts, strict=True)),
                     "skipped": [name for name, _ in self.images.skipped], "scaled": self.images.size is not None},
            "levels": self.levels(), "pixels": self.pixels(), "settled": figures["error"] < self.method.stop,
            "figures": {key: value if math.isfinite(value) else None for key, value in figures.items()},
            "seconds": round(seconds, 2), "command": self.asked.command, "machine": machine(), "versions": versions(),
            "finished": time.strftime("%Y-%m-%d %H:%M"),
        }  # fmt: skip


def _adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """For networks that are not tuned: in pilots the noise of small ones settled with it, and not with SGD at 0.1."""
    return torch.optim.Adam(parameters, lr=3e-3)


def _targets(names: tuple[str, ...]) -> list[str]:
    """The names with .png for their suffix. Raises BadInput naming two images that would become one."""
    found: dict[str, str] = {}
    for name in names:
        target = str(PurePosixPath(name).with_suffix(".png"))
        if found.setdefault(target, name) != name:
            raise BadInput(f"{told(found[target])} and {told(name)} would both become {told(target)}: rename one")
    return list(found)


def _write(path: Path, clean: Tensor, image: Tensor, levels: int) -> None:
    """One PNG, read back: what was written is within the bound of what was read. (channels, height, width) uint8."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
    Image.fromarray(array.numpy().copy()).save(path)
    with Image.open(path) as again:
        read = torch.from_numpy(np.asarray(again).copy()).reshape(*image.shape[1:], -1).permute(2, 0, 1)
    if not torch.equal(read, image) or int((read.int() - clean.int()).abs().max()) > levels:
        raise BadInput(f"{path}: reads back as another image than was written")


def _windows(method: Any, shape: tuple[int, int, int]) -> None:
    """Raise BadInput where the method's windows do not divide an image, naming those that do."""
    window, both = getattr(method, "window", 1), math.gcd(*shape[1:])
    if both % window:
        sides = ", ".join(str(side) for side in range(1, both + 1) if both % side == 0)
        raise BadInput(f"window {window} does not divide images of {shape[1]} x {shape[2]}: --set window is one of {sides}")


def _method(asked: ProtectRecipe) -> tuple[Any, Any]:
    card = found(asked.method)
    kind = card.load()
    if not (hasattr(kind, "protect") and hasattr(kind, "start")):
        raise BadInput(f"{card.slug} does not protect images; salm does")
    return card, built(card, kind, asked.settings)
