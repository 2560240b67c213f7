"""One prune run from start to end: plan, calibrate, solve block by block, evaluate, save, report; resumable.

Everything is made in `OUT.partial/` and renamed to OUT at the end, so a half-written folder never looks finished.
After each block its masks (and new weights) are on disk; `--resume` applies them, runs the pruned blocks once
more to get the hidden states, and goes on: the same bits as in one run.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskwright.cli.recipe import Recipe
from maskwright.core.budget import BUDGETS
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.method import card as card_of
from maskwright.core.pattern import parse
from maskwright.core.store import pack, replacing, unpack
from maskwright.lab.record import machine, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import Loss, loss, read_text, sample, windows
from maskwright.models.load import Source, files_hash, find, load
from maskwright.models.save import save
from maskwright.report.model_card import model_card
from maskwright.report.page import put, write
from maskwright.report.picture import density_png, mask_png
from maskwright.weights.oneshot import BlockResult, OneShot, Rule, SiteResult, assign, maskset, solve

PROMPTS = ("What is the capital of France?", "Explain in two sentences what a Python dictionary is.")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does it."""

    sites: int
    site_parameters: int
    parameters: int
    kept: int
    blocks: int
    rows: tuple[tuple[str, int, int, int], ...]  # kind of site, how many, kept, total
    seconds: float
    memory: int
    disk: int


def build_method(recipe: Recipe) -> OneShot:
    """The method with its fields. Raises BadInput listing the known methods or fields."""
    try:
        card = card_of(recipe.method)
    except KeyError as error:
        raise BadInput(str(error.args[0])) from None
    kind = card.load()
    if not (isinstance(kind, type) and issubclass(kind, OneShot)):
        raise BadInput(f"{card.slug} is a method for {card.when}, not for one-shot pruning")
    given: dict[str, Any] = {"pattern": recipe.pattern, "where": tuple(recipe.where)}
    pattern = parse(recipe.pattern)
    if recipe.density is not None:
        given["density"] = recipe.density
    if pattern.fixed is not None:
        share = pattern.fixed / int(recipe.pattern.split(":")[1].split("@")[0])
        if recipe.density is not None and recipe.density != share:
            raise BadInput(f"pattern {recipe.pattern} keeps {share:g} by itself; density {recipe.density:g} contradicts it")
        if recipe.within is not None:
            raise BadInput(f"pattern {recipe.pattern} competes inside its own groups; --within has no meaning for it")
        given["density"] = share
    if recipe.within is not None:
        given["within"] = recipe.within
    if recipe.budget is not None:
        if recipe.budget not in BUDGETS:
            raise BadInput(f"unknown budget {recipe.budget!r}; known: {', '.join(BUDGETS)}")
        given["budget"] = recipe.budget
    fields = kind.__dataclass_fields__
    for key, value in recipe.settings.items():
        if key not in fields:
            raise BadInput(f"{card.slug} has no setting {key!r}; it has {', '.join(fields)}")
        given[key] = _typed(kind, card.slug, key, value)
    try:
        return kind(**given)
    except TypeError as error:
        raise BadInput(f"{card.slug}: {error}") from None


