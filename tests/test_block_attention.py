"""The operation: every portable implementation against the dense oracle, forward and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention import Causal, KeyPlan, Padding, Pieces, Sink, Window, attend
from maskwright.core.errors import BadInput
from maskwright.kernels.block_attention import block_attention, choose, gather

STRUCTURES = {
    "none": lambda n: None,
    "causal": lambda n: Causal(),
    "window": lambda n: Causal() & (Window(5) | Sink(2)),
    "padded": lambda n: Causal() & Padding(torch.tensor([min(3, n - 1), 0]), torch.tensor([n, max(1, n - 5)])),
}


@st.composite
def problems(draw):
    """(q, k, v, plan) with grouped heads, ragged groups, empty lists, every shape of bias."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)]))
    queries, keys = draw(st.sampled_from([(1, 1), (1, 40), (17, 17), (33, 40), (40, 40)]))
    heads, batch = kv_heads * group, 2
    q, k, v = (
        torch.randn(batch, h, n, 8, generator=rng, dtype=torch.float64)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    pieces = None
    if draw(st.booleans()):
        rows, lists = draw(st.sampled_from([1, 4, 16, 64])), draw(st.sampled_from(sorted({1, kv_heads, heads})))
        share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        keep = torch.rand(draw(st.sampled_from([1, batch])), lists, -(-queries // rows), keys, generator=rng) < share
        pieces = Pieces.from_keep(keep, rows, queries)
    bias = None
    if draw(st.booleans()):
        full = (batch, heads, queries, keys)
        bias = torch.randn([n if draw(st.booleans()) else 1 for n in full], generator=rng, dtype=torch.float64)
        bias[..., 0] = -torch.inf if draw(st.booleans()) else bias[..., 0]
    structure = STRUCTURES[draw(st.sampled_from(sorted(STRUCTURES)))](keys)
    return q, k, v, KeyPlan(queries, keys, structure, pieces, bias)


def run(q, k, v, plan, impl):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    bias = None if plan.bias is None else plan.bias.clone().requires_grad_()
    told = KeyPlan(plan.queries, plan.keys, plan.structure, plan.pieces, bias)
    out, lse = attend(*leaves, told, impl=impl, return_lse=True)
    loss = (out * torch.arange(8)).sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, leaves if bias is None else [*leaves, bias])


@given(problems())
@settings(max_examples=150, deadline=None)
def test_gather_equals_the_oracle_with_gradients(problem):
    for one, two in zip(run(*problem, "gather"), run(*problem, "reference"), strict=True):
        torch.testing.assert_close(one, two)


@given(problems())
@settings(max_examples=30, deadline=None)
def test_flex_equals_the_oracle(problem):
    q, k, v, plan = problem
    if min(plan.queries, plan.keys) == 1:
        return
    with torch.no_grad():
        one = attend(q, k, v, plan, impl="flex", return_lse=True)
        two = attend(q, k, v, plan, impl="reference", return_lse=True)
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(one[1], two[1])


def test_gather_in_many_chunks_is_the_same(monkeypatch):
    q, k, v = (torch.randn(2, h, 70, 8, dtype=torch.float64) for h in (4, 2, 2))
    plan = KeyPlan(70, 70, Causal() & Window(20))
    whole = run(q, k, v, plan, "gather")
    monkeypatch.setattr(gather, "_ENTRIES", 2000)
    for one, two in zip(run(q, k, v, plan, "gather"), whole, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", ["reference", "gather"])
def test_gradcheck(impl):
    keep = torch.rand(1, 2, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[0, 0, 1] = False  # rows without a key
    pieces = Pieces.from_keep(keep, 3, 7)
    leaves = [torch.randn(1, h, n, 4, dtype=torch.float64).requires_grad_() for h, n in ((2, 7), (1, 9), (1, 9))]
    bias = torch.randn(1, 2, 1, 9, dtype=torch.float64).requires_grad_()

    def call(q, k, v, b):
        out, lse = attend(q, k, v, KeyPlan(7, 9, Causal(), pieces, b), impl=impl, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, [*leaves, bias])


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_error_within_twice_that_of_dense_attention(impl, dtype, length):
    rng = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, h, length, 32, generator=rng).to(dtype) for h in (4, 2, 2))
    exact = attend(q.double(), k.double(), v.double(), Causal(), impl="reference")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = attend(q, k, v, Causal(), impl=impl)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + 1e-7


def test_parts_merge_by_their_log_sum_exp():
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    whole = attend(q, k, v, Causal(), impl="gather")
    half = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    half[..., :4] = True
    parts = [
        attend(q, k, v, KeyPlan(9, 9, Causal(), Pieces.from_keep(keep, 9, 9)), impl="gather", return_lse=True)
        for keep in (half, ~half)
    ]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)  # rows 0-3 see nothing of the second half
    torch.testing.assert_close((weights[..., None] * torch.stack([out for out, _ in parts])).sum(0), whole)


def test_pooled_keys_weigh_as_many_as_they_stand_for():
    q, k, v = (torch.randn(1, h, 10, 8, dtype=torch.float64) for h in (2, 1, 1))
    k[:, :, 1::2], v[:, :, 1::2] = k[:, :, ::2], v[:, :, ::2]  # pairs of equal keys: their mean says the same
    keep = torch.zeros(1, 1, 1, 10 + 5 + 3, dtype=torch.bool)
    keep[..., 10:15] = True
    pooled = KeyPlan(10, 10, None, Pieces.from_keep(keep, 10, 10), levels=(2, 4))
    torch.testing.assert_close(attend(q, k, v, pooled, impl="gather"), attend(q, k, v, KeyPlan(10, 10), impl="reference"))
    causal = KeyPlan(10, 10, Causal(), Pieces.from_keep(keep, 10, 10), levels=(2, 4))
    out, lse = attend(q, k, v, causal, impl="gather", return_lse=True)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -torch.inf).all()  # its pair ends behind it
    torch.testing.assert_close(out, attend(q, k, v, causal, impl="reference"))


