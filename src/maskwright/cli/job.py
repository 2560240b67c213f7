"""One prune run from start to end: plan, calibrate, solve block by block, evaluate, save, report; resumable.

Everything is made in `OUT.partial/` and renamed to OUT at the end, so a half-written folder never looks finished.
After each block its masks (and new weights) are on disk; `--resume` applies them, runs the pruned blocks once
more to get the hidden states, and goes on: the same bits as in one run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from maskwright.cli.outcome import PROMPTS, outcome
from maskwright.cli.plan import Plan, plan_of
from maskwright.cli.recipe import Recipe, build_method
from maskwright.cli.unfinished import Unfinished
from maskwright.core.errors import BadInput
from maskwright.lab.record import machine, resident_bytes, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import loss, read_text, sample, windows
from maskwright.models.folder import publish, vacant
from maskwright.models.load import Source, files_hash, find, load, read_in
from maskwright.models.save import save
from maskwright.report.model_card import model_card
from maskwright.report.page import put, write
from maskwright.weights.accelerated import accelerate, rows
from maskwright.weights.solve import Rule, SiteResult, assign, maskset, solve

Say = Callable[[str], None]


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class Job:
    """The run of one recipe. `plan` is cheap after `open`; `run` does the work."""

    def __init__(self, recipe: Recipe, say: Say) -> None:
        self.recipe, self.say = recipe, say
        self.method = build_method(recipe)
        self.rules = [Rule(r.where, r.pattern, r.density, r.dense) for r in recipe.rules]
        self.out = Path(recipe.out or "unnamed")
        self.work = self.out.with_name(self.out.name + ".partial")
        self.state = Unfinished(self.work)
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def open(self) -> None:
        """Check the folders, find and load the model, cut the texts. Raises BadInput before any long work."""
        recipe = self.recipe
        if not recipe.dry_run:
            vacant(self.out, self.work, resume=recipe.resume, replace=recipe.replace)
        self.calibration = self._text(recipe.calibration, 0)
        self.heldout = self._text(recipe.evaluate, 1)
        start = time.perf_counter()
        self.source: Source = find(recipe.model)
        self.model, self.tokenizer = load(self.source)
        read_in(self.model)  # so that what loading takes is not counted later
        self.seconds["load"] = time.perf_counter() - start
        self.loaded_bytes = resident_bytes()
        self.chosen, self.densities = assign(self.method, self.model, self.rules, recipe.seed)
        self.causal = self.tokenizer is not None and getattr(self.model, "get_output_embeddings", lambda: None)() is not None
        needed = bool(self.method.needs or self.method.allocation.needs_facts)
        self.batches: list[Tensor] | None = None
        if needed:
            if self.tokenizer is None:
                raise BadInput(f"{self.source.name} has no tokenizer, so calibration text cannot be read")
            what, text = self.calibration
            self.batches = windows(self.tokenizer, text, recipe.samples, recipe.length, seed=recipe.seed, what=what)
        self.tests = (
            windows(self.tokenizer, self.heldout[1], recipe.windows, recipe.length, what=self.heldout[0])
            if self.causal and recipe.windows
            else []
        )

    def _text(self, path: str | None, side: int) -> tuple[str, str]:
        if path:
            return path, read_text(Path(path))
        return ("Python help topics, calibration part", "Python help topics, held-out part")[side], topics_split()[side]

    @cached_property
    def plan(self) -> Plan:
        """Sites, exact sizes, and estimates of time, memory and disk."""
        return plan_of(self)

    def run(self, progress: Callable[[int, int, str, float], None]) -> dict[str, Any]:
        """Do it. `progress(done, total, label, seconds left)` is called after each block. Returns the report."""
        need = self.plan.disk
        if free_disk(self.work) < need:
            raise BadInput(
                f"{self.work.parent}: {need >> 20} MiB of disk are needed, {free_disk(self.work) >> 20} MiB are free"
            )
        done = self.state.begin(self._fingerprint(), self.recipe.resume, self.recipe.any_machine)
        if done:
            self.say(f"resuming after {len(done)} blocks")
        before = self._judge("before")
        start = time.perf_counter()
        labels = len({s.block for s in self.chosen.values()})
        results: list[SiteResult] = []
        fresh = 0
        steps = solve(
            self.model, self.method, self.batches, seed=self.recipe.seed, rules=self.rules, done=done,
            counts=self.state.counts(), planned=self.state.keep_counts if self.looks else None,
        )  # fmt: skip
        for index, block in enumerate(steps):
            results += [replace(site, value=None) for site in block.sites]  # new weights are in the model and on disk
            if block.label not in done:
                self.state.keep(index, block)
                fresh += 1
                left = (time.perf_counter() - start) / fresh * (labels - index - 1)
                progress(index + 1, labels, block.label, left)
        self.seconds["calibrate and select"] = time.perf_counter() - start
        masks = maskset(self.method, results, self.recipe.seed, list(self.chosen))
        masks.check()
        after = self._judge("after")
        final = self.work / "out"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        start = time.perf_counter()
        self.say("writing the checkpoint")
        save(self.model, self.tokenizer, self.source, final, set(self.chosen))
        masks.save(final / "masks.safetensors")
        self.seconds["save"] = time.perf_counter() - start
        packed = self._packed()
        self.seconds["total"] = time.perf_counter() - self.began
        report = outcome(self, masks, results, before, after, packed)
        write(report, final)
        put(final / "README.md", model_card(report))
        publish(final, self.out, self.work)
        return report

    @property
    def looks(self) -> bool:
        """Whether the budget looks at the dense model."""
        return self.method.allocation.needs_scores or bool(self.method.allocation.needs_facts)

    def _fingerprint(self) -> dict[str, Any]:
        told = machine()
        return {
            "recipe": self.recipe.identity(),
            "model": files_hash(self.source),
            "texts": [text_hash(self.calibration[1]), text_hash(self.heldout[1])],
            "versions": {k: v for k, v in versions().items() if k in ("maskwright", "torch", "transformers")},
            "machine": {"threads": told["threads"], "instructions": told["instructions"]},
        }

    def _packed(self) -> dict[str, Any] | None:
        """Layers timed dense and packed; the model's speed with each in its faster form, then with all packed.

        None for a model without sparse linear layers, such as one of convolutions. Its dense weights are freed.
        """
        start = time.perf_counter()
        paces = {}
        try:
            for when, force in (("accelerated", False), ("packed", True)):
                told = accelerate(self.model, force=force, say=self.say)
                if self.causal:
                    paces[when] = sample(self.model, self.tokenizer, PROMPTS, self.recipe.sample_tokens)[1]
                if not force:
                    chosen = told
                    self.say(str(told))
        except BadInput:
            return None
        self.seconds["time the packed form"] = time.perf_counter() - start
        return {"paces": paces, "engine": chosen.engine.name, "told": str(chosen), "packed": len(chosen.packed),
                "layers": rows(chosen)}  # fmt: skip

    def _judge(self, when: str) -> dict[str, Any] | None:
        if not self.causal:
            return None
        known = self.state.quality(when)
        if known is not None:
            return known
        start = time.perf_counter()
        self.say(f"perplexity {when} on {len(self.tests)} windows")
        found = loss(self.model, self.tests).windows if self.tests else ()
        texts, speed = sample(self.model, self.tokenizer, PROMPTS, self.recipe.sample_tokens)
        seconds = time.perf_counter() - start
        self.seconds[f"evaluate {when}"] = seconds
        told = {"loss": list(found), "samples": texts, "tokens_per_second": speed}
        self.state.keep_quality(when, told)
        return told
