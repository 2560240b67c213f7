"""What active-only layers cost beside the dense net, in one run turn by turn. Run it with nothing else running.

A ResNet-18 and a ConvNeXt of about its compute (transformers' classes, fresh weights) on images of 224 x 224, patches of 32,
60% and 75% hidden; a forward pass without gradients in eval mode, and a training step (forward and backward). Entering and
leaving the context is part of the time. Prints a table; writes results/active.json, or into the folder of --out.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

from maskwright.core.cache import write_atomic
from maskwright.core.select import generator
from maskwright.inputs import Exact
from maskwright.inputs.active import active
from maskwright.lab.record import machine, results_dir, versions

SIZE, PATCH, BATCH, TURNS, THREADS = 224, 32, 4, 9, 2
SHARES = (0.4, 0.25)


def nets():
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    convnext = ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 6, 2])
    return {"ResNet-18": ResNetModel(resnet), "ConvNeXt": ConvNextModel(convnext)}


def once(net, images, train):
    net.train(train)
    with torch.set_grad_enabled(train):
        out = net(images).last_hidden_state
    if train:
        net.zero_grad()
        out.square().mean().backward()


def seconds(net, images, train, mask=None):
    start = time.perf_counter()
    if mask is None:
        once(net, images, train)
    else:
        with active(net, mask):
            once(net, images, train)
    return time.perf_counter() - start


def compare(net, images, train, turns):
    """Medians of the dense seconds and of each turn's ratio active : dense, with quartiles, by share kept."""
    grid = (len(images), SIZE // PATCH, SIZE // PATCH)
    masks = {share: Exact(share)(grid, rng=generator(0, f"{share}")) for share in SHARES}
    dense, ratios = [], {share: [] for share in SHARES}
    for turn in range(turns + 1):
        base = seconds(net, images, train)
        found = {share: seconds(net, images, train, mask) for share, mask in masks.items()}
        if turn:  # the first one warms up
            dense.append(base)
            for share, took in found.items():
                ratios[share].append(took / base)
    told = {"dense_seconds": statistics.median(dense)}
    for share, each in ratios.items():
        low, middle, high = statistics.quantiles(each, n=4)
        told[f"kept_{share}"] = {"ratio": middle, "quartiles": [low, high], "kept": masks[share].density}
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--turns", type=int, default=TURNS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator(0, "images"))
    cases = {}
    print(f"| net | pass | dense ms | {' | '.join(f'{1 - share:.0%} hidden' for share in SHARES)} |")
    print(f"| --- | --- | --- |{' --- |' * len(SHARES)}")
    for name, net in nets().items():
        for kind, train in (("forward", False), ("training step", True)):
            told = compare(net, images, train, given.turns)
            cases[f"{name}, {kind}"] = told
            each = " | ".join(f"{told[f'kept_{share}']['ratio']:.2f} x" for share in SHARES)
            print(f"| {name} | {kind} | {1000 * told['dense_seconds']:.0f} | {each} |", flush=True)
    result = {
        "about": "active-only layers beside the dense net: seconds, and their ratio (under 1: active-only is faster)",
        "images": [BATCH, 3, SIZE, SIZE], "patch": PATCH, "turns": given.turns, "threads": THREADS, "cases": cases,
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    path = (given.out or results_dir()) / "active.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
