"""Block attention on this machine, beside torch's dense attention and FlexAttention. Run it with nothing else running.

Every case is interleaved with its dense baseline in one run, 2 threads; medians, with quartiles of the ratios turn by
turn. "ideal" is the time of full dense attention times the share of 128 x 128 blocks that hold an allowed pair. The
compiled FlexAttention runs in a process of its own for each length and dtype, as it does not survive two of them.
Prints a table; writes results/attention_kernels.json, or into the folder of --out. Parts: forward flex backward
decode quest shapes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from maskwright.core.cache import write_atomic
from maskwright.kernels.block_attention import Pieces, block_attention, cpu
from maskwright.kernels.block_attention.pieces import Pieces as Lists
from maskwright.lab.record import machine, results_dir, versions

HEADS, WIDTH, BLOCK, WINDOW = 8, 64, 128, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (4096, 8192, 16384)
BARS = {"window": 1.2, "blocks": 1.2, "causal": 1.2, "flex": 1.8, "backward": 3.0, "decode": 0.25, "bounds": 0.03}
PARTS = ("forward", "flex", "backward", "decode", "quest", "shapes")


def rows_of(length, dtype, heads=HEADS, kv_heads=None, queries=None):
    """q, k, v of one batch entry, normal."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((heads, queries or length), (kv_heads or heads, length), (kv_heads or heads, length))
    return [torch.randn(1, n, t, WIDTH, generator=rng).to(dtype) for n, t in sizes]


def causal(length, window=None):
    """Bounds of causal attention, of at most `window` keys."""
    stop = torch.arange(1, length + 1, dtype=torch.int32)
    out = torch.zeros(1, 1, length, 2, 2, dtype=torch.int32)
    out[..., 0, 1] = stop
    if window is not None:
        out[..., 0, 0] = (stop - window).clamp(min=0)
    return out


def grid(length, heads=HEADS, share=0.125):
    """The share of the causal blocks, chosen at random a head, and the diagonal. (1, heads, n, n) bool."""
    n = -(-length // BLOCK)
    score = torch.rand(1, heads, n, n, generator=torch.Generator().manual_seed(1))
    score = score.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1)
    kept = score.flatten(2).topk(round(share * n * (n + 1) / 2), -1).indices
    return torch.zeros(1, heads, n * n, dtype=torch.bool).scatter_(2, kept, True).view(1, heads, n, n) | torch.eye(n).bool()


