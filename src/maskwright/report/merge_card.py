"""The model card of a merge: which models, how, and what it is worth, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskwright.report.words import cell, count, hub_id, plus_minus, share, size, table


def merge_card(report: Mapping[str, Any]) -> str:
    """A README.md with YAML front matter for the folder a merge leaves."""
    parts = [_front(report), f"# Merged by {cell(report['method'])}"]
    parts.append(
        f"{len(report['models'])} models tuned from `{cell(report['base'])}` in one: "
        f"{count(report['parameters'])} parameters, "
        f"{size(report['bytes'])}. An ordinary checkpoint; it loads without maskwright."
    )
    counted = "kept" in report["models"][0]
    rows = [("model", "weight", "settings", *(("kept",) if counted else ()))]
    rows.append(("---", "---:", "---", *(("---:",) if counted else ())))
    for each in report["models"]:
        settings = ", ".join(f"{key} {value}" for key, value in each["settings"].items())
        kept = (share(each["kept"] / max(1, each["total"])),) if counted else ()
        rows.append((each["model"], f"{each['weight']:g}", settings, *kept))
    parts.append(table(rows))
    if counted:
        parts.append(
            f"{share(report['overlap'])} of the entries are kept by two models or more, "
            f"{share(report['conflict'])} with both signs."
        )
    if report["quality"]:
        first = report["quality"][0]
        rows = [("", "perplexity ± standard error"), ("---", "---:")]
        rows += [(each["model"], plus_minus(each["value"], each["stderr"])) for each in report["quality"]]
        parts += ["## Quality", table(rows), f"Measured on {cell(first['text'])}, sha256 `{first['sha256']}`."]
    else:
        parts.append("Quality was not measured in this run.")
    if report["command"]:
        parts += ["## How it was made", "```\n" + report["command"].replace("`", "'") + "\n```"]
    parts.append(f"Seed {report['seed']}. Every figure: `report.json`.")
    return "\n\n".join(parts) + "\n"


def _front(report: Mapping[str, Any]) -> str:
    import yaml

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["maskwright", "merge", report["method"]]}
    # The hub reads base_model as ids of its repositories; a local name would link to a stranger's.
    names = [report["base"], *(each["model"] for each in report["models"])]
    ids = [name for name in names if hub_id(name)]
    if len(ids) == len(names):
        front["base_model"] = ids
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"
