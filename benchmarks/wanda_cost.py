"""Wanda on the packaged model against one plain forward over the same calibration tokens, interleaved. Run alone.

Memory: the peak above that after loading, against 500 MiB + the hidden states (a block's activations come on top)."""

import json
import statistics
import time

import torch

from maskwright.lab.record import peak_bytes, resident_bytes
from maskwright.lab.text import topics_split
from maskwright.models.evaluate import windows
from maskwright.models.load import find, load, read_in
from maskwright.weights.wanda import Wanda


def main() -> None:
    model, tokenizer = load(find("default"))
    batches = windows(tokenizer, topics_split()[0], 8, 512, seed=0)
    read_in(model)
    loaded = resident_bytes()
    Wanda(density=0.5).masks(model, batches)  # alone, for its peak: the plain forward holds logits
    peak = peak_bytes()
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
