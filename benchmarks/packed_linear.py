"""Packed linear layers against dense ones and against peers, on this machine. Run it with nothing else running.

Every case is interleaved in one run, on weights larger than the caches; medians, with the quartiles of the ratios turn
by turn. A ratio is the faster of two dense baselines of the same value dtype (torch's Linear, and the kernels' own dense
loop) over the packed layer. OpenVINO and scipy are measured where they can be imported. Writes
results/packed_linear.json, and the tables into docs/speed.md between their markers. Parts: layers peers whole small.
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from maskwright.core.cache import write_atomic
from maskwright.core.pattern import NM, Unstructured
from maskwright.core.select import select
from maskwright.kernels.packed_linear import PackedLinear, engine, index, linear, pack
from maskwright.lab.record import machine, results_dir, versions
from maskwright.models.evaluate import decode_times
from maskwright.report.pages import between
from maskwright.weights.accelerated import accelerate, rows
from maskwright.weights.speed import interleaved, median

SHAPES = ((4096, 11008), (11008, 4096))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
DENSITIES = (0.7, 0.5, 0.3, 0.1, 0.05)
BARS = {
    ("bfloat16", "0.5"): 1.5, ("bfloat16", "0.3"): 2.2, ("bfloat16", "0.1"): 4.5, ("bfloat16", "2:4"): 1.5,
    ("float32", "0.5"): 1.7, ("float32", "0.3"): 2.6, ("float32", "0.1"): 4.0,
    ("int8", "0.5"): 1.4, ("int8", "0.3"): 2.0,
}  # fmt: skip
TURNS = 15


def weight_of(shape, density, seed=0):
    """Random normal weights and their mask: 2:4, or a random share of every row."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=made)
    if density == "2:4":
        keep = select(weight.abs(), NM(2, 4)).keep
    else:
        keep = select(torch.rand(shape, generator=made), Unstructured((0,)), round(density * shape[1])).keep
    return weight * keep, keep


def summary(times, name, base):
    """Median milliseconds, and median and quartiles of base over this, turn by turn."""
    ratios = sorted(b / t for b, t in zip(times[base], times[name], strict=True))
    return {
        "ms": median(times[name]), "ratio": median(ratios), "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
    }  # fmt: skip


