"""The native attention kernels: every dtype, width and list against float64, gradients, matrix-tile packing, threads."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.kernels.block_attention import Pieces, block_attention, cpu
from maskwright.kernels.block_attention.reference import allowed, block_attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-52}
FREE = {torch.float32: 2, torch.bfloat16: 2, torch.float64: 16}  # roundings on top: float64 sums one after another
LENGTHS = (1, 127, 128, 129)
INF = float("inf")


@pytest.fixture(scope="module", autouse=True)
def native():
    """Skips where the native kernels do not run, naming the reason."""
    if (reason := cpu.available()) is not None:
        pytest.skip(f"no native kernels: {reason}")


def heads(batch, count, length, width, dtype, seed, turned=False):
    """Random rows (batch, heads, length, width), as they lie or as a transposed view of (batch, length, heads, width)."""
    rng = torch.Generator().manual_seed(seed)
    made = torch.randn(batch, length, count, width, generator=rng, dtype=torch.float64).to(dtype).transpose(1, 2)
    return made if turned else made.contiguous()


def qkv(batch, groups, kv_heads, queries, keys, width, dtype, seed=0, turned=False):
    sizes = ((groups * kv_heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [heads(batch, n, length, width, dtype, seed + i, turned) for i, (n, length) in enumerate(sizes)]


def some_bounds(batch, count, queries, keys, seed):
    """Random pairs of intervals, some of them empty."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, keys + 1, (batch, count, queries, 4), generator=rng).sort(-1).values.int().unflatten(-1, (2, 2))


def causal(queries, keys, window=None):
    stop = torch.arange(queries) + keys - queries + 1
    out = torch.zeros(1, 1, queries, 2, 2, dtype=torch.int32)
    out[..., 0, 1] = stop.clamp(0, keys)
    out[..., 0, 0] = 0 if window is None else (stop - window).clamp(0, keys)
    return out


