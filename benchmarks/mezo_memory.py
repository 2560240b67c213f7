"""Peak memory of Sparse MeZO on SmolLM2-135M against plain inference on the same batch, each in a fresh process.

A process loads the model (float32), reads its weights in, and then either computes the loss of a batch (three times, no
gradients) or takes three steps of Sparse MeZO on it. Peak: the most memory resident at any time of the process
(VmHWM), imports and loading included; above loading: the same less what was resident just after loading.
Writes results/mezo_memory.json. Bar: peak at most 1.1 x inference. `--only NAME` prints one process's figures.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

BAR = 1.1
SHAPES = ((1, 32), (4, 128))  # rows x tokens: the smaller the batch, the harder the bar
RUNS = {
    "inference": None,
    "mezo, dense": {"mask": "dense"},
    "sparse mezo, mask of the start at 1 bit": {},
    "sparse mezo, mask made anew each step": {"refresh": "step"},
    "sparse mezo, random mask drawn each step": {"mask": "random", "refresh": "step"},
    "sparse mezo, all tensors masked, largest": {"mask": "large", "vectors": "masked"},
    "sparse mezo with a snapshot (exact way back)": {"snapshot": True},
}
BARRED = [name for name in RUNS if name.startswith(("mezo", "sparse")) and "snapshot" not in name]


def peak() -> int:
    """The most memory of this process so far. Not ru_maxrss, which begins at the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise SystemExit("this system does not tell a process's peak memory")
    return int(found[1]) * 1024


def one(name: str, rows: int, tokens: int) -> dict[str, float]:
    import torch

    from maskwright.lab.record import resident_bytes
    from maskwright.lab.text import topics_split
    from maskwright.models.evaluate import windows
    from maskwright.models.load import find, load, read_in
    from maskwright.updates.sparse_mezo import SparseMezo

    model, tokenizer = load(find("default"))
    batch = torch.cat(windows(tokenizer, topics_split()[0], rows, tokens, seed=0))
    read_in(model)
    loaded = resident_bytes()

    def loss() -> torch.Tensor:
        return model(batch, labels=batch, use_cache=False).loss

    losses = []
    settings = RUNS[name]
    if settings is None:
        with torch.no_grad():
            losses = [float(loss()) for _ in range(3)]
    else:
        with SparseMezo(lr=1e-7, **settings).attach(model) as run:
            losses = [run.step(loss).loss for _ in range(3)]
    return {"peak_bytes": peak(), "loaded_bytes": loaded, "above_loading_bytes": peak() - loaded, "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPES[0], metavar=("ROWS", "TOKENS"))
    told = parser.parse_args()
    if told.only:
        print(json.dumps(one(told.only, *told.shape)))
        return
    from maskwright.core.cache import write_atomic
    from maskwright.lab.record import machine, results_dir, to_json, versions

    found = {}
    for shape in SHAPES:
        runs = {}
        for name in RUNS:
            command = [sys.executable, __file__, "--only", name, "--shape", *map(str, shape)]
            runs[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            runs[name]["ratio"] = runs[name]["peak_bytes"] / runs["inference"]["peak_bytes"]
            print(
                f"{shape[0]} x {shape[1]} {name}: {runs[name]['peak_bytes'] >> 20} MiB, {runs[name]['ratio']:.3f}",
                flush=True,
            )
        found[f"{shape[0]} x {shape[1]} tokens"] = runs
    worst = max(runs[name]["ratio"] for runs in found.values() for name in BARRED)
    result = {"bar": BAR, "worst_ratio": worst, "holds": worst <= BAR, "runs": found, "model": "SmolLM2-135M, float32"}
    result |= {"versions": versions(), "machine": machine()}
    write_atomic(results_dir() / "mezo_memory.json", (to_json(result) + "\n").encode())
    print(f"worst of those under the bar: {worst:.3f} (bar {BAR})")


if __name__ == "__main__":
    main()