def test_row_scale_multiplies_the_output():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    scale = torch.rand(1, 2, 5, 1)
    plain = attend(q, k, v, Causal(), impl="gather")
    torch.testing.assert_close(attend(q, k, v, KeyPlan(5, 5, Causal(), row_scale=scale), impl="gather"), plain * scale)


def test_choice_says_why_and_an_explicit_one_never_falls_back(monkeypatch):
    from maskwright.kernels.block_attention import cpu

    q = torch.randn(1, 2, 4, 32)
    assert choose(q, "gather").name == "gather" and choose(q).name in ("cpu", "gather")
    monkeypatch.setattr(cpu, "available", lambda: "no compiler")
    assert choose(q).name == "gather" and choose(q).reason == "no compiler"
    with pytest.raises(BadInput, match="no compiler"):
        attend(q, q, q, Causal(), impl="cpu")
    with pytest.raises(BadInput, match="unknown implementation 'fast'"):
        attend(q, q, q, Causal(), impl="fast")
    with pytest.raises(BadInput, match="no backward on the CPU"):
        attend(q.clone().requires_grad_(), q, q, Causal(), impl="flex")


def test_bad_input_is_one_line_naming_the_shapes():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 9, 8)
    for change, told in (
        ({"k": k[..., :4], "v": k[..., :4]}, r"k \(1, 2, 9, 4\)"),
        ({"v": k[:, :, :8]}, r"v \(1, 2, 8, 8\)"),
        ({"k": k.double(), "v": k.double()}, "float64"),
        ({"q": q[:, :3]}, "3 query heads cannot share 2"),
        ({"bounds": torch.zeros(1, 1, 5, 2, 2, dtype=torch.int32)}, "bounds are int32"),
        ({"pieces": Pieces.from_keep(torch.ones(1, 1, 2, 9, dtype=torch.bool), 4, 7)}, "over 7 queries"),
        ({"pieces": Pieces.from_keep(torch.ones(1, 3, 1, 9, dtype=torch.bool), 6, 6)}, "1 x 3 lists"),
        ({"positions": torch.zeros(9)}, "positions are int32"),
        ({"bias": torch.zeros(1, 4, 6, 8)}, "a bias is float"),
    ):
        with pytest.raises(BadInput, match=told) as error:
            block_attention(**{"q": q, "k": k, "v": k, **change}, impl="gather")
        assert "\n" not in str(error.value)
