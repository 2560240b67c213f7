"""The model card that `maskwright pretrain` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def pretrain_card(report: Mapping[str, Any]) -> str:
    """The README.md of a pre-trained backbone."""
    method, model, data = report["method"], report["model"], report["data"]
    lines = [
        f"# {model['name']}, pre-trained by {method['slug']}", "",
        f"{model['class']} with {model['parameters']:,} parameters, pre-trained without labels on {data['images']:,} images "
        f"of {data['shape'][1]} x {data['shape'][2]} ({len(report['losses']):,} steps of {report['recipe']['batch']}).", "",
        f"Method: {method['title']}" + (f" (arXiv {method['arxiv']})." if method["arxiv"] else "."), "",
        "```python", report["load"], "```", "",
    ]  # fmt: skip
    if report["probe"]:
        first, last = report["probe"][0], report["probe"][-1]
        lines += [
            f"Linear probe on {data['held_out']:,} held-out images: {first['accuracy']:.3f} at step {first['step']}, "
            f"{last['accuracy']:.3f} at step {last['step']}; the most frequent class is {report['chance']:.3f}.", "",
        ]  # fmt: skip
    return "\n".join([*lines, "Figures and pictures: report.html.", ""])
