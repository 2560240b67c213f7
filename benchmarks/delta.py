"""A sparse delta of SmolLM2-135M: its size beside the checkpoint's, the time to add it beside the time to load the model.

    python benchmarks/delta.py

The delta is real: three AdamW steps on the Python help topics, of which the 2% of entries that moved most are kept, in
bf16. Loading and adding take turns in one process, files in the page cache. The weights are as `load` leaves them, mapped
from their file, so that adding has to give every page it changes memory of its own; then the same with weights that were
copied into memory of their own before. Writes results/delta.json.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from maskwright.cli.delta import make
from maskwright.kernels import scatter
from maskwright.lab.record import machine, results_dir, to_json, versions
from maskwright.lab.text import topics_split
from maskwright.models.evaluate import windows
from maskwright.models.load import Source, find, load, read_in
from maskwright.updates import Deltas, add

DENSITY, ROUNDS = 0.02, 9


def tuned_delta(folder: Path, file: Path) -> int:
    """Write base (bf16) and delta; gives the entries of the model."""
    model, tokenizer = load(find("default"))  # float32: bf16 steps take minutes where the CPU has no bf16 units
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _save(model, folder)
    for ids in windows(tokenizer, topics_split()[0], 3, 256):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    _save(model, tuned := folder.with_name("tuned"))
    make(tuned, folder, file, density=DENSITY, dtype="bfloat16", full=None)
    return sum(weight.numel() for weight in model.parameters())


def _save(model: torch.nn.Module, folder: Path) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]


def rounds(folder: Path, file: Path, own: bool) -> dict[str, object]:
    """Seconds to load the model, and to read, check and add the delta. own: to weights copied out of their mapped file."""
    loads, adds, parts = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        model, _ = load(Source(folder, "base", str(folder)), torch.bfloat16)
        read_in(model)
        loads.append(time.perf_counter() - start)
        if own:
            for weight in model.parameters():
                weight.data = weight.data.clone()
        start = time.perf_counter()
        deltas = Deltas.load(file)
        parts.append(time.perf_counter() - start)
        add(model, deltas)
        adds.append(time.perf_counter() - start)
    return {
        "load_seconds": statistics.median(loads), "load_spread": [min(loads), max(loads)],
        "add_seconds": statistics.median(adds), "add_spread": [min(adds), max(adds)],
        "of_it_reading_the_file": statistics.median(parts),
        "add_over_load": statistics.median(adds) / statistics.median(loads),
    }  # fmt: skip


def main() -> None:
    scatter.load()  # built once, not while the clock runs
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "model", Path(scratch) / "delta.safetensors"
        total = tuned_delta(folder, file)
        entries = Deltas.load(file).count
        size, dense = file.stat().st_size, sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        told = {
            "what": "SmolLM2-135M in bf16; the delta's own file is read within the time to add it, and its base is checked",
            "parameters": total, "entries": entries, "density": entries / total,
            "delta_bytes": size, "checkpoint_bytes": dense, "share_of_bytes": size / dense,
            **rounds(folder, file, own=False),
            "weights_in_own_memory": rounds(folder, file, own=True),
            "machine": machine(), "versions": versions(),
        }  # fmt: skip
    (results_dir() / "delta.json").write_text(to_json(told) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