def some_pieces(batch, count, queries, keys, rows, share, seed, run=1):
    """Random lists of keys in runs of at least `run`."""
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, count, -(-queries // rows), -(-keys // run), generator=rng) < share
    return Pieces.from_keep(keep.repeat_interleave(run, -1)[..., :keys].contiguous(), rows, queries)


def in_torch(q, k, v, bounds, pieces, positions, bias, scale):
    """Dense attention in the dtype of q by plain torch operations: what the errors are compared with."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(share, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    keep = allowed(q.shape[2], k.shape[2], bounds, pieces, positions, q.shape[1])
    if keep.shape[1] > 1:
        keep = keep.repeat_interleave(q.shape[1] // keep.shape[1], 1)
    scores = scores.masked_fill(~keep, -INF)
    empty = (scores == -INF).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v


def wide(told):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in told]


def judge(told, impl="", result=None):
    """The error rule: against float64, at most twice the error of torch's dense attention in the same dtype."""
    q = told[0]
    out, lse = cpu.block_attention_cpu(*told, impl) if result is None else result
    true, true_lse = block_attention_reference(*wide(told))
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert torch.equal(lse == -INF, true_lse == -INF)
    assert (out[lse == -INF] == 0).all()
    eps, size = EPS[q.dtype], float(true.abs().max()) if true.numel() else 0.0
    bar = 2 * float((in_torch(*told).double() - true).abs().max()) + FREE[q.dtype] * eps * size if true.numel() else 0.0
    assert float((out.double() - true).abs().max() if true.numel() else 0.0) <= bar
    fine = torch.isfinite(true_lse)
    scores = float(true_lse[fine].abs().max()) + q.shape[-1] ** 0.5 if fine.any() else 0.0
    near = 16 * (EPS[torch.float64] if q.dtype == torch.float64 else EPS[torch.float32]) * scores
    assert (lse.double() - true_lse)[fine].abs().max() <= near if fine.any() else True
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
def test_every_width_with_and_without_lists(dtype, width):
    q, k, v = qkv(1, 2, 1, 70, 150, width, dtype)
    scale = width**-0.5
    judge((q, k, v, None, None, None, None, scale))
    judge((q, k, v, causal(70, 150), some_pieces(1, 1, 70, 150, 32, 0.4, 1), None, None, scale))
    judge((q[:, :, :1], k, v, None, some_pieces(1, 1, 1, 150, 1, 0.3, 2, 16), None, None, scale))


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product(LENGTHS, LENGTHS)))
def test_lengths_around_the_tiles(queries, keys):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(1, 1, 2, queries, keys, 32, dtype)
        judge((q, k, v, None, None, None, None, 0.2))
        judge((q, k, v, causal(queries, keys, 40), None, None, None, 0.2))
        judge((q, k, v, None, some_pieces(1, 2, queries, keys, 64, 0.5, 3), None, None, 0.2))


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128, 200])
@pytest.mark.parametrize("lists", [1, 2, 6])
def test_ragged_groups_and_lists_a_head_or_shared(rows, lists):
    q, k, v = qkv(2, 3, 2, 200, 230, 64, torch.float32, turned=True)
    for run, share in ((1, 0.1), (16, 0.5)):
        judge((q, k, v, causal(200, 230), some_pieces(2, lists, 200, 230, rows, share, 4, run), None, None, 0.125))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2), group=st.integers(1, 4), kv_heads=st.integers(1, 3), queries=st.integers(1, 70),
    keys=st.integers(1, 140), width=st.sampled_from([8, 33, 40, 64]), dtype=st.sampled_from(DTYPES), turned=st.booleans(),
    rows=st.sampled_from([0, 1, 5, 16, 64]), by=st.sampled_from(["one", "kv", "head"]),
    share=st.sampled_from([0.0, 0.1, 0.6]), bounded=st.booleans(), placed=st.booleans(),
    biased=st.lists(st.booleans(), min_size=4, max_size=4), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_case_is_as_near_to_float64_as_dense_torch(
    batch, group, kv_heads, queries, keys, width, dtype, turned, rows, by, share, bounded, placed, biased, bias, seed
):  # fmt: skip
    q, k, v = qkv(batch, group, kv_heads, queries, keys, width, dtype, seed, turned)
    count = {"one": 1, "kv": kv_heads, "head": group * kv_heads}[by]
    pieces = some_pieces(batch, count, queries, keys, rows, share, seed) if rows else None
    bounds = some_bounds(1 + (batch - 1) * (seed % 2), 1, queries, keys, seed) if bounded else None
    rng = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, keys + 1, (keys,), generator=rng).int() if placed else None
    added = None
    if bias:
        sizes = [n if full else 1 for n, full in zip((batch, group * kv_heads, queries, keys), biased, strict=True)]
        added = torch.randn(sizes, generator=rng).masked_fill(torch.rand(sizes, generator=rng) < 0.2, -INF).to(dtype)
    judge((q, k, v, bounds, pieces, positions, added, width**-0.5))


def test_rows_without_keys_give_zeros_whatever_took_the_keys():
    q, k, v = qkv(1, 1, 1, 20, 40, 32, torch.float32)
    bounds = causal(20, 40)
    bounds[:, :, 3:7] = 0
    none = Pieces.from_keep(torch.zeros(1, 1, 2, 40, dtype=torch.bool), 16, 20)
    dropped = torch.zeros(1, 1, 20, 40).masked_fill(torch.arange(20)[:, None] < 5, -INF)
    for case in ((bounds, None, None, None), (None, none, None, None), (None, None, None, dropped)):
        _, lse = judge((q, k, v, *case, 0.2))
        assert (lse == -INF).any()
    for case in ((bounds, None, None, None), (None, none, None, None), (None, None, None, dropped)):
        told = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = cpu.block_attention_cpu(*told, *case, 0.2)
        grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -INF, 0).sum(), told)
        assert all(torch.isfinite(g).all() for g in grads)


def test_no_queries_and_no_keys():
    q, k, v = qkv(1, 2, 1, 3, 0, 32, torch.float32)
    out, lse = cpu.block_attention_cpu(q, k, v, None, None, None, None, 0.2)
    assert (out == 0).all()
    assert (lse == -INF).all()
    out, lse = cpu.block_attention_cpu(q[:, :, :0], k, v, None, None, None, None, 0.2)
    assert out.shape == (1, 2, 0, 32)
    assert lse.shape == (1, 2, 0)


def test_large_logits_and_large_negative_biases_stay_finite():
    q, k, v = qkv(1, 1, 1, 20, 40, 64, torch.float32)
    judge((q * 30, k * 30, v, None, None, None, None, 1.0))
    lowest = torch.zeros(1, 1, 20, 40)
    lowest[:, :, :, ::2] = torch.finfo(torch.float32).min
    judge((q, k, v, None, None, None, lowest, 0.2))


