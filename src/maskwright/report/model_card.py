"""The model card of a masked model: a README.md as the Hugging Face hub reads it, with plain words on what was done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from maskwright.report.schema import check
from maskwright.report.words import arxiv, cell, count, hub_id, plain, plus_minus, share, size, table

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""
_MASKS = """The masks, one bit an entry, stand in `masks.safetensors`:

```python
from maskwright import MaskSet

masks = MaskSet.load("masks.safetensors")
print(masks.density)
```"""


def model_card(report: Mapping[str, Any]) -> str:
    """A README.md with YAML front matter for the folder a prune run leaves. Raises BadInput for another format."""
    r = check(report)
    model, method, quality = r["model"], r["method"], r["quality"]
    title = f"{model['name']}, masked by {method['name'] or method['slug']}"
    title += f" at {r['pattern']}" if r["pattern"] else ""
    kept = r["kept"] / r["total"] if r["total"] else 0.0
    parts = [_front(r), f"# {cell(title)}"]
    parts.append(
        f"{count(r['kept'])} of {count(r['total'])} weights on {len(r['sites'])} sites are kept ({share(kept)}), "
        "the others are exactly zero. The tensors keep their dense shape, so the file loads without maskwright "
        "and takes as much space and time as the dense one."
    )
    parts += ["## Use", _LOAD, _MASKS, "## Before and after", _table(r, quality)]
    parts += ["## How it was made", f"```\n{command(r).replace('`', chr(39))}\n```", _made(r)]
    if r["notes"]:
        parts += ["## Notes", "\n".join(f"- {cell(note)}" for note in r["notes"])]
    parts.append("Every figure with its settings: `report.html`; for machines: `report.json`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def command(report: Mapping[str, Any]) -> str:
    """The command that made the report: the recorded one, else rebuilt from method, pattern, density and seed."""
    if report["command"]:
        return str(report["command"])
    words = ["maskwright", "prune", report["model"]["source"] or report["model"]["name"]]
    words += ["--method", report["method"]["slug"]]
    for key in ("pattern", "density", "within", "seed"):
        if report[key] not in (None, ""):
            words += [f"--{key}", str(report[key])]
    for key, value in report["method"]["settings"].items():
        if key not in ("pattern", "density", "within", "seed") and isinstance(value, str | int | float):
            words += ["--set", f"{key}={plain(value)}"]
    return shlex.join(words)


def _front(r: Mapping[str, Any]) -> str:
    import yaml

    model = r["model"]
    front: dict[str, Any] = {"library_name": "transformers"}
    if model["class"].endswith("ForCausalLM"):
        front["pipeline_tag"] = "text-generation"
    # The hub reads base_model as the id of one of its repositories; a bare or local name would link to a stranger's.
    if hub_id(model["name"]):
        front["base_model"] = model["name"]
    # A line break in a name would end the front matter early.
    front["model_name"] = " ".join(f"{model['name']} {r['method']['slug']} {r['pattern']}".split())
    if model["license"]:
        front["license"] = " ".join(model["license"].split())
    front["tags"] = ["maskwright", "pruning", "sparse", r["method"]["slug"]]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _table(r: Mapping[str, Any], quality: Mapping[str, Any] | None) -> str:
    if not quality:
        return "Quality was not measured in this run."
    before, after = quality["before"], quality["after"]
    rows: list[tuple[str, ...]] = [("", "before", "after"), ("---", "---:", "---:")]
    name = f"{quality['metric']} ± standard error"
    rows.append((name, plus_minus(before["value"], before["stderr"]), plus_minus(after["value"], after["stderr"])))
    if before["loss"] is not None and after["loss"] is not None:
        losses = [plus_minus(x["loss"], x["loss_stderr"]) for x in (before, after)]
        rows.append(("loss, nats a token", *losses))
    rows.append(("weights kept on sites", count(r["total"]), count(r["kept"])))
    text = table(rows)
    measured = f"Measured on {cell(quality['text']) or 'held-out text'}"
    if quality["tokens"] is not None:
        measured += f", {count(quality['tokens'])} tokens"
    measured += f", sha256 `{cell(quality['sha256'])}`." if quality["sha256"] else "."
    if quality["paired"]:
        paired = quality["paired"]
        difference = plus_minus(paired["loss_difference"], paired["stderr"], sign=True)
        measured += f" Paired over the same windows the loss differs by {difference} nats a token."
    return f"{text}\n\n{measured}"


def _made(r: Mapping[str, Any]) -> str:
    method, calibration = r["method"], r["calibration"]
    lines = [f"- method: {cell(method['title'] or method['slug'])}"]
    if arxiv(method["arxiv"]):
        lines[0] += f" ([arXiv {method['arxiv']}](https://arxiv.org/abs/{method['arxiv']}))"
    if method["settings"]:
        lines.append(f"- settings: {cell(plain(method['settings']))}")
    if calibration:
        tokens = f", {count(calibration['tokens'])} tokens" if calibration["tokens"] is not None else ""
        lines.append(f"- calibration: {cell(calibration['source'])}{tokens}, sha256 `{cell(calibration['sha256'])}`")
    if r["model"]["base_hash"]:
        lines.append(f"- base weights: {cell(r['model']['source'])}, hash `{cell(r['model']['base_hash'])}`")
    if r["memory"]:
        lines.append(f"- peak memory: {size(r['memory']['peak_bytes'])}")
    return "\n".join(lines)
