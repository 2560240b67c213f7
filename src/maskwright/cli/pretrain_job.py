"""One pre-training run from start to end: images, backbone, learner, steps with a probe now and then, report; resumable.

Everything is made in `OUT.partial/` and renamed to OUT at the end. Its state is written every minute, at every probe and
when the run is stopped; `--resume` goes on from it to the same bits.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright import __version__
from maskwright.cli.job import free_disk
from maskwright.cli.pretrain_models import backbone, save_backbone, tried
from maskwright.cli.recipe import built, found
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs import Pretraining
from maskwright.inputs.calling import naming
from maskwright.inputs.images import open_images
from maskwright.inputs.pretraining import Pretrain, Recipe
from maskwright.inputs.probe import linear_probe
from maskwright.lab.record import machine, peak_bytes, versions
from maskwright.models.folder import apart, publish, vacant
from maskwright.report import pretraining as page
from maskwright.report.page import put
from maskwright.report.picture import row_png
from maskwright.report.pretrain_card import pretrain_card

_EVERY, _HELD_OUT, _SHOWN, _BATCH = 60.0, 5, 8, 64  # seconds between states; every 5th image of a class is held out


@dataclass(frozen=True)
class PretrainRecipe:
    """What `pretrain` was asked for."""

    method: str
    model: str
    data: str
    out: str | None
    recipe: Recipe
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    grey: bool | None = None
    labelled: bool = False
    skip_unreadable: bool = False
    probe_every: int | None = None
    command: str | None = None

    def identity(self) -> dict[str, Any]:
        """What a stopped run must have in common with the one that goes on."""
        left_out = ("out", "command")
        told = {key: value for key, value in asdict(self).items() if key not in left_out}
        return json.loads(json.dumps(told | {"version": __version__}))  # type: ignore[no-any-return]


class PretrainJob:
    """The run of one recipe. `open` checks everything; `plan` is an estimate; `run` does the work."""

    def __init__(self, asked: PretrainRecipe, say: Callable[[str], None]) -> None:
        self.asked, self.say = asked, say
        self.out = Path(asked.out or "unnamed")
        self.work = self.out.with_name(self.out.name + ".partial")
        self.seconds: dict[str, float] = {"train": 0.0, "probe": 0.0}
        self.probes: list[dict[str, Any]] = []

    def open(self) -> None:
        """Read the folder, build backbone and learner. Raises BadInput before any long work."""
        asked = self.asked
        self.card, self.method = _method(asked)
        self.images = open_images(
            Path(asked.data),
            labelled=asked.labelled,
            size=asked.size,
            grey=asked.grey,
            skip_unreadable=asked.skip_unreadable,
        )
        self.mark = [[name, (self.images.root / name).stat().st_size] for name in self.images.names]
        if asked.out is not None:
            apart(self.out, self.images.root)
        self.held_out, self.used = self._split()
        channels, *size = self.images.shape
        self.backbone = backbone(asked.model, channels, (size[0], size[1]), asked.recipe.seed)
        example = self.images.read(self.used[:2]).float().div_(255)
        with naming(f"{self.card.slug} around model {asked.model!r} on images of shape {tuple(example.shape)}"):
            self.learner = self.method.learner(self.backbone, example, seed=asked.recipe.seed)
            tried(self.learner, example)
        self.training = Pretrain(self.learner, len(self.used), lambda at: self.images.read(self.used[at]), asked.recipe)

    def _split(self) -> tuple[Tensor, Tensor]:
        """(held out, used): with labels every fifth image of each class is kept away from training."""
        numbers = torch.arange(len(self.images))
        if self.images.labels is None:
            return numbers[:0], numbers
        out = torch.zeros(len(numbers), dtype=torch.bool)
        for label in self.images.labels.unique():
            out[(self.images.labels == label).nonzero().flatten()[_HELD_OUT - 1 :: _HELD_OUT]] = True
        if not bool(out.any()):
            raise BadInput(
                f"{self.images.root}: a probe holds out every {_HELD_OUT}th image of a class; no class has as many"
            )
        return numbers[out], numbers[~out]

    def plan(self) -> dict[str, Any]:
        """Sizes exactly, time from a step on a copy that is thrown away."""
        before = copy.deepcopy(self.learner.state_dict())
        trial = Pretrain(self.learner, len(self.used), self.training.read, self.asked.recipe)
        steps = trial.steps()
        next(steps)  # the first one also sets things up
        start = time.perf_counter()
        if trial.step < self.asked.recipe.steps:
            next(steps)
        a_step = time.perf_counter() - start
        self.learner.load_state_dict(before)
        count = _parameters(self.learner)
        return {
            "images": len(self.images), "shape": list(self.images.shape), "held_out": len(self.held_out),
            "skipped": len(self.images.skipped), "parameters": _parameters(self.backbone), "learner_parameters": count,
            "steps": self.asked.recipe.steps, "seconds": a_step * self.asked.recipe.steps,
            "disk": 16 * count, "memory": peak_bytes(),
        }  # fmt: skip

    def begin(self, resume: bool, replace: bool) -> None:
        """Make or take up the folder of work. Raises BadInput when OUT or an unfinished run is in the way."""
        vacant(self.out, self.work, resume=resume, replace=replace)
        mark, state = self.work / "run.json", self.work / "state.safetensors"
        if resume and mark.is_file():
            theirs = json.loads(mark.read_text(encoding="utf-8"))
            for key, value in self.asked.identity().items():
                if theirs["asked"].get(key) != value:
                    raise BadInput(f"{self.work}: the unfinished run has {key} {theirs['asked'].get(key)}, now {value}")
            if theirs["images"] != self.mark:
                raise BadInput(f"{self.work}: the images in {self.images.root} are not those of the unfinished run")
            if state.is_file():
                self.training.restore(state)
                self.probes = [each for each in theirs["probes"] if each["step"] <= self.training.step]
                self.seconds = theirs["seconds"]
                self.say(f"resuming after step {self.training.step}")
                return
        if free_disk(self.work) < (need := 32 * _parameters(self.learner)):
            raise BadInput(f"{self.out.parent}: {need >> 20} MiB are needed, {free_disk(self.out) >> 20} MiB are free")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self._keep()

    def _keep(self) -> None:
        """Write the state. What was measured goes first: measurements later than what was learnt are made again."""
        told = {"asked": self.asked.identity(), "images": self.mark, "probes": self.probes, "seconds": self.seconds}
        put(self.work / "run.json", json.dumps(told))
        if self.training.step:
            self.training.save(self.work / "state.safetensors")

    def run(self, progress: Callable[[int, int, float], None]) -> dict[str, Any]:
        """Train, and write the folder. `progress(step, steps, loss)` is called after each step. Returns the report."""
        recipe = self.asked.recipe
        every = self.asked.probe_every or max(1, recipe.steps // 5)
        try:
            self._probe()
            saved = start = time.perf_counter()
            for loss in self.training.steps():
                self.seconds["train"] += -start + (start := time.perf_counter())
                progress(self.training.step, recipe.steps, loss)
                if self.training.step % every == 0 or self.training.step == recipe.steps:
                    self._probe()
                    self._keep()
                    saved = start = time.perf_counter()
                elif start - saved > _EVERY:
                    self._keep()
                    saved = start = time.perf_counter()
        except KeyboardInterrupt:
            self._keep()
            raise
        except BadInput:
            if not self.training.step:
                shutil.rmtree(self.work, ignore_errors=True)  # the same would be refused again
            raise
        return self._finish()

    def _probe(self) -> None:
        labels = self.images.labels
        if labels is None or (self.probes and self.probes[-1]["step"] >= self.training.step):
            return
        start = time.perf_counter()
        parts = [(self._features(at), labels[at]) for at in (self.used, self.held_out)]
        self.probes.append({"step": self.training.step, "accuracy": linear_probe(*parts)})
        self.seconds["probe"] += time.perf_counter() - start

    @torch.no_grad()
    def _features(self, numbers: Tensor) -> Tensor:
        self.learner.eval()
        return torch.cat([self.learner.features(self.images.read(at).float().div_(255)) for at in numbers.split(_BATCH)])

    def _pictures(self) -> list[str]:
        some = self.held_out if len(self.held_out) else self.used
        some = some[torch.linspace(0, len(some) - 1, min(_SHOWN, len(some))).long()]
        self.learner.eval()
        shown = self.learner.reconstruct(
            self.images.read(some).float().div_(255), generator(self.asked.recipe.seed, "shown")
        )
        return [row_png(part) for part in (shown.images, shown.hidden, shown.filled)]

    def _finish(self) -> dict[str, Any]:
        asked, labels = self.asked, self.images.labels
        target = self.work / self.out.name  # the finished folder, inside the folder of work until it is whole
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        files, load = save_backbone(self.backbone, target, asked.model)
        chance = None if labels is None else float(labels[self.held_out].bincount().max() / len(self.held_out))
        told = asdict(self.method)  # type: ignore[call-overload]
        report: dict[str, Any] = {
            "format": page.FORMAT, "version": 1,
            "method": {"slug": self.card.slug, "name": self.card.entry, "title": self.card.title, "arxiv": self.card.arxiv,
                       "settings": told},
            "model": {"name": asked.model, "class": type(self.backbone).__name__, "parameters": _parameters(self.backbone),
                      "learner_parameters": _parameters(self.learner)},
            "data": {"folder": asked.data, "images": len(self.used), "held_out": len(self.held_out),
                     "classes": len(self.images.classes), "shape": list(self.images.shape),
                     "skipped": [name for name, _ in self.images.skipped]},
            "recipe": asdict(asked.recipe), "losses": self.training.losses, "probe": self.probes, "chance": chance,
            "pictures": self._pictures(), "files": files, "load": load, "seconds": self.seconds, "command": asked.command,
            "machine": machine(), "versions": versions(), "finished": time.strftime("%Y-%m-%d %H:%M"),
            "peak_bytes": peak_bytes(),
        }  # fmt: skip
        page.write(report, target)
        (target / "README.md").write_text(pretrain_card(report), encoding="utf-8")
        publish(target, self.out, self.work)
        return report


def _method(asked: PretrainRecipe) -> tuple[Any, Pretraining]:
    card = found(asked.method)
    kind = card.load()
    if not (isinstance(kind, type) and issubclass(kind, Pretraining)):
        raise BadInput(f"{card.slug} does not pre-train on images; see maskwright list")
    return card, built(card, kind, asked.settings)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