def test_not_a_number_is_not_hidden():
    q, k, v = qkv(1, 1, 1, 20, 40, 32, torch.float32)
    for at in (0, 1, 2):
        told = [t.clone() for t in (q, k, v)]
        told[at][0, 0, 5, 3] = float("nan")
        for part in (slice(None), slice(5, 6)):  # tiles and the path of few rows
            out, _ = cpu.block_attention_cpu(told[0][:, :, part], *told[1:], None, None, None, None, 0.2)
            assert out.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lists", [1, 2, 6])
def test_decoding_reads_pages_of_a_cache(dtype, lists):
    q, k, v = qkv(2, 3, 2, 1, 3000, 64, dtype)
    judge((q, k, v, None, some_pieces(2, lists, 1, 3000, 1, 0.5, 1, 16), None, None, 0.125))
    judge((q, k, v, None, None, None, None, 0.125))
    judge((q, k, v, causal(1, 3000, 700), None, None, torch.randn(1, 6, 1, 3000).to(dtype), 0.125))


def test_inputs_need_not_be_contiguous():
    q, k, v = qkv(2, 2, 2, 40, 50, 64, torch.float32)
    told = (None, causal(40, 50), some_pieces(1, 2, 40, 50, 16, 0.5, 1))
    want = cpu.block_attention_cpu(q, k, v, told[1], told[2], None, None, 0.125)
    views = [
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [torch.cat([t, t], -1)[..., :64] for t in (q, k, v)],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)],
        [q, *(torch.cat([t, t], 2)[:, :, :50] for t in (k, v))],
    ]
    for view in views:
        got = cpu.block_attention_cpu(*view, told[1], told[2], None, None, 0.125)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    same = k[:1].expand(2, -1, -1, -1)
    judge((q, same, same, None, None, None, None, 0.125))


def loss_of(run, told, weights, dtype, with_bias):
    """Gradients of a weighted sum of out and lse, in the order q, k, v, bias."""
    own = [t.detach().to(dtype).requires_grad_() for t in told[:3]]
    bias = None if told[6] is None else told[6].detach().to(dtype).requires_grad_(with_bias)
    out, lse = run(*own, *told[3:6], bias, told[7])
    fine = torch.isfinite(lse)
    loss = (out.double() * weights[0]).sum() + (lse.double().masked_fill(~fine, 0) * weights[1]).sum()
    return torch.autograd.grad(loss, [*own, bias] if with_bias else own)


def dense(q, k, v, bounds, pieces, positions, bias, scale):
    """In the dtype of q throughout, out and lse: what gradients are compared with."""
    out = in_torch(q, k, v, bounds, pieces, positions, bias, scale)
    _, lse = block_attention_reference(q, k, v, bounds, pieces, positions, bias, scale)
    return out, lse


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), group=st.integers(1, 3), kv_heads=st.integers(1, 2), queries=st.integers(1, 70),
    keys=st.integers(2, 140), width=st.sampled_from([33, 48, 64]), dtype=st.sampled_from(DTYPES), turned=st.booleans(),
    rows=st.sampled_from([0, 1, 16, 64]), per_head=st.booleans(), bounded=st.booleans(), placed=st.booleans(),
    biased=st.lists(st.booleans(), min_size=4, max_size=4), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_any_case(
    batch, group, kv_heads, queries, keys, width, dtype, turned, rows, per_head, bounded, placed, biased, bias, seed
):  # fmt: skip
    q, k, v = qkv(batch, group, kv_heads, queries, keys, width, dtype, seed, turned)
    pieces = some_pieces(1, group * kv_heads if per_head else 1, queries, keys, rows, 0.4, seed) if rows else None
    bounds = some_bounds(1, 1, queries, keys, seed) if bounded else None
    rng = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, keys + 1, (keys,), generator=rng).int() if placed else None
    added = None
    if bias:
        sizes = [n if full else 1 for n, full in zip((batch, group * kv_heads, queries, keys), biased, strict=True)]
        added = torch.randn(sizes, generator=rng).masked_fill(torch.rand(sizes, generator=rng) < 0.1, -INF).to(dtype)
    told = (q, k, v, bounds, pieces, positions, added, width**-0.5)
    weights = [torch.randn(q.shape, generator=rng).to(dtype).double(), torch.randn(q.shape[:3], generator=rng).double()]
    true = loss_of(block_attention_reference, wide(told), weights, torch.float64, bias)
    got = loss_of(cpu.block_attention_cpu, told, weights, dtype, bias)
    base = loss_of(dense, told, weights, dtype, bias)
    for name, t, g, b in zip("qkvb", true, got, base, strict=False):
        assert g.dtype == dtype
        # Rows of one key cancel exactly in one order of sums and not in another: a few roundings of the terms are free.
        terms = width**0.5 * max(1.0, float(t.abs().max())) * (queries**0.5 if name == "b" else 1)
        assert float((g.double() - t).abs().max()) <= 2 * float((b.double() - t).abs().max()) + 8 * EPS[dtype] * terms


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 5), (2, 2, 3, 5), (1, 1, 3, 5), (2, 1, 3, 1), (1, 2, 1, 1)], ids=str)
def test_gradcheck(rows, sizes):
    told = [t.requires_grad_() for t in qkv(2, 2, 1, 3, 5, 4, torch.float64)]
    rng = torch.Generator().manual_seed(0)
    bias = torch.randn(sizes, generator=rng, dtype=torch.float64).requires_grad_()
    pieces = some_pieces(1, 2, 3, 5, rows, 0.7, 1) if rows else None
    bounds = causal(3, 5)

    def run(q, k, v, bias):
        out, lse = cpu.block_attention_cpu(q, k, v, bounds, pieces, None, bias, 0.4)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(run, (*told, bias))