def _typed(kind: type, slug: str, key: str, value: Any) -> Any:
    """A setting as its field's type. Raises BadInput for a value that is none."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint = get_type_hints(kind)[key]
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        said = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise BadInput(f"{slug}: {key}={value!r}: {said}") from None


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
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def open(self) -> None:
        """Check the folders, find and load the model, cut the texts. Raises BadInput before any long work."""
        recipe = self.recipe
        if self.out.exists() and not recipe.replace and not recipe.dry_run:
            raise BadInput(f"{self.out} exists; --replace overwrites it")
        if self.work.exists() and not (recipe.resume or recipe.replace or recipe.dry_run):
            raise BadInput(f"{self.work} holds an unfinished run; --resume goes on with it, --replace starts anew")
        self.calibration = self._text(recipe.calibration, 0)
        self.heldout = self._text(recipe.evaluate, 1)
        start = time.perf_counter()
        self.source: Source = find(recipe.model)
        self.model, self.tokenizer = load(self.source)
        # Weight files are mapped: one number of every page is read, so that what loading takes is not counted later.
        for parameter in self.model.parameters():
            parameter.detach().flatten()[::512].sum()
        self.seconds["load"] = time.perf_counter() - start
        self.loaded_bytes = _resident()
        self.chosen, _ = assign(self.method, self.model, self.rules, recipe.seed)
        self.causal = self.tokenizer is not None and getattr(self.model, "get_output_embeddings", lambda: None)() is not None
        needed = bool(self.method.needs or self.method.allocation.needs_facts)
        self.batches: list[Tensor] | None = None
        if needed:
            if self.tokenizer is None:
                raise BadInput(f"{self.source.name} has no tokenizer, so calibration text cannot be read")
            self.batches = windows(
                self.tokenizer,
                self.calibration[1],
                recipe.samples,
                recipe.length,
                seed=recipe.seed,
                what=self.calibration[0],
            )
        self.tests = (
            windows(self.tokenizer, self.heldout[1], recipe.windows, recipe.length, what=self.heldout[0])
            if self.causal and recipe.windows
            else []
        )

    def _text(self, path: str | None, side: int) -> tuple[str, str]:
        if path:
            return path, read_text(Path(path))
        return ("Python help topics, calibration part", "Python help topics, held-out part")[side], topics_split()[side]

    def plan(self) -> Plan:
        """Sites, exact sizes, and estimates of time and memory from a quick measurement of this machine."""
        sizes = {n: s.value.numel() for n, s in self.chosen.items()}
        kinds: dict[str, list[int]] = {}
        for name, site in self.chosen.items():
            _, units = site.pattern.grid(site.shape)
            share = (site.pattern.fixed / units) if site.pattern.fixed is not None else self._density(name)
            row = kinds.setdefault(".".join(name.split(".")[-3:-1]), [0, 0, 0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + round(share * sizes[name]), row[2] + sizes[name]
        total = sum(sizes.values())
        speed = _gflops()
        calibrate = len(self.batches or ()) * self.recipe.length * total * 2 * 2.6
        if "gram" in self.method.needs:
            calibrate *= 2
        every = sum(p.numel() for p in self.model.parameters())
        judge = 2 * len(self.tests) * self.recipe.length * every * 2 * 1.2
        model_bytes = every * 4
        hidden = len(self.batches or ()) * self.recipe.length * _width(self.model) * 4
        return Plan(
            len(sizes), total, every, sum(r[1] for r in kinds.values()),
            len({s.block for s in self.chosen.values()}),
            tuple((k, *v) for k, v in kinds.items()),  # type: ignore[misc]
            (calibrate + judge) / speed + 15, model_bytes + hidden + (600 << 20), model_bytes * 2 + total // 4,
        )  # fmt: skip

    def _density(self, name: str) -> float:
        rule = next((r for r in self.rules if self.chosen[name].named(r.where)), None)
        return self.method.density if rule is None or rule.density is None else rule.density

    def run(self, progress: Callable[[int, int, str, float], None]) -> dict[str, Any]:
        """Do it. `progress(done, total, label, seconds left)` is called after each block. Returns the report."""
        need = self.plan().disk
        if free_disk(self.work) < need:
            raise BadInput(
                f"{self.work.parent}: {need >> 20} MiB of disk are needed, {free_disk(self.work) >> 20} MiB are free"
            )
        done = self._begin()
        before = self._judge("before")
        start = time.perf_counter()
        labels = len({s.block for s in self.chosen.values()})
        results: list[SiteResult] = []
        fresh = 0
        steps = solve(
            self.model, self.method, self.batches, seed=self.recipe.seed, rules=self.rules, done=done,
            counts=self._counts(), planned=self._keep_counts,
        )  # fmt: skip
        for index, block in enumerate(steps):
            results += [replace(site, value=None) for site in block.sites]  # new weights are in the model and on disk
            if block.label not in done:
                self._keep(index, block)
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
        report = self._report(masks, results, before, after)
        write(report, final)
        put(final / "README.md", model_card(report))
        self._publish(final)
        return report

    def _publish(self, final: Path) -> None:
        old = self.out.with_name(self.out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        final.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    # -- what an interrupted run leaves, and how it goes on

    def _fingerprint(self) -> dict[str, Any]:
        told = machine()
        return {
            "recipe": self.recipe.identity(),
            "model": files_hash(self.source),
            "texts": [text_hash(self.calibration[1]), text_hash(self.heldout[1])],
            "versions": {k: v for k, v in versions().items() if k in ("maskwright", "torch", "transformers")},
            "machine": {"threads": told["threads"], "instructions": told["instructions"]},
        }

    def _begin(self) -> Mapping[str, BlockResult]:
        mark = self.work / "run.json"
        mine = self._fingerprint()
        if self.recipe.resume and mark.is_file():
            theirs = json.loads(mark.read_text(encoding="utf-8"))
            for key, value in mine.items():
                if theirs.get(key) != json.loads(json.dumps(value)) and not (key == "machine" and self.recipe.any_machine):
                    more = "; --any-machine goes on all the same" if key == "machine" else ""
                    raise BadInput(
                        f"{self.work}: the unfinished run has another {key} ({theirs.get(key)}, now {value}){more}"
                    )
            done = _Done(self.work / "blocks")
            self.say(f"resuming after {len(done)} blocks")
            return done
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "blocks").mkdir(parents=True)
        put(mark, json.dumps(mine, indent=1))
        return {}

    # Counts that a budget found by looking at the dense model; a resumed run no longer has that model.
    def _keep_counts(self, counts: Mapping[str, Tensor]) -> None:
        budget = self.method.allocation
        if budget.needs_facts or budget.needs_scores:
            with replacing(self.work / "counts.safetensors") as partial:
                save_file({name: count.contiguous() for name, count in counts.items()}, partial)

    def _counts(self) -> dict[str, Tensor] | None:
        kept = self.work / "counts.safetensors"
        return load_file(kept) if kept.is_file() else None

    def _keep(self, index: int, block: BlockResult) -> None:
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"label": block.label, "sites": []}
        for r in block.sites:
            tensors[f"{r.name}:bits"] = torch.from_numpy(pack(r.mask.keep))
            if r.value is not None:
                tensors[f"{r.name}:value"] = r.value.contiguous()
            facts["sites"].append(
                {"name": r.name, "block": r.block, "shape": list(r.mask.shape), "pattern": r.mask.pattern.spec(),
                 "error": r.error, "note": r.note, "base": r.base}
            )  # fmt: skip
        with replacing(self.work / "blocks" / f"{index:05d}.safetensors") as partial:
            save_file(tensors, partial, metadata={"block": json.dumps(facts)})

    # -- quality before and after

    def _judge(self, when: str) -> dict[str, Any] | None:
        if not self.causal:
            return None
        mark = self.work / f"{when}.json"
        if self.recipe.resume and mark.is_file():
            return json.loads(mark.read_text(encoding="utf-8"))
        start = time.perf_counter()
        self.say(f"perplexity {when} on {len(self.tests)} windows")
        found = loss(self.model, self.tests).windows if self.tests else ()
        texts, speed = sample(self.model, self.tokenizer, PROMPTS, self.recipe.sample_tokens)
        seconds = time.perf_counter() - start
        self.seconds[f"evaluate {when}"] = seconds
        told = {"loss": list(found), "samples": texts, "tokens_per_second": speed}
        put(mark, json.dumps(told))
        return told

    def _report(self, masks: Any, results: Sequence[SiteResult], before: Any, after: Any) -> dict[str, Any]:
        by_name = {r.name: r for r in results}
        card = card_of(self.recipe.method)
        notes = [self.source.note] if self.source.note else []
        notes.append("The checkpoint is stored dense with exact zeros: no smaller on disk and no faster in plain PyTorch.")
        empty = [n for n, m in masks.items() if m.density < 0.01]
        if empty:
            notes.append(f"{len(empty)} sites keep less than 1%: {', '.join(empty[:3])}.")
        damped = [f"{r.name}: {r.note}" for r in results if "damping" in r.note]
        notes += damped[:5]
        if self.recipe.resume:
            notes.append("This run was resumed: seconds and memory are those after the resume.")
        quality = None
        if before and before["loss"]:
            one, two = Loss(tuple(before["loss"])), Loss(tuple(after["loss"]))
            quality = {
                "metric": "perplexity", "text": self.heldout[0], "sha256": text_hash(self.heldout[1]),
                "tokens": len(self.tests) * self.recipe.length, "windows": len(self.tests), "window": self.recipe.length,
                "before": one.figures(), "after": two.figures(), "paired": one.paired(two),
            }  # fmt: skip
        speed = None
        if before and before["tokens_per_second"] == before["tokens_per_second"]:
            speed = {
                "before": {"tokens_per_second": before["tokens_per_second"]},
                "after": {"tokens_per_second": after["tokens_per_second"]},
                "verdict": "no gain here: dense kernels multiply zeros too",
            }
        self.seconds["total"] = time.perf_counter() - self.began
        told = machine()
        return {
            "format": "maskwright.report", "version": 1,
            "model": {
                "name": self.source.name, "source": self.source.origin, "class": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()), "site_parameters": masks.total,
                "note": self.source.note, "base_hash": masks.base,
            },
            "method": {
                "slug": card.slug, "name": card.entry, "title": card.title, "arxiv": card.arxiv,
                "settings": self.method.settings(),
            },
            "pattern": self.recipe.pattern, "within": self.method.within, "density": masks.density,
            "kept": masks.count, "total": masks.total, "quality": quality,
            "samples": [
                {"prompt": p, "before": b, "after": a}
                for p, b, a in zip(PROMPTS, before["samples"], after["samples"], strict=True)
            ] if before else [],
            "sites": [
                {"name": n, "block": by_name[n].block, "shape": list(m.shape), "pattern": m.pattern.spec(), "kept": m.count,
                 "total": m.keep.numel(), "density": m.density, "error": by_name[n].error, "note": by_name[n].note or None}
                for n, m in masks.items()
            ],
            "pictures": _pictures(masks), "speed": speed, "seconds": self.seconds,
            "memory": {"peak_bytes": _peak(), "after_loading_bytes": self.loaded_bytes},
            "calibration": {
                "source": self.calibration[0], "sha256": text_hash(self.calibration[1]),
                "tokens": len(self.batches) * self.recipe.length, "windows": len(self.batches),
            } if self.batches else None,
            "settings": self.recipe.identity(), "command": self.recipe.command,
            "machine": {**told, "instruction_set": told["instructions"]}, "versions": versions(), "seed": self.recipe.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "notes": notes,
        }  # fmt: skip


class _Done(Mapping[str, BlockResult]):
    """The blocks an interrupted run left on disk, by label and in order; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._paths = {str(_facts(path)["label"]): path for path in sorted(folder.glob("*.safetensors"))}

    def __getitem__(self, label: str) -> BlockResult:
        return _read_block(self._paths[label])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _facts(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["block"])


