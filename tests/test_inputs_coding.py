"""Codes against exhaustive search and by hand; dictionaries learned, saved and read back."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import L0, L1, Cel0, Coder, LHalf, Lq, Mcp, NonNegative, Scad, infer, refit
from maskwright.inputs.coding import lipschitz, objective
from maskwright.inputs.dictionary import whitening
from maskwright.inputs.l1_coding import L1Coding
from maskwright.inputs.v1_sparse_coding import V1SparseCoding

PENALTIES = (L1(0.3), L0(0.3), Cel0(0.3), LHalf(0.3), Lq(0.3, 0.7), Mcp(0.3, 2.0), Scad(0.3, 3.0), NonNegative(Cel0(0.3)))


def problem(m, n, seed, rows=4):
    rng = generator(seed, "problem")
    columns = torch.randn(m, n, generator=rng, dtype=torch.float64)
    x = torch.randn(rows, m, generator=rng, dtype=torch.float64)
    return columns / columns.norm(dim=0), x


# Sheet: the objective never increases for steps up to 1 / L, whatever the penalty.


@pytest.mark.parametrize("operator", PENALTIES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("n", [12, 30])  # one product with the Gram matrix, two with the dictionary
def test_the_objective_never_increases(operator, share, n):
    columns, x = problem(8, n, 1)
    x = 2 * x  # else l0 stays at 0
    code, told = torch.zeros(4, n, dtype=torch.float64), []
    for _ in range(40):
        told.append(objective(columns, x, code, operator))
        code = infer(columns, x, operator, 1, step=share / lipschitz(columns), start=code)
    falls = torch.stack(told).diff(dim=0)
    assert (falls <= 1e-12).all() and (falls[0] < -1e-3).any()
    at_once = infer(columns, x, operator, 40, step=share / lipschitz(columns))
    assert torch.allclose(code, at_once, atol=1e-12)


def test_both_forms_of_the_step_agree():
    columns, x = problem(6, 12, 2)
    step, code = 1 / lipschitz(columns), torch.zeros(4, 12, dtype=torch.float64)
    for _ in range(25):
        code = Cel0(0.2).shrink(code - step * (code @ columns.T - x) @ columns, step)
    assert torch.allclose(infer(columns, x, Cel0(0.2), 25), code, atol=1e-12)
    assert not torch.allclose(infer(columns, x, Cel0(0.2), 2), code, atol=1e-3)


# Sheet: D orthonormal and step 1: one step is exact, and CEL0 is hard thresholding there.


def test_one_step_is_exact_for_orthonormal_columns():
    columns = torch.linalg.qr(torch.randn(7, 7, generator=generator(0, "q"), dtype=torch.float64)).Q
    x = torch.randn(50, 7, generator=generator(1, "x"), dtype=torch.float64)
    for operator in (L1(0.3), L0(0.3), LHalf(0.3), Mcp(0.3), Scad(0.3)):
        once = infer(columns, x, operator, 1)
        assert torch.allclose(once, operator.prox(x @ columns).value, atol=1e-9)
        assert torch.allclose(once, infer(columns, x, operator, 50), atol=1e-9)
    assert torch.allclose(infer(columns, x, Cel0(0.3), 1), infer(columns, x, L0(0.3), 1), atol=1e-9)


# Sheet: on tiny problems (n = 12) the objective against an exhaustive search over supports.


def test_cel0_comes_near_the_best_support_and_never_below_it():
    gaps = {"cel0": [], "l0": [], "l1 refit": []}
    lam, supports = 0.08, [s for k in range(4) for s in itertools.combinations(range(12), k)]
    for seed in range(12):
        columns, _ = problem(6, 12, seed)
        rng = generator(seed, "planted")
        truth = torch.zeros(1, 12, dtype=torch.float64)
        truth[0, torch.randperm(12, generator=rng)[:2]] = torch.tensor([1.5, -1.0], dtype=torch.float64)
        x = truth @ columns.T + 0.05 * torch.randn(1, 6, generator=rng, dtype=torch.float64)
        best = math.inf
        for support in supports:
            part = columns[:, list(support)]
            rest = x[0] - part @ torch.linalg.lstsq(part, x[0]).solution if support else x[0]
            best = min(best, float(rest.square().sum()) / 2 + lam * len(support))
        for name, operator in (("cel0", Cel0(lam)), ("l0", L0(lam)), ("l1 refit", L1(0.3))):
            code = infer(columns, x, operator, 500)
            code = refit(columns, x, Mask(code != 0))
            gaps[name].append(float(objective(columns, x, code, L0(lam))) - best)
    assert all(gap > -1e-9 for told in gaps.values() for gap in told)  # more than 3 entries never pay here
    assert sum(gap < 1e-6 for gap in gaps["cel0"]) >= 7
    assert sum(gaps["cel0"]) < sum(gaps["l0"])


# Sheet: 0 is fixed under hard thresholding while |d.x| <= sqrt(2 lam / step); CEL0 needs only |d.x| > sqrt(2 lam).


def test_cel0_leaves_zero_where_hard_thresholding_stays():
    columns, _ = problem(4, 16, 3)
    step = 1 / lipschitz(columns)
    x = columns[:, :1].T * 1.0  # its correlation with the first column is 1, with the others less
    for lam, cel0_moves, hard_moves in ((0.51, False, False), (0.49, True, False), (0.49 * step, True, True)):
        assert bool((infer(columns, x, Cel0(lam), 1) != 0).any()) == cel0_moves
        assert bool((infer(columns, x, L0(lam), 200) != 0).any()) == hard_moves
    assert step < 0.5
    assert (infer(columns, x, Cel0(0.4), 2000) != 0).sum() == 1


def test_columns_of_other_lengths_need_their_norms():
    columns, x = problem(6, 10, 4)
    norms = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)
    code = torch.randn(4, 10, generator=generator(4, "code"), dtype=torch.float64)
    one, other = objective(columns, x, code, Cel0(0.2)), objective(columns * norms, x, code / norms, Cel0(0.2, norms))
    assert torch.allclose(one, other, atol=1e-12)


def test_refit_by_hand():
    columns = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    x = torch.tensor([[3.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
    support = Mask(torch.tensor([[False, False, True], [True, False, False], [False, False, False]]))
    assert torch.allclose(refit(columns, x, support), torch.tensor([[0, 0, 5.0], [1, 0, 0], [0, 0, 0]]))


# Dictionaries.


def patches(count=400, m=9, seed=0):
    rng = generator(seed, "patches")
    return torch.randn(count, 3, generator=rng) @ torch.randn(3, m, generator=rng) + 0.3 * torch.randn(
        count, m, generator=rng
    )


TINY = {"atoms": 14, "iterations": 20, "epochs": 2, "batch": 100}


def test_whitening_by_its_definition():
    x = patches().double()
    rows = (x - x.mean(1, keepdim=True)) @ whitening(x, 1e-9)
    covariance = rows.T @ rows / len(rows)
    assert torch.allclose(covariance, torch.eye(9, dtype=torch.float64) - 1 / 9, atol=1e-6)  # one direction less: the mean
    coder = V1SparseCoding(**TINY).fit(x)
    assert torch.allclose(coder.unwhitened(coder.prepared(x)), x - x.mean(1, keepdim=True), atol=1e-9)
    assert torch.equal(V1SparseCoding(**TINY, ridge=None).fit(x).prepared(x), x)


def test_a_planted_dictionary_is_found():
    rng = generator(0, "planted")
    truth = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q
    codes = torch.zeros(1000, 12).scatter_(1, torch.rand(1000, 12, generator=rng).argsort(1)[:, :2], 2.0)
    x = (codes * torch.randn(1000, 12, generator=rng)) @ truth.T
    coder = V1SparseCoding(lam=0.3, atoms=16, iterations=30, epochs=15, batch=100, ridge=None).fit(x)
    nearest = (truth.T @ coder.dictionary).abs().amax(1)
    assert (nearest > 0.95).sum() >= 11
    start = V1SparseCoding(lam=0.3, atoms=16, epochs=0, ridge=None).fit(x).dictionary
    assert ((truth.T @ start).abs().amax(1) > 0.95).sum() < 11  # patches alone are not enough


@pytest.mark.parametrize("kind", [V1SparseCoding, L1Coding])
def test_fit_encode_decode_and_seeds(kind):
    method, x = kind(lam=0.6, **TINY), patches()
    coder = method.fit(x, seed=3)
    assert torch.allclose(coder.dictionary.norm(dim=0), torch.ones(14), atol=1e-5) and coder.dictionary.shape == (9, 14)
    assert torch.equal(coder.dictionary, method.fit(x, seed=3).dictionary)
    assert not torch.equal(coder.dictionary, method.fit(x, seed=4).dictionary)
    code = coder.encode(x)
    assert torch.equal(code.mask.keep, code.value != 0) and 0 < code.mask.density < 1
    assert torch.allclose(coder.encode(x[5:6]).value, code.value[5:6], atol=1e-5)
    assert torch.equal(coder.decode(code.value), code.value @ coder.dictionary.T)
    start = kind(lam=0.6, **{**TINY, "epochs": 0}).fit(x, seed=3)
    told = [float(objective(c.dictionary, c.prepared(x), c.encode(x).value, method.operator).mean()) for c in (start, coder)]
    assert told[1] < told[0]
    assert (kind(lam=0.6, **TINY, non_negative=True).fit(x).encode(x).value >= 0).all()


def test_a_column_that_no_patch_used_is_drawn_anew():
    method = V1SparseCoding(lam=50.0, **{**TINY, "epochs": 1})  # nothing is above this threshold
    first = V1SparseCoding(lam=50.0, **{**TINY, "epochs": 0}).fit(patches())
    assert not torch.isclose(method.fit(patches()).dictionary, first.dictionary).all(0).any()


def test_saved_and_read_back(tmp_path):
    x, path = patches(), tmp_path / "d.safetensors"
    coder = V1SparseCoding(lam=0.6, penalty="lq", q=0.4, **TINY).fit(x, seed=7)
    coder.save(path)
    back = Coder.load(path)
    assert torch.equal(back.dictionary, coder.dictionary) and torch.equal(back.whitening, coder.whitening)
    assert back.method == coder.method and back.seed == 7 and torch.equal(back.encode(x).value, coder.encode(x).value)
    back.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    plain = L1Coding(ridge=None, **TINY).fit(x)
    plain.save(path)
    assert Coder.load(path).whitening is None and Coder.load(path).method == plain.method
    assert list(load_file(path)) == ["dictionary"]


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(BadInput, match="no such file"):
        Coder.load(path)
    path.write_bytes(b"\x08" * 40)
    with pytest.raises(BadInput, match="d.safetensors: not a readable dictionary"):
        Coder.load(path)
    save_file({"dictionary": torch.eye(3)}, path)
    with pytest.raises(BadInput, match="no manifest"):
        Coder.load(path)
    L1Coding(**TINY).fit(patches()).save(path)
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="digest"):
        Coder.load(path)
    whole[-3] ^= 1
    path.write_bytes(whole.replace(b"l1_coding", b"l9_coding"))
    with pytest.raises(BadInput, match=r"d\.safetensors"):
        Coder.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: L1Coding(lam=-1.0), lambda: L1Coding(atoms=0), lambda: L1Coding(iterations=0), lambda: L1Coding(batch=0),
        lambda: L1Coding(eta=0.0), lambda: L1Coding(eta=math.nan), lambda: L1Coding(ridge=0.0), lambda: L1Coding(epochs=-1),
        lambda: L1Coding(**TINY).fit(patches(10)), lambda: L1Coding(**TINY).fit(torch.zeros(50, 9)),
        lambda: L1Coding(**TINY).fit(patches() / 0), lambda: L1Coding(**TINY).fit(patches()[0]),
        lambda: L1Coding(**TINY).fit(patches()).encode(torch.zeros(3, 8)), lambda: L1Coding(**TINY).fit(torch.zeros(0, 9)),
        lambda: infer(torch.eye(3), torch.zeros(2, 4), L1(), 3),
        lambda: infer(torch.eye(3), torch.full((1, 3), math.nan), L1(), 3),
        lambda: infer(torch.eye(3), torch.zeros(2, 3).double(), L1(), 3), lambda: Coder(2 * torch.eye(14), L1Coding(**TINY)),
        lambda: refit(torch.eye(3), torch.zeros(2, 3), Mask(torch.ones(2, 4, dtype=torch.bool))),
        lambda: Coder(torch.eye(3), L1Coding(**TINY)), lambda: Coder(torch.eye(14), L1Coding(**TINY), torch.eye(3)),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(BadInput):
        wrong()
