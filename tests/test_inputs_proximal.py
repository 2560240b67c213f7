"""Proximal operators against brute force, and the numbers of the sparse-coding sheet."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.pattern import NM, Block, Unstructured
from maskwright.inputs import L0, L1, Cel0, LHalf, Lq, Mcp, NonNegative, Scad, TopK, penalty
from maskwright.inputs.proximal import CATALOGUE

OPERATORS = {
    "l1": L1,
    "l0": L0,
    "cel0": Cel0,
    "cel0, norm 0.7": lambda lam: Cel0(lam, norm=0.7),
    "cel0, norm 2": lambda lam: Cel0(lam, norm=2.0),
    "l_half": LHalf,
    "l_two_thirds": Lq,
    "l_0.3": lambda lam: Lq(lam, q=0.3),
    "l_0.9": lambda lam: Lq(lam, q=0.9),
    "mcp": Mcp,
    "mcp, bend 1": lambda lam: Mcp(lam, bend=1.0),
    "scad": Scad,
    "scad, bend 2.1": lambda lam: Scad(lam, bend=2.1),
    "l1, x >= 0": lambda lam: NonNegative(L1(lam)),
    "cel0, x >= 0": lambda lam: NonNegative(Cel0(lam)),
    "l_half, x >= 0": lambda lam: NonNegative(LHalf(lam)),
}
each = pytest.mark.parametrize("made", OPERATORS.values(), ids=OPERATORS)
GRID = (torch.arange(601, dtype=torch.float64) - 300) / 50
FINE = (torch.arange(801, dtype=torch.float64) - 400) / 20000
U = torch.linspace(-5.1, 5.3, 27, dtype=torch.float64)


def value(operator, u, step=1.0):
    return float(operator.prox(torch.tensor([u], dtype=torch.float64), step).value)


def searched(operator, u, step):
    """(argmin, least objective) of 1/2 (x - u)^2 + step * penalty(x) for each u, by a grid and a finer one around it."""

    def cost(x):  # (u, candidates)
        return (x - u[:, None]).square() / 2 + step * operator.penalty(x)

    coarse = GRID.expand(len(u), -1)
    best = coarse.gather(1, cost(coarse).argmin(1, keepdim=True))
    fine = torch.cat((best + FINE, torch.zeros_like(best), u[:, None]), 1)
    found = cost(fine).min(1)
    return fine.gather(1, found.indices[:, None])[:, 0], found.values


@each
def test_value_and_mask_are_those_of_a_search(made):
    for lam, step in itertools.product((0.1, 0.5, 1.3), (0.2, 0.5, 1.0, 1.5, 3.3, 6.0)):
        operator = made(lam)
        best, least = searched(operator, U, step)
        got = operator.prox(U, step)
        mine = (got.value - U).square() / 2 + step * operator.penalty(got.value)
        assert (mine <= least + 1e-9).all(), (lam, step)
        apart = (got.value - best).abs() > 1e-4
        assert apart.sum() <= 1 and ((least - mine)[apart] < 1e-3).all(), (lam, step)  # two are nearly as good
        assert torch.equal(got.mask.keep, got.value != 0)


# Sheet: lambda .5.


@pytest.mark.parametrize(
    ("operator", "threshold", "jump"),
    [(L0(0.5), 1.0, 1.0), (LHalf(0.5), 0.9449, 0.6300), (Lq(0.5, 2 / 3), 0.8774, 0.4387), (Lq(0.5, 0.3), 0.9845, None)],
)
def test_thresholds_and_the_value_jumped_to(operator, threshold, jump):
    assert value(operator, threshold - 1e-4) == 0 and value(operator, threshold + 1e-4) > 0.4
    if jump is not None:
        assert value(operator, threshold + 1e-4) == pytest.approx(jump, abs=1e-3)


def test_the_sheets_values():
    half, cel0 = LHalf(0.5), Cel0(0.5)
    assert [round(value(half, u), 4) for u in (1.2, 1.6, 2.5)] == [0.9425, 1.3878, 2.3364]
    assert [round(value(half, u), 4) for u in (-1.2, -0.9)] == [-0.9425, 0.0]
    assert round(value(Lq(0.5, 2 / 3), 1.2), 4) == 0.8478 and round(value(Lq(0.5, 0.3), 1.2), 4) == 1.0556
    assert value(L0(0.5), 1.0) == 0.0  # at the threshold both are best: the smaller is taken
    assert [round(value(cel0, u, 0.5), 12) for u in (0.3, 0.5, 0.7, 0.9, 1.05)] == [0, 0, 0.4, 0.8, 1.05]
    assert [value(cel0, u, 1.5) for u in (1.2, 1.6)] == [0, 1.6]
    assert LHalf(0.5).prox(torch.tensor([1.5 * 0.5 ** (2 / 3)], dtype=torch.float64)).mask.count == 0


def test_the_step_is_part_of_the_threshold():
    for step in (0.1, 0.25, 2.0):
        edge = math.sqrt(2 * step * 0.5)  # not sqrt(2 lam)
        assert value(L0(0.5), edge * 0.999, step) == 0 and value(L0(0.5), edge * 1.001, step) == edge * 1.001


# Sheet: odd; never larger; monotone; l1 non-expansive; CEL0 continuous for step * norm^2 < 1; lam 0 is the identity.


@each
@settings(max_examples=25, deadline=None)
@given(a=st.floats(-6, 6), b=st.floats(-6, 6), lam=st.floats(0.01, 2), step=st.floats(0.05, 4))
def test_odd_never_larger_and_monotone(made, a, b, lam, step):
    operator = made(lam)
    low, high = sorted((a, b))
    small, large = (value(operator, u, step) for u in (low, high))
    assert small <= large + 1e-12 and abs(large) <= abs(high) and abs(small) <= abs(low)
    if isinstance(operator, NonNegative):
        assert value(operator, -abs(a), step) == 0 and value(operator, abs(a), step) == value(operator.inner, abs(a), step)
    else:
        assert value(operator, -a, step) == -value(operator, a, step)
    if isinstance(operator, L1):
        assert large - small <= high - low + 1e-12
    if isinstance(operator, Cel0) and step * operator.norm**2 < 0.99:
        slope = 1 / (1 - step * operator.norm**2)
        assert large - small <= slope * (high - low) + 1e-9


@each
def test_nothing_asked_changes_nothing(made):
    u = torch.randn(50, generator=torch.Generator().manual_seed(1))
    operator = made(0.0)
    wanted = u.clamp(min=0) if isinstance(operator, NonNegative) else u
    assert torch.equal(operator.prox(u, 0.7).value, wanted)


def test_lq_tends_to_soft_and_to_hard():
    off = (U.abs() - 1).abs() > 0.1  # both thresholds are 1 for lam .5 (hard) and lam 1 (soft)
    assert torch.allclose(Lq(1.0, 0.999).prox(U[off]).value, L1(1.0).prox(U[off]).value, atol=1e-2)
    assert torch.allclose(Lq(0.5, 0.001).prox(U[off]).value, L0(0.5).prox(U[off]).value, atol=1e-2)


def test_half_is_lq_and_mcp_is_cel0_in_other_letters():
    for lam, step in itertools.product((0.05, 0.5, 2.0), (0.3, 1.0, 4.0)):
        assert torch.allclose(LHalf(lam).prox(U, step).value, Lq(lam, 0.5).prox(U, step).value, atol=1e-9)
        mcp = Mcp(math.sqrt(2 * lam) * 0.7, bend=1 / 0.7**2)
        assert torch.allclose(Cel0(lam, 0.7).prox(U, step).value, mcp.prox(U, step).value, atol=1e-12)


def test_cel0_takes_a_norm_a_column():
    norms = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)  # step .5: smooth, smooth, jump (.5 * 4 > 1)
    u = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None].expand(-1, 3)
    both, one = Cel0(0.5, norms), [Cel0(0.5, float(norm)) for norm in norms]
    for column, operator in enumerate(one):
        assert torch.allclose(both.prox(u, 0.5).value[:, column], operator.prox(u[:, column], 0.5).value, atol=1e-12)
        assert torch.allclose(both.penalty(u)[:, column], operator.penalty(u[:, column]), atol=1e-12)


# Top-k: the nearest tensor with at most k entries, by search over all supports.


def test_top_k_is_the_nearest_by_search():
    rng = torch.Generator().manual_seed(0)
    u = torch.randint(-4, 5, (40, 6), generator=rng).double()  # many ties
    for k in range(7):
        got = TopK(k, Unstructured((0,))).prox(u).value
        masks = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=6) if sum(m) <= k], dtype=torch.float64)
        least = (u[:, None] * (1 - masks)).square().sum(2).amin(1)
        assert torch.equal((u - got).square().sum(1), least) and ((got != 0).sum(1) <= k).all()
    tied = TopK(2, Unstructured((0,))).prox(torch.tensor([[1.0, -1.0, 1.0, 0.5]]))
    assert tied.value.tolist() == [[1, -1, 0, 0]]
    assert TopK(3).prox(torch.tensor([0.0, 2.0, 0.0, 0.0])).mask.count == 1  # a kept 0 is no support
    assert TopK(pattern=NM(1, 4)).prox(torch.tensor([[1.0, 3, -4, 2, 5, 1, 1, 1]])).value.tolist() == [
        [0, 0, -4, 0, 5, 0, 0, 0]
    ]
    # Rows of two: 3^2 + 3^2 < 4.5^2 + 0, though 3 + 3 > 4.5.
    assert TopK(1, Block((1, 2))).prox(torch.tensor([[3.0, 3.0], [4.5, 0.0]])).value.tolist() == [[0, 0], [4.5, 0]]
    assert NonNegative(TopK(1)).prox(torch.tensor([-5.0, 1.0, 2.0])).value.tolist() == [0, 0, 2]
    over = TopK(1).penalty(torch.tensor([1.0, 2.0, 0.0]))
    assert over.tolist() == [torch.inf, 0, 0] and TopK(2).penalty(torch.tensor([1.0, 2.0, 0.0])).sum() == 0
    assert TopK(1).prox(torch.tensor([1e300, 2e300], dtype=torch.float64)).mask.keep.tolist() == [False, True]


def test_a_gradient_goes_through_the_operator_and_never_through_the_penalty():
    for name in ("l1", "l0", "cel0", "mcp", "scad", "l_half", "lq"):
        u = torch.tensor([0.0, 0.3, -1.4, 2.5], dtype=torch.float64, requires_grad=True)
        operator = penalty(name)
        value_, step = operator.prox(u, 0.5).value, 1e-6
        value_.sum().backward()
        near = [(operator.prox(u.detach() + s, 0.5).value) for s in (step, -step)]
        assert torch.allclose(u.grad, (near[0] - near[1]) / (2 * step), atol=1e-4), name
        assert not operator.penalty(u).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_stays_and_zeros_are_plain(dtype):
    u = torch.tensor([-0.1, -3.0, 0.0, 1.7, 2.0], dtype=dtype)
    for name in CATALOGUE:
        got = penalty(name, **({"count": 2} if name == "top_k" else {})).prox(u)
        assert got.value.dtype == dtype and torch.equal(got.mask.keep, got.value != 0)
        assert not torch.signbit(got.value[got.value == 0]).any()
        assert torch.equal(got.mask.keep, torch.tensor([False, True, False, name != "top_k", True])), name


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e6, 1e30])
def test_no_scale_makes_nan(size):
    u = torch.tensor([-2.0, 0.5, 1.0, 3.0]) * size
    for name, lam in itertools.product(set(CATALOGUE) - {"top_k"}, (1e-30, 1e-3, 1e4, 1e30)):
        got = penalty(name, lam=lam).prox(u, 0.3).value
        assert torch.isfinite(got).all() and (got.abs() <= u.abs()).all(), (name, lam)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: L1(-0.1), lambda: L0(math.nan), lambda: Cel0(math.inf), lambda: Cel0(0.5, norm=0.0), lambda: Lq(0.5, 1.0),
        lambda: Cel0(0.5, norm=torch.tensor([1.0, -1.0])), lambda: Lq(0.5, 0.0), lambda: LHalf(-1.0), lambda: Mcp(0.5, 0.0),
        lambda: Scad(0.5, 2.0), TopK, lambda: TopK(-1), lambda: penalty("l2"), lambda: penalty("l1", q=0.5),
        lambda: L1().prox(torch.tensor([1.0]), 0.0), lambda: L1().prox(torch.tensor([1.0]), -1.0),
        lambda: L1().prox(torch.tensor([1.0, math.nan])), lambda: L0().prox(torch.tensor([math.inf])),
        lambda: L0().prox(torch.tensor([1, 2])), lambda: TopK(3).prox(torch.tensor([1.0, 2.0])),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(BadInput):
        wrong()