def _read_block(path: Path) -> BlockResult:
    facts, tensors = _facts(path), load_file(path)
    found = []
    for s in facts["sites"]:
        shape = tuple(s["shape"])
        mask = Mask(unpack(tensors[f"{s['name']}:bits"].numpy(), shape), parse(s["pattern"])).check()
        value = tensors.get(f"{s['name']}:value")
        found.append(SiteResult(s["name"], s["block"], mask, value, s["error"], s["note"], s["base"]))
    return BlockResult(facts["label"], tuple(found))


def _pictures(masks: Mapping[str, Mask], most: int = 6) -> list[dict[str, str]]:
    flat = [(n, m) for n, m in masks.items() if m.keep.ndim == 2]
    step = max(1, len(flat) // 3)
    out = []
    for name, mask in flat[::step][: most // 2]:
        out.append({"site": name, "caption": "top-left 128 x 128 entries; dark = kept", "png": mask_png(mask.keep)})
        out.append({"site": name, "caption": "kept share by tile of 16 x 16", "png": density_png(mask.keep, 16)})
    return out


def _gflops() -> float:
    a = torch.randn(512, 576)
    b = torch.randn(576, 1536)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(a, b)
    return 5 * 2 * 512 * 576 * 1536 / (time.perf_counter() - start)


def _width(model: Any) -> int:
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return _peak()


__all__ = ["Job", "Plan", "build_method"]
