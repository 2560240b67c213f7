"""Merging three bf16 checkpoints of 1.24 B parameters: against reading and writing the same files, and against mergekit.

    python benchmarks/merge.py                      # ours, and the floor
    MERGEKIT=/path/to/venv/bin python benchmarks/merge.py   # mergekit beside it (pip install mergekit in a venv of its own)

The checkpoints (base and three tuned ones, Llama 3.2 1B's shapes, two shards each) are made on the spot under --folder.
Every run is a process of its own, the contenders take turns, the page cache is warm. mergekit is run on four layers of them,
ours beside it: at full size it takes 12 to 17 GB, which drives the files out of the page cache. Values are compared on
one layer in float32, where no two differences of a tensor are equal. Writes results/merge.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maskwright.lab.record import machine, results_dir, to_json, versions
from maskwright.models.streams import FileTensors

LAYERS, WIDTH, HIDDEN, KV, VOCABULARY = 16, 2048, 8192, 512, 128256
METHODS = {
    "task_arithmetic": ["--method", "task_arithmetic", "--scale", "0.4"],
    "ties": ["--method", "ties", "--density", "0.2"],
    "dare": ["--method", "dare", "--density", "0.2", "--scale", "0.4"],
    "breadcrumbs": ["--method", "breadcrumbs", "--density", "0.2", "--drop-top", "0.01", "--scale", "0.4"],
    "ties, global": ["--method", "ties", "--density", "0.2", "--group", "global"],
}
THEIRS = {  # the same recipes in mergekit's words
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}, {"lambda": 0.4}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}, {"lambda": 1.0, "normalize": True}),
    "dare": ("dare_linear", {"weight": 1.0, "density": 0.2}, {"lambda": 0.4}),
    "breadcrumbs": ("breadcrumbs", {"weight": 1.0, "density": 0.2, "gamma": 0.01}, {"lambda": 0.4}),
}


class Size(NamedTuple):
    """How many layers, words, and in what dtype."""

    name: str
    layers: int = LAYERS
    vocabulary: int = VOCABULARY
    dtype: str = "bfloat16"


FULL, PEER, EXACT = Size("full"), Size("peer", 4, 32000), Size("exact", 1, 1000, "float32")


def shapes(size: Size = FULL) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size.vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i in range(size.layers):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = (WIDTH,)
        for name, rows in (("q", WIDTH), ("k", KV), ("v", KV), ("o", WIDTH)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, WIDTH)
        for name, shape in (("gate", (HIDDEN, WIDTH)), ("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            found[f"{at}mlp.{name}_proj.weight"] = shape
    return found


def make(folder: Path, size: Size) -> None:
    """base, m1, m2, m3: normal weights, and normal differences of 2% of their size. Kept if they are there."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": size.layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": size.vocabulary, "tie_word_embeddings": True, "torch_dtype": size.dtype,
    }  # fmt: skip
    names = list(shapes(size).items())
    parts = (names[: len(names) // 3], names[len(names) // 3 :])
    for number, name in enumerate(("base", "m1", "m2", "m3")):
        path = folder / name
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        where = {}
        for part, some in enumerate(parts):
            file = f"model-{part + 1:05d}-of-00002.safetensors"
            tensors = {}
            for key, shape in some:
                rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little"))
                value = torch.randn(shape, generator=rng) * 0.02
                if number:
                    value += torch.randn(shape, generator=rng.manual_seed(rng.initial_seed() + number)) * 0.0004
                tensors[key], where[key] = value.to(getattr(torch, size.dtype)), file
            save_file(tensors, path / file, metadata={"format": "pt"})
        index = {
            "metadata": {
                "total_size": torch.finfo(getattr(torch, size.dtype)).bits // 8 * sum(map(prod, shapes(size).values()))
            },
            "weight_map": where,
        }
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(config))


def floor(folder: Path, out: Path) -> float:
    """Read the four checkpoints in two threads and write one of them (to the page cache, as a merge does): seconds."""
    from concurrent.futures import ThreadPoolExecutor

    files = [file for name in ("base", "m1", "m2", "m3") for file in sorted((folder / name).glob("*.safetensors"))]
    out.mkdir()
    start = time.perf_counter()

    def read(file: Path) -> None:
        piece = bytearray(1 << 20)
        target = os.open(out / file.name, os.O_RDWR | os.O_CREAT) if file.parent.name == "base" else None
        handle = os.open(file, os.O_RDONLY)
        while got := os.readv(handle, [piece]):
            if target is not None:
                os.write(target, memoryview(piece)[:got])
        os.close(handle)
        if target is not None:
            os.close(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, files))
    return time.perf_counter() - start