@torch.inference_mode()
def layer(shape, dtype, density, batch):
    """One case: forms by name, with the ratio over the faster same-dtype dense baseline."""
    weight, keep = weight_of(shape, density)
    kind = DTYPES[dtype]
    packed = pack(weight if kind == torch.int8 else weight.to(kind), keep, kind)
    x_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1)).to(x_dtype)
    calls = {"bitmask": partial(PackedLinear(packed), x)}
    if density != "2:4" and density <= 0.3:
        calls["indexed"] = partial(PackedLinear(index(packed)), x)
    if kind == torch.int8:
        dense = (weight / packed.scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        # torch's own linear on int8 rows with a scale, the one its weight-only quantization calls.
        calls["torch"] = partial(torch._weight_int8pack_mm, x, dense, packed.scale.bfloat16())
        calls["loop"] = partial(linear, x, dense, scale=packed.scale)
    else:
        dense = weight.to(kind)
        calls["torch"] = partial(F.linear, x, dense)
        calls["loop"] = partial(linear, x, dense)
    own = ("torch", "loop")
    for name in ("float32", "bfloat16"):
        if name != dtype:
            calls[f"torch {name}"] = partial(F.linear, x.to(DTYPES[name]), weight.to(DTYPES[name]))
    times = interleaved({name: [call] for name, call in calls.items()}, TURNS if batch == 1 else 7, flush=True)
    base = min(own, key=lambda name: median(times[name]))
    fastest = min((n for n in calls if n not in ("bitmask", "indexed")), key=lambda name: median(times[name]))
    form = min((n for n in ("bitmask", "indexed") if n in calls), key=lambda name: median(times[name]))
    bar = BARS.get((dtype, str(density))) if batch == 1 else (1.0 if batch == 8 else None)
    told = summary(times, form, base)
    return {
        "shape": list(shape), "values": dtype, "density": density, "batch": batch, "form": form, "base": base,
        "fastest_dense": fastest, "over_fastest": median(times[fastest]) / told["ms"], "bar": bar,
        "met": None if bar is None else told["ratio"] >= bar, "forms": {n: median(t) for n, t in times.items()},
        "bytes": packed.nbytes / (shape[0] * shape[1] * kind.itemsize), **told,
    }  # fmt: skip


def sparse_peers(weight, x):
    """Calls by peer name, all float32; the import or the layout may be missing."""
    row = x[0].contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr, bsr = weight.to_sparse_csr(), weight.to_sparse_bsr((4, 4))
    yield "torch CSR", partial(torch.mv, csr, row)
    column = row[:, None].contiguous()
    yield "torch BSR 4x4", partial(torch.mm, bsr, column)
    with contextlib.suppress(ImportError):
        from scipy.sparse import csr_matrix

        made, vector = csr_matrix(weight.numpy()), row.numpy()
        yield "scipy CSR", partial(made.__matmul__, vector)


def openvino(weight, row):
    """OpenVINO's int8 Linear with its sparse weight decompression on, or None without the package."""
    try:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as op
    except ImportError:
        return None
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = (weight / scale).round().to(torch.int8).numpy()
    given = op.parameter([1, weight.shape[1]], np.float32)
    low, high = np.float32(-4), np.float32(4)
    quant = op.fake_quantize(given, low, high, low, high, 256)
    dense = op.multiply(op.convert(op.constant(quantized), np.float32), op.constant(scale.numpy()))
    model = ov.Model([op.matmul(quant, dense, False, True)], [given])
    settings = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.05, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    data = row.numpy().copy()
    return partial(request.infer, {0: data})


@torch.inference_mode()
def peers():
    """Batch 1, 4096 x 11008: our float32 and int8 layers against sparse kernels of others."""
    out = []
    for density in (0.7, 0.5, 0.3, 0.1, 0.05):
        weight, keep = weight_of(SHAPES[0], density)
        x = torch.randn(1, SHAPES[0][1], generator=torch.Generator().manual_seed(1))
        calls = {"float32": partial(PackedLinear(pack(weight, keep)), x)}
        eight = pack(weight, keep, torch.int8)
        calls["int8"] = partial(PackedLinear(eight), x)
        if density <= 0.3:
            calls["float32 indexed"] = partial(PackedLinear(index(pack(weight, keep))), x)
            calls["int8 indexed"] = partial(PackedLinear(index(eight)), x)
        calls |= dict(sparse_peers(weight, x))
        if (run := openvino(weight, x)) is not None:
            calls["OpenVINO int8"] = run
        found = {name: median(t) for name, t in interleaved({n: [c] for n, c in calls.items()}, 7, flush=True).items()}
        ours = {kind: min(found[n] for n in found if n.startswith(kind)) for kind in ("float32", "int8")}
        over = {n: t / ours["int8" if "int8" in n else "float32"] for n, t in found.items() if n[0] in "tsO"}
        out.append({"density": density, "ms": found, "over": over, "ahead": min(over.values()) >= 1})
        print(out[-1], flush=True)
    return out


def llama():
    """A Llama of 1.1 B random bfloat16 weights, half of them 0 in the blocks; the head stays dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    made = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        path, _, attribute = name.rpartition(".")
        shape = parameter.shape
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=made) * 0.02
        if ".layers." in name and len(shape) == 2:
            value *= torch.rand(shape, generator=made) < 0.5
        module = model.get_submodule(path)
        setattr(module, attribute, torch.nn.Parameter(value.bfloat16(), requires_grad=False))
    return model.eval()


@torch.inference_mode()
def whole():
    """Tokens per second of the 1 B model: torch dense, packed throughout, and as `accelerate` chooses."""
    model = llama()
    ids = torch.arange(16)[None]
    dense = dict(model.named_modules())
    chosen = accelerate(model, remeasure=True)
    fast = {layer.name: model.get_submodule(layer.name) for layer in chosen.layers}
    forced = accelerate(model, force=True)
    packed = dict(fast) | {layer.name: model.get_submodule(layer.name) for layer in forced.layers}
    times = {"dense torch": [], "all packed": [], "fastest forms": []}
    for _ in range(5):
        for form, modules in (("dense torch", dense), ("all packed", packed), ("fastest forms", fast)):
            for name in packed:
                model.set_submodule(name, modules[name])
            times[form] += decode_times(model, ids, 6)
    parameters = sum(p.numel() for p in dense["lm_head"].parameters()) + dense["model.embed_tokens"].weight.numel()
    sizes = [(module.packed.nbytes, 2 * module.in_features * module.out_features) for module in packed.values()]
    held, full = (sum(part) for part in zip(*sizes, strict=True))
    return {
        **{form: {"tokens_per_second": 1 / median(t), **summary(times, form, "dense torch")} for form, t in times.items()},
        "bar": 1.45, "layers": rows(chosen), "told": str(chosen),
        "packed_bytes": held / full, "whole_bytes": (held + 2 * parameters) / (full + 2 * parameters),
    }  # fmt: skip


def small(folder):
    """`maskwright bench` of a pruned SmolLM2-135M, as `make run` writes it."""
    done = subprocess.run(
        [sys.executable, "-m", "maskwright.cli.main", "bench", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def tables(told):
    """The figures as Markdown, by marker."""
    out = {}
    if told.get("layers"):
        heads = "| values | density | shape | batch | packed ms | dense ms | ratio (quartiles) | bar | over any dense |"
        lines = [heads, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for r in told["layers"]:
            cells = [
                r["values"], r["density"], "{} x {}".format(*r["shape"]), r["batch"], f"{r['ms']:.2f} {r['form']}",
                f"{r['forms'][r['base']]:.2f} {r['base']}", f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
                "" if r["bar"] is None else f"{r['bar']} {'met' if r['met'] else 'missed'}",
                f"{r['over_fastest']:.2f} {r['fastest_dense']}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        out["layers"] = "\n".join(lines)
    if told.get("peers"):
        names = list(dict.fromkeys(name for r in told["peers"] for name in r["over"]))
        lines = ["| density | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for r in told["peers"]:
            lines.append(f"| {r['density']} | " + " | ".join(f"{r['over'].get(n, float('nan')):.2f}" for n in names) + " |")
        out["peers"] = "\n".join(lines)
    if told.get("whole"):
        w = told["whole"]
        lines = [
            "| 1.1 B Llama shape, density 0.5, bfloat16 | tokens/s | over dense torch (quartiles) |",
            "| --- | ---: | ---: |",
        ]
        for form in ("dense torch", "all packed", "fastest forms"):
            r = w[form]
            lines.append(f"| {form} | {r['tokens_per_second']:.2f} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |")
        lines += [
            "",
            f"Packed weights take {w['packed_bytes']:.3f} of the dense ones, the whole model {w['whole_bytes']:.3f}.",
        ]
        out["whole"] = "\n".join(lines)
    return out


def main() -> None:
    wanted = sys.argv[1:] or ["layers", "peers", "whole", "small"]
    path = results_dir() / "packed_linear.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    told |= {"machine": machine(), "versions": versions(), "engine": engine().__dict__, "seed": 0, "load": os.getloadavg()}
    if "layers" in wanted:
        told["layers"] = []
        for dtype in DTYPES:
            for density in (*DENSITIES, "2:4"):
                for shape in SHAPES:
                    for batch in (1, 8):
                        told["layers"].append(found := layer(shape, dtype, density, batch))
                        print({k: v for k, v in found.items() if k != "forms"}, flush=True)
    if "peers" in wanted:
        told["peers"] = peers()
    if "whole" in wanted:
        told["whole"] = whole()
        print({k: v for k, v in told["whole"].items() if k != "layers"}, flush=True)
    if "small" in wanted:
        folder = Path("out/smollm2-wanda-2of4")
        told["small"] = small(folder) if folder.is_dir() else None
    write_atomic(path, (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
    page = Path(__file__).parent.parent / "docs/speed.md"
    for name, table in tables(told).items():
        page.write_text(between(page.read_text(), table, f"<!-- {name}:begin -->", f"<!-- {name}:end -->"))


if __name__ == "__main__":
    main()
