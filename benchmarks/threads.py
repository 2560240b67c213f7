"""How many mask entries differ when the same run is made with 1, 2 and all threads: SmolLM2-135M, density 0.5.

Writes results/threads.json, and the table into docs/prune.md between its markers. The bar is a share of 1e-4.
"""

import json
import os
from pathlib import Path

import torch

from maskwright.core.cache import write_atomic
from maskwright.core.maskset import MaskSet
from maskwright.core.method import get
from maskwright.lab.record import machine, results_dir, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import windows
from maskwright.models.load import files_hash, find, load
from maskwright.report.pages import between

RUNS = [("wanda", "unstructured"), ("wanda", "2:4"), ("sparsegpt", "unstructured"), ("sparsegpt", "2:4")]
RUNS += [("dsnot", "unstructured"), ("magnitude", "unstructured")]
BAR = 1e-4


def masks(method: str, pattern: str, threads: int) -> MaskSet:
    torch.set_num_threads(threads)
    model, tokenizer = load(find("default"))
    batches = windows(tokenizer, topics_split()[0], 8, 512, seed=0)
    return get(method)(density=0.5, pattern=pattern).prune(model, batches, seed=0)


def main() -> None:
    counts = sorted({1, 2, os.cpu_count() or 2})
    shares = {}
    for method, pattern in RUNS:
        first, *others = (masks(method, pattern, threads) for threads in counts)
        differ = max(sum(int((first[n].keep != other[n].keep).sum()) for n in first) for other in others)
        shares[f"{method} {pattern}"] = {"differ": differ, "total": first.total, "share": differ / first.total}
        print(method, pattern, shares[f"{method} {pattern}"], flush=True)
    told = {
        "model": files_hash(find("default")), "texts": [text_hash(text) for text in topics_split()], "seed": 0,
        "calibration": "8 x 512", "threads": counts, "bar": BAR, "runs": shares, "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    write_atomic(results_dir() / "threads.json", (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
    rows = [f"| {' and '.join(map(str, counts))} threads | entries that differ | of | share |", "| --- | --- | --- | --- |"]
    for run, r in shares.items():
        share = f"{r['share']:.1e}" if r["differ"] else "0"
        rows.append(f"| {run} | {r['differ']:,} | {r['total']:,} | {share} |")
    page = Path(__file__).parent.parent / "docs/prune.md"
    page.write_text(between(page.read_text(), "\n".join(rows), "<!-- threads:begin -->", "<!-- threads:end -->"))


if __name__ == "__main__":
    main()
