"""The report of a finished prune run: what `report.json` holds and `report.html` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.method import card as card_of
from maskwright.lab.record import machine, peak_bytes, versions
from maskwright.lab.text import text_hash
from maskwright.models.evaluate import Loss
from maskwright.report.picture import density_png, mask_png
from maskwright.weights.solve import SiteResult

if TYPE_CHECKING:
    from maskwright.cli.job import Job

PROMPTS = ("What is the capital of France?", "Explain in two sentences what a Python dictionary is.")


def outcome(
    job: Job, masks: MaskSet, results: Sequence[SiteResult], before: dict[str, Any] | None, after: dict[str, Any] | None,
    packed: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The report of a finished run as plain data. before, after: measured losses, samples and speed (None: no causal LM).

    packed: layers and model timed from packed weights (None: no sparse linear layer).
    """
    by_name = {r.name: r for r in results}
    card = card_of(job.recipe.method)
    notes = [job.source.note] if job.source.note else []
    notes.append(
        "The checkpoint is stored dense with exact zeros: `maskwright pack` makes it smaller, `maskwright generate` faster."
    )
    empty = [n for n, m in masks.items() if m.density < 0.01]
    if empty:
        notes.append(f"{len(empty)} sites keep less than 1%: {', '.join(empty[:3])}.")
    damped = [f"{r.name}: {r.note}" for r in results if "damping" in r.note]
    notes += damped[:5]
    if job.recipe.resume:
        notes.append("This run was resumed: seconds and memory are those after the resume.")
    quality = None
    if before and after and before["loss"]:
        one, two = Loss(tuple(before["loss"])), Loss(tuple(after["loss"]))
        quality = {
            "metric": "perplexity", "text": job.heldout[0], "sha256": text_hash(job.heldout[1]),
            "tokens": len(job.tests) * job.recipe.length, "windows": len(job.tests), "window": job.recipe.length,
            "before": one.figures(), "after": two.figures(), "paired": one.paired(two),
        }  # fmt: skip
    speed = _speed(before, after, packed)
    told = machine()
    return {
        "format": "maskwright.report", "version": 1,
        "model": {
            "name": job.source.name, "source": job.source.origin, "class": type(job.model).__name__,
            "parameters": job.plan.parameters, "site_parameters": masks.total,
            "note": job.source.note, "base_hash": masks.base,
        },
        "method": {
            "slug": card.slug, "name": card.entry, "title": card.title, "arxiv": card.arxiv,
            "settings": job.method.settings(),
        },
        "pattern": job.recipe.pattern, "within": job.method.within, "density": masks.density,
        "kept": masks.count, "total": masks.total, "quality": quality,
        "samples": [
            {"prompt": p, "before": b, "after": a}
            for p, b, a in zip(PROMPTS, before["samples"], after["samples"], strict=True)
        ] if before and after else [],
        "sites": [
            {"name": n, "block": by_name[n].block, "shape": list(m.shape), "pattern": m.pattern.spec(), "kept": m.count,
             "total": m.keep.numel(), "density": m.density, "error": by_name[n].error, "note": by_name[n].note or None}
            for n, m in masks.items()
        ],
        "pictures": _pictures(masks), "speed": speed, "seconds": job.seconds,
        "memory": {"peak_bytes": peak_bytes(), "after_loading_bytes": job.loaded_bytes},
        "calibration": {
            "source": job.calibration[0], "sha256": text_hash(job.calibration[1]),
            "tokens": len(job.batches) * job.recipe.length, "windows": len(job.batches),
        } if job.batches else None,
        "settings": job.recipe.identity(), "command": job.recipe.command,
        "machine": {**told, "instruction_set": told["instructions"]}, "versions": versions(), "seed": job.recipe.seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"), "notes": notes,
    }  # fmt: skip


def _speed(
    before: dict[str, Any] | None, after: dict[str, Any] | None, packed: dict[str, Any] | None
) -> dict[str, Any] | None:
    found = {when: one["tokens_per_second"] for when, one in (("before", before), ("after", after)) if one}
    found |= packed["paces"] if packed else {}
    paces = {when: pace for when, pace in found.items() if pace == pace}  # NaN: the text ended at once
    if not paces and not packed:
        return None
    verdict = ""
    if packed and {"after", "accelerated", "packed"} <= paces.keys():
        chosen, every = (paces[when] / paces["after"] for when in ("accelerated", "packed"))
        verdict = f"{chosen:.2f} x dense with every layer in its fastest form ({packed['packed']} of them packed), "
        verdict += f"{every:.2f} x with all packed" + ("" if packed["packed"] else "; packing saves memory here, not time")
    return {when: {"tokens_per_second": pace} for when, pace in paces.items()} | {
        "verdict": verdict, "layers": packed["layers"] if packed else [], "engine": packed["engine"] if packed else "",
        "told": packed["told"] if packed else "",
    }  # fmt: skip


def _pictures(masks: Mapping[str, Mask], most: int = 6) -> list[dict[str, str]]:
    flat = [(n, m) for n, m in masks.items() if m.keep.ndim == 2]
    step = max(1, len(flat) // 3)
    out = []
    for name, mask in flat[::step][: most // 2]:
        out.append({"site": name, "caption": "top-left 128 x 128 entries; dark = kept", "png": mask_png(mask.keep)})
        out.append({"site": name, "caption": "kept share by tile of 16 x 16", "png": density_png(mask.keep, 16)})
    return out
