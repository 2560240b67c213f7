"""The table of nine runs: magnitude, Wanda, SparseGPT at unstructured (per row), 4:8 and 2:4, density 0.5.

Writes results/nine_runs.json after every run (a run already there under the same text, model and code is kept), and the
table into README.md and docs/prune.md between its markers when all nine stand.
"""

import json
from pathlib import Path

from maskwright.core.cache import write_atomic
from maskwright.core.method import card, get
from maskwright.lab.record import machine, piece_hash, results_dir, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import Loss, loss, windows
from maskwright.models.load import files_hash, find, load
from maskwright.report.pages import between

METHODS, PATTERNS = ("magnitude", "wanda", "sparsegpt"), ("unstructured", "4:8", "2:4")


def main() -> None:
    source = find("default")
    path = results_dir() / "nine_runs.json"
    texts = [text_hash(text) for text in topics_split()]
    stamp = {"model": files_hash(source), "texts": texts, "seed": 0, "calibration": "32 x 512", "held_out": "12 x 512"}
    told = json.loads(path.read_text()) if path.exists() else {}
    if told.get("stamp") != stamp:
        told = {"stamp": stamp, "runs": {}, "versions": versions(), "machine": machine()}
    for method in METHODS:
        for pattern in PATTERNS:
            key, code = f"{method} {pattern}", piece_hash(card(method))
            if told["runs"].get(key, {}).get("code") == code:
                continue
            model, tokenizer = load(source)
            tests = windows(tokenizer, topics_split()[1], 12, 512)
            batches = windows(tokenizer, topics_split()[0], 32, 512, seed=0)
            if "dense" not in told:
                told["dense"] = loss(model, tests).figures()
            within = {"within": "row"} if pattern == "unstructured" else {}
            masks = get(method)(density=0.5, pattern=pattern, **within).prune(model, batches, seed=0).check()
            found: Loss = loss(model, tests)
            told["runs"][key] = {**found.figures(), "kept": masks.count, "total": masks.total, "code": code}
            write_atomic(path, (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
            print(key, found.figures(), flush=True)
    for page in ("README.md", "docs/prune.md"):
        table(told, Path(__file__).parent.parent / page)


def table(told: dict, page: Path) -> None:
    rows = [f"| pattern | {' | '.join(METHODS)} |", "| --- |" + " --- |" * len(METHODS)]
    for pattern in PATTERNS:
        cells = [told["runs"][f"{m} {pattern}"] for m in METHODS]
        rows.append(f"| {pattern} | " + " | ".join(f"{c['value']:.1f} ± {c['stderr']:.1f}" for c in cells) + " |")
    dense = told["dense"]
    rows.append("")
    rows.append(f"Dense: {dense['value']:.2f} ± {dense['stderr']:.2f}. Made by `benchmarks/nine_runs.py`.")
    page.write_text(between(page.read_text(), "\n".join(rows), "<!-- ninerun:begin -->", "<!-- ninerun:end -->"))


if __name__ == "__main__":
    main()
