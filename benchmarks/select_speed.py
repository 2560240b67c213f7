"""Scoring and selecting 16.7 M weights against a full stable sort, interleaved, medians; same mask. Run alone."""

import json
import platform
import statistics
import time

import torch

from maskwright.core.pattern import Unstructured
from maskwright.core.select import select

N = 4096


def by_sort(score: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def main() -> None:
    weight = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    out = {"machine": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, pattern, shape, bar in (
        ("one group", Unstructured(), (N * N,), 4.0),
        ("per row", Unstructured((0,)), (N, N), 2.5),
    ):
        ours, theirs = [], []
        for _ in range(5):
            start = time.perf_counter()
            mask = select(weight.abs().reshape(shape), pattern, shape[-1] // 2)
            middle = time.perf_counter()
            sorted_mask = by_sort(weight.abs().reshape(shape), shape[-1] // 2)
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
            if not torch.equal(mask.keep, sorted_mask):
                raise SystemExit(f"{name}: the masks differ")
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        out[name] = {
            "select_s": statistics.median(ours), "sort_s": statistics.median(theirs), "ratio": statistics.median(ratios),
            "ratio_min": min(ratios), "ratio_max": max(ratios), "bar": bar,
        }  # fmt: skip
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