def child(command: list[str], out: Path) -> tuple[float, int]:
    """(seconds, peak bytes) of one command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {told[-800:]}")
    return seconds, usage.ru_maxrss * 1024


def ours(folder: Path, out: Path, words: list[str]) -> dict[str, float]:
    models = [part for name in ("m1", "m2", "m3") for part in ("--model", str(folder / name))]
    command = [sys.executable, "-m", "maskwright.cli.main", "merge", "--base", str(folder / "base"), *models, *words]
    told = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=True)
    report = json.loads(told.stdout)
    return {"seconds": report["seconds"]["merge"], "peak": report["peak_bytes"]}


def theirs(folder: Path, out: Path, name: str) -> dict[str, float]:
    method, own, common = THEIRS[name]
    lines = [
        f"merge_method: {method}",
        f"base_model: {folder / 'base'}",
        "dtype: float32",
        f"out_dtype: {json.loads((folder / 'base' / 'config.json').read_text())['torch_dtype']}",
        "models:",
    ]
    for model in ("m1", "m2", "m3"):
        lines += [f"  - model: {folder / model}", "    parameters:", *(f"      {k}: {v}" for k, v in own.items())]
    lines += ["parameters:", *(f"  {key}: {str(value).lower()}" for key, value in common.items())]
    recipe = out.with_suffix(".yaml")
    recipe.write_text("\n".join(lines) + "\n")
    command = [
        str(Path(os.environ["MERGEKIT"]) / "mergekit-yaml"),
        str(recipe),
        str(out),
        "--copy-tokenizer",
        "--lazy-unpickle",
    ]
    seconds, peak = child(command, out)
    return {"seconds": seconds, "peak": peak}


def difference(one: Path, other: Path) -> dict[str, float]:
    """Share of entries that differ and the greatest difference, over all tensors."""
    a, b = FileTensors(one), FileTensors(other)
    unequal, most, total = 0, 0.0, 0
    for name in a.shapes():
        length = a.length(name)
        for start in range(0, length, 1 << 22):
            stop = min(start + (1 << 22), length)
            gap = (a.read(name, start, stop).float() - b.read(name, start, stop).float()).abs()
            unequal, most, total = unequal + int((gap > 0).sum()), max(most, float(gap.max())), total + stop - start
    return {"unequal": unequal / total, "most": most}


def _fresh(out: Path, inputs: Path) -> None:
    """Without an old result, the disk at rest, the inputs in the page cache."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in inputs.glob("*/*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def _summary(found: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in found]
    peak = max(run["peak"] for run in found)
    return {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "maskwright-merge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    given = parser.parse_args()
    full, small, exact = (given.folder / size.name for size in (FULL, PEER, EXACT))
    make(full, FULL)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    floors: list[float] = []
    out, peer = given.folder / "out", given.folder / "peer-out"
    for _ in range(given.rounds):
        for name in given.only:
            _fresh(out, full)
            floors.append(floor(full, given.folder / "copy"))
            _fresh(given.folder / "copy", full)
            runs[name].append(ours(full, out, METHODS[name]))
            print(name, f"floor {floors[-1]:.2f} s", runs[name][-1], flush=True)
    beside: dict[str, dict[str, Any]] = {}
    for name in [name for name in given.only if name in THEIRS] if "MERGEKIT" in os.environ else []:
        make(small, PEER)
        make(exact, EXACT)
        turns: dict[str, list[dict[str, float]]] = {"ours": [], "mergekit": []}
        for _ in range(given.rounds):
            _fresh(out, small)
            start = time.perf_counter()
            turns["ours"].append(ours(small, out, METHODS[name]))
            turns["ours"][-1]["seconds"] = time.perf_counter() - start  # mergekit, too, is timed as a whole command
            _fresh(peer, small)
            turns["mergekit"].append(theirs(small, peer, name))
        told = {who: _summary(found) for who, found in turns.items()}
        beside[name] = told | {"times": told["mergekit"]["seconds"] / told["ours"]["seconds"]}
        if name != "dare":  # its masks are random, and each tool has its own
            _fresh(out, exact)
            _fresh(peer, exact)
            ours(exact, out, METHODS[name])
            theirs(exact, peer, name)
            beside[name]["values"] = difference(out, peer)
        print(name, beside[name], flush=True)
    base = statistics.median(floors)
    methods = {name: _summary(found) for name, found in runs.items()}
    for found in methods.values():
        found["over_floor"] = found["seconds"] / base
    report: dict[str, Any] = {
        "what": "base and three tuned checkpoints, bf16, page cache warm",
        "parameters": sum(map(prod, shapes().values())),
        "floor": {"seconds": base, "spread": [min(floors), max(floors)]},
        "methods": methods,
        "mergekit_parameters": sum(map(prod, shapes(PEER).values())), "mergekit": beside,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    if set(given.only) == set(METHODS):
        (results_dir() / "merge.json").write_text(to_json(report) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