def test_opcheck():
    q, k, v = qkv(1, 2, 2, 20, 30, 16, torch.float32, turned=True)
    pieces = some_pieces(1, 2, 20, 30, 8, 0.5, 1)
    lists = (pieces.offsets, pieces.starts, pieces.stops, list(pieces.shape), pieces.rows)
    bias = torch.randn(1, 1, 1, 30)
    told = [t.detach().requires_grad_() for t in (q, k, v)]
    args = (*told, causal(20, 30), *lists, None, bias.clone().requires_grad_(), 0.25)
    torch.library.opcheck(torch.ops.maskwright.block_attention.default, args)
    some = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.maskwright.block_attention.default, (q, k, v, None, *lists, None, None, 0.25), test_utils=some
    )
    out, lse = torch.ops.maskwright.block_attention(q, k, v, causal(20, 30), *lists, None, bias, 0.25)
    for grad_lse, wanted in ((None, False), (torch.ones_like(lse), True)):
        args = (torch.ones_like(out), grad_lse, q, k, v, out, lse, causal(20, 30), *lists, None, bias, 0.25, wanted)
        torch.library.opcheck(torch.ops.maskwright.block_attention_backward.default, args, test_utils=some)


def test_compiles_in_one_graph():
    q, k, v = qkv(1, 2, 1, 20, 30, 16, torch.float32)
    bounds = causal(20, 30)

    def run(q, k, v):
        return cpu.block_attention_cpu(q * 1.0, k, v, bounds, None, None, None, 0.25)[0] + 1

    with torch.no_grad():
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(got, run(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_and_two_give_the_same_bits(dtype):
    q, k, v = qkv(1, 3, 1, 300, 330, 64, dtype)
    cases = [
        (q, k, v, causal(300, 330), some_pieces(1, 3, 300, 330, 64, 0.4, 1), None, torch.randn(1, 3, 1, 330), 0.125),
        (q[:, :, :1], k, v, None, None, None, None, 0.125),
    ]
    threads = torch.get_num_threads()
    try:
        for told in cases:
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                own = [t.detach().requires_grad_() for t in told[:3]]
                bias = None if told[6] is None else told[6].clone().requires_grad_()
                out, lse = cpu.block_attention_cpu(*own, *told[3:6], bias, told[7])
                grads = torch.autograd.grad(out.sum() + lse.sum(), own if bias is None else [*own, bias])
                results.append([out, lse, *grads])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize("lists", [0, 1, 6])
def test_matrix_tiles_read_what_is_packed_for_them(width, lists):
    """The path of chips with bfloat16 matrix tiles, its products in plain loops."""
    q, k, v = qkv(1, 3, 2, 90, 300, width, torch.bfloat16, turned=True)
    pieces = some_pieces(1, lists, 90, 300, 48, 0.4, 1) if lists else None
    for case in (
        (causal(90, 300), pieces, None, None),
        (some_bounds(1, 1, 90, 300, 2), pieces, None, torch.randn(1, 1, 90, 300).bfloat16()),
        (some_bounds(1, 1, 90, 300, 3), pieces, torch.arange(300).flip(0).int(), None),
    ):
        judge((q, k, v, *case, width**-0.5), "plain brgemm")
    judge((q, k[:, :, :1], v[:, :, :1], None, None, None, None, 0.2), "plain brgemm")


def test_other_instruction_sets_agree_where_they_run():
    flags = Path("/proc/cpuinfo").read_text()
    for name, dtype in (
        ("avx2", torch.float32),
        ("avx2", torch.bfloat16),
        ("avx512", torch.float32),
        ("avx512", torch.bfloat16),
    ):
        if name == "avx512" and "avx512vl" not in flags:
            continue
        q, k, v = qkv(1, 2, 1, 90, 100, 64, dtype)
        judge((q, k, v, causal(90, 100), some_pieces(1, 1, 90, 100, 32, 0.5, 1), None, None, 0.125), name)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(1, 1, 2, 5, 6, 32, torch.float32)
    run = torch.ops.maskwright.block_attention
    none = (None, None, None, [], 0, None, None)
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4], [2, 5])]
    with pytest.raises(RuntimeError, match="block_attention: q"):
        run(q, k[:, :, :, :16], v, None, *none, 0.1)
    with pytest.raises(RuntimeError, match="block_attention: q of"):
        run(q, k.double(), v, None, *none, 0.1)
    with pytest.raises(RuntimeError, match="bounds of"):
        run(q, k, v, causal(4, 6), *none, 0.1)
    with pytest.raises(RuntimeError, match="lists of keys"):
        run(q, k, v, None, torch.tensor([0, 2]), *ints, [1, 1, 2], 2, None, None, 0.1)
    for starts, stops, offsets in (
        ([0, 4], [2, 7], [0, 2]), ([0, 1], [2, 5], [0, 2]), ([-1, 4], [2, 5], [0, 2]), ([2, 4], [2, 5], [0, 2]),
        ([0, 4], [2, 5], [0, 1]),
    ):  # fmt: skip
        told = (torch.tensor(offsets), torch.tensor(starts).int(), torch.tensor(stops).int(), [1, 1, 1], 5)
        with pytest.raises(RuntimeError, match="block_attention"):
            run(q, k, v, None, *told, None, None, 0.1)
    with pytest.raises(RuntimeError, match="bias of"):
        run(q, k, v, None, *none[:-1], torch.zeros(1, 1, 2, 6), 0.1)
    with pytest.raises(RuntimeError, match="positions"):
        run(q, k, v, None, *none[:-2], torch.zeros(6), None, 0.1)
    with pytest.raises(RuntimeError, match="no instruction set"):
        run(q, k, v, None, *none, 0.1, "sse")
    assert "float16" in cpu.refuses(q.half())
    assert "wide" in cpu.refuses(torch.ones(1, 1, 2, 2048))
    assert cpu.refuses(q) is None
    with pytest.raises(BadInput, match="float16"):
        block_attention(q.half(), k.half(), v.half(), impl="cpu")


_OFF = """
import json, torch
from maskwright.kernels.block_attention import block_attention, choose, cpu
import maskwright.kernels.packed_linear
q = torch.ones(1, 1, 2, 32)
print(json.dumps([cpu.available(), choose(q).name, block_attention(q, q, q)[0].sum().item()]))
"""


def test_turned_off_it_says_why_and_another_runs():
    env = {**os.environ, "MASKWRIGHT_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", _OFF], capture_output=True, text=True, check=True, timeout=120, env=env)
    assert json.loads(done.stdout) == ["turned off by MASKWRIGHT_NATIVE=0", "gather", 64.0]


@pytest.mark.parametrize("order", [("packed_linear", "block_attention"), ("block_attention", "packed_linear")])
def test_both_libraries_load_in_either_order(order):
    code = "; ".join(f"import maskwright.kernels.{name}" for name in order)
    code += "; from maskwright.kernels.block_attention import cpu; from maskwright.kernels.packed_linear import engine"
    code += (
        "; cpu.available(); engine(); import torch; torch.ops.maskwright.block_attention; torch.ops.maskwright.packed_linear"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