def masks(length):
    """name -> (bounds, pieces, share of the blocks of the whole square that are touched)."""
    n, keep = -(-length // BLOCK), grid(length)
    band = torch.ones(n, n).tril().triu(-((WINDOW - 2) // BLOCK + 1))
    lists = Pieces.from_blocks(keep, BLOCK, BLOCK, length, length)
    return {
        "window": (causal(length, WINDOW), None, float(band.mean())),
        "blocks": (causal(length), lists, float(keep.float().mean())),
        "causal": (causal(length), None, float(torch.ones(n, n).tril().mean())),
    }


def interleaved(calls, turns):
    """Seconds by name, the calls one after another in every turn, after one turn unmeasured."""
    times = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def median(values):
    return sorted(values)[len(values) // 2]


def beside(times, name, base, times_of_base=1.0):
    """Median milliseconds of both, and median and quartiles of this over the base, turn by turn."""
    ratios = sorted(t / (b * times_of_base) for t, b in zip(times[name], times[base], strict=True))
    return {
        "ms": 1e3 * median(times[name]), "base_ms": 1e3 * median(times[base]), "ratio": median(ratios),
        "low": ratios[len(ratios) // 4], "high": ratios[3 * len(ratios) // 4],
    }  # fmt: skip


def verdict(told, bar, below=True):
    return told | {"bar": bar, "met": told["ratio"] <= bar if below else told["ratio"] >= bar}


def turns_for(length):
    return {4096: 9, 8192: 5}.get(length, 3)


def forward():
    """Windows and blocks against the ideal share of dense time, causal against torch's causal; the gather path beside."""
    out = []
    for length in LENGTHS:
        for name, dtype in DTYPES.items():
            q, k, v = rows_of(length, dtype)
            calls = {
                "full": partial(F.scaled_dot_product_attention, q, k, v),
                "dense causal": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
            }
            made = masks(length)
            for mask, (bounds, pieces, _) in made.items():
                calls[mask] = partial(block_attention, q, k, v, bounds=bounds, pieces=pieces, impl="cpu")
            calls["building bounds"] = partial(structure_bounds, length)
            if length <= 8192:
                bounds, pieces, _ = made["blocks"]
                calls["gather"] = partial(block_attention, q, k, v, bounds=bounds, pieces=pieces, impl="gather")
            times = interleaved(calls, turns_for(length))
            for mask, (_, _, share) in made.items():
                base = ("dense causal", 1.0) if mask == "causal" else ("full", share)
                told = verdict(beside(times, mask, *base), BARS[mask])
                out.append({"what": mask, "length": length, "dtype": name, "against": base[0], "share": base[1], **told})
            told = verdict(beside(times, "building bounds", "window"), BARS["bounds"])
            out.append({"what": "building bounds", "length": length, "dtype": name, "against": "window", **told})
            if "gather" in times:
                told = beside(times, "gather", "full", made["blocks"][2])
                out.append({"what": "blocks by gather", "length": length, "dtype": name, "against": "full", **told})
            show(out[-5:] if "gather" in times else out[-4:])
    return out


def structure_bounds(length):
    from maskwright.attention.structure import Causal, Window

    return (Causal() & Window(WINDOW)).bounds(length, length, 0)


def flex_of(length, name):
    """In a process of its own: compiled FlexAttention and ours, interleaved, on the same masks."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    q, k, v = rows_of(length, DTYPES[name])
    made, keep = masks(length), grid(length)

    def window(b, h, i, j):
        return (i >= j) & (i - j < WINDOW)

    def order(b, h, i, j):
        return i >= j

    start = time.perf_counter()
    band = create_block_mask(window, None, None, length, length, device="cpu")
    building = time.perf_counter() - start
    counts = keep.sum(-1, dtype=torch.int32)
    found = torch.sort(keep.int(), dim=-1, descending=True, stable=True).indices.int()
    chosen = BlockMask.from_kv_blocks(counts, found, BLOCK_SIZE=BLOCK, mask_mod=order, seq_lengths=(length, length))
    out = []
    for mask, block_mask in (("window", band), ("blocks", chosen)):
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        bounds, pieces, _ = made[mask]
        calls = {
            "flex": partial(compiled, q, k, v, block_mask=block_mask),
            "ours": partial(block_attention, q, k, v, bounds=bounds, pieces=pieces, impl="cpu"),
        }
        with torch.no_grad():
            near = (calls["flex"]() - calls["ours"]()[0]).abs().max().item()
            told = verdict(beside(interleaved(calls, turns_for(length)), "flex", "ours"), BARS["flex"], below=False)
        out.append({"what": f"flex {mask}", "length": length, "dtype": name, "against": "ours", "difference": near, **told})
    out[0]["mask_ms"] = 1e3 * building
    return out


def flex():
    out = []
    for length in LENGTHS:
        for name in DTYPES:
            command = [sys.executable, __file__, "--flex", str(length), name]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1200)
            lines = done.stdout.strip().splitlines()
            failed = [{"what": "flex", "length": length, "dtype": name, "failed": done.stderr.strip()[-200:]}]
            out += json.loads(lines[-1]) if done.returncode == 0 and lines else failed
            show(out[-2:])
    return out


def backward():
    """Gradients of q, k and v against the forward pass, and of torch's dense causal beside."""
    out = []
    for length in LENGTHS[:2]:
        for name, dtype in DTYPES.items():
            told = [t.requires_grad_() for t in rows_of(length, dtype)]
            grad = torch.randn_like(told[0])
            for mask, (bounds, pieces, _) in masks(length).items():
                result = block_attention(*told, bounds=bounds, pieces=pieces, impl="cpu")[0]
                calls = {
                    "backward": partial(torch.autograd.grad, result, told, grad, retain_graph=True),
                    "forward": partial(block_attention, *told, bounds=bounds, pieces=pieces, impl="cpu"),
                }
                if mask == "causal":
                    dense = F.scaled_dot_product_attention(*told, is_causal=True)
                    calls["dense"] = partial(torch.autograd.grad, dense, told, grad, retain_graph=True)
                times = interleaved(calls, turns_for(length))
                row = verdict(beside(times, "backward", "forward"), BARS["backward"])
                if "dense" in times:
                    row["over_dense"] = beside(times, "backward", "dense")["ratio"]
                out.append({"what": f"backward {mask}", "length": length, "dtype": name, "against": "forward", **row})
            show(out[-3:])
    return out


def pages(lists, keys, kept=128, page=16):
    """`kept` pages of every list, at random, for one query."""
    rng = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(keys // page, generator=rng)[:kept].sort().values for _ in range(lists)])
    counts = torch.full((1, lists, 1), kept)
    return Lists.from_indices(order.view(1, lists, 1, kept), counts, page, 1, 1, keys)


def decode():
    """One query against a cache of 32k keys: 128 pages of 16 a head, and all of them, over torch's dense attention."""
    out, keys = [], 32768
    for name, dtype in DTYPES.items():
        for heads, kv_heads in ((HEADS, HEADS), (9, 3)):
            q, k, v = rows_of(keys, dtype, heads, kv_heads, queries=1)
            calls = {
                "dense": partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=heads != kv_heads),
                "pages": partial(block_attention, q, k, v, pieces=pages(heads, keys), impl="cpu"),
                "pages shared": partial(block_attention, q, k, v, pieces=pages(kv_heads, keys), impl="cpu"),
                "all keys": partial(block_attention, q, k, v, impl="cpu"),
            }
            with torch.no_grad():
                times = interleaved(calls, 31)
            for what in ("pages", "pages shared", "all keys"):
                told = beside(times, what, "dense")
                told = verdict(told, BARS["decode"]) if what != "all keys" else told
                out.append(
                    {"what": f"decode {heads}/{kv_heads} {what}", "length": keys, "dtype": name, "against": "dense", **told}
                )
            show(out[-3:])
    return out


def quest():
    """Whole decoded steps of Quest, its choice of pages included, on a cache that grows from 32k keys; over dense steps."""
    from maskwright.attention import AttentionSite, Causal, State, attend
    from maskwright.attention.quest import Quest

    out, keys, steps, kept = [], 32768, 48, 128
    for name, dtype in DTYPES.items():
        for heads, kv_heads in ((HEADS, HEADS), (9, 3)):
            q, k, v = rows_of(keys + steps + 2, dtype, heads, kv_heads, queries=1)
            method, state, seen = Quest(token_budget=kept * 16), State(), Causal()
            at = {"quest": keys, "dense": keys}

            def cached(who, at=at, k=k, v=v):
                at[who] += 1
                return k[:, :, : at[who]], v[:, :, : at[who]]

            def step(q=q, cached=cached, method=method, state=state, seen=seen):
                mine = cached("quest")
                site = AttentionSite(0, 1, q, *mine, WIDTH**-0.5, seen, mine[0].shape[2] - 1, begins=False)
                return attend(q, *mine, method.plan(site, state), impl="cpu")

            def dense(q=q, cached=cached, gqa=heads != kv_heads):
                return F.scaled_dot_product_attention(q, *cached("dense"), enable_gqa=gqa)

            with torch.inference_mode():
                times = interleaved({"quest": step, "dense": dense}, steps)
            told = verdict(beside(times, "quest", "dense"), BARS["decode"])
            what = f"quest step {heads}/{kv_heads}"
            out.append({"what": what, "length": keys, "dtype": name, "against": "dense", "kept": kept * 16 / keys, **told})
            show(out[-1:])
    return out


def shapes():
    """The shape of SmolLM2-135M, 9 heads on 3, at 8k."""
    out, length = [], 8192
    made = masks(length)
    for name, dtype in DTYPES.items():
        q, k, v = rows_of(length, dtype, 9, 3)
        calls = {
            "full": partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True),
            "dense causal": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
            "window": partial(block_attention, q, k, v, bounds=made["window"][0], impl="cpu"),
            "causal": partial(block_attention, q, k, v, bounds=made["causal"][0], impl="cpu"),
        }
        times = interleaved(calls, 5)
        for mask, base, share in (("window", "full", made["window"][2]), ("causal", "dense causal", 1.0)):
            told = verdict(beside(times, mask, base, share), BARS[mask])
            out.append(
                {"what": f"9/3 heads {mask}", "length": length, "dtype": name, "against": base, "share": share, **told}
            )
        show(out[-2:])
    return out


def show(rows):
    for r in rows:
        if "failed" in r:
            print(f"{r['what']:24} {r['length']:6} {r['dtype']:9} failed: {r['failed']}", flush=True)
            continue
        met = "" if "bar" not in r else f"bar {r['bar']:g} {'met' if r['met'] else 'MISSED'}"
        print(
            f"{r['what']:24} {r['length']:6} {r['dtype']:9} {r['ms']:9.3f} ms  against {r['against']:12} "
            f"{r['base_ms']:9.3f} ms  ratio {r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f}) {met}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=" ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--flex", nargs=2, metavar=("LENGTH", "DTYPE"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    torch.set_num_threads(2)
    if told.flex:
        print(json.dumps(flex_of(int(told.flex[0]), told.flex[1])))
        return
    if (reason := cpu.available()) is not None:
        sys.exit(f"no native kernels: {reason}")
    wanted = told.parts or PARTS
    if unknown := sorted(set(wanted) - set(PARTS)):
        sys.exit(f"no part {unknown[0]}; parts: {' '.join(PARTS)}")
    path = (told.out or results_dir()) / "attention_kernels.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found |= {
        "machine": machine(), "versions": versions(), "seed": 0, "threads": torch.get_num_threads(), "load": os.getloadavg(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    for part in wanted:
        found[part] = globals()[part]()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
