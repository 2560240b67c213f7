"""Wanda on the packaged model against one plain forward over the same calibration tokens, interleaved. Run alone.

Memory: the peak above that after loading, against 500 MiB + the hidden states (a block's activations come on top)."""

import json
import resource
import statistics
import time
from pathlib import Path

import torch

from maskwright.lab.text import topics_split
from maskwright.models.evaluate import windows
from maskwright.models.load import find, load
from maskwright.weights.wanda import Wanda


def main() -> None:
    model, tokenizer = load(find("default"))
    batches = windows(tokenizer, topics_split()[0], 8, 512, seed=0)
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()  # the file is mapped: every page is read before memory is noted
    loaded = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Wanda(density=0.5).masks(model, batches)  # alone, for its peak: the plain forward holds logits
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plain, ours = [], []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        middle = time.perf_counter()
        Wanda(density=0.5).masks(model, batches)
        plain.append(middle - start)
        ours.append(time.perf_counter() - middle)
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    figures = {
        "plain_s": statistics.median(plain), "wanda_s": statistics.median(ours), "ratio": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios), "bar": 2.5,
        "peak_above_loading_mib": (peak - loaded) >> 20,
        "memory_bar_mib": 500 + (8 * 512 * model.config.hidden_size * 4 >> 20),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
