"""V1 sparse coding: masks by hand, every penalty by its name, and its claim's reading of a curve."""

import math

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.method import get
from maskwright.core.select import generator
from maskwright.inputs import L0, Cel0, Lq, NonNegative, Scad
from maskwright.inputs.proximal import CATALOGUE
from maskwright.inputs.v1_sparse_coding import V1SparseCoding
from maskwright.inputs.v1_sparse_coding.claim import Turned, _figures


def test_keep_by_hand():
    u = torch.tensor([[0.4, 0.9, 1.0, 1.1], [-1.0, -0.96, 0.94, -2.0]])
    kept = {
        "cel0": [[False, False, False, True], [False, False, False, True]],  # |u| > sqrt(2 lam) = 1
        "l0": [[False, False, False, True], [False, False, False, True]],
        "l_half": [[False, False, True, True], [True, True, False, True]],  # |u| > .9449
        "l1": [[False, True, True, True], [True, True, True, True]],  # |u| > .5
    }
    for name, wanted in kept.items():
        assert V1SparseCoding(lam=0.5, penalty=name).keep(u).keep.tolist() == wanted, name
    positive = V1SparseCoding(lam=0.5, penalty="l1", non_negative=True).keep(u).keep
    assert positive.tolist() == [[False, True, True, True], [False, False, True, False]]
    with pytest.raises(BadInput, match="finite"):
        V1SparseCoding().keep(u / 0 * 0)


def test_a_penalty_by_its_name():
    for name in set(CATALOGUE) - {"top_k"}:
        assert type(V1SparseCoding(penalty=name, lam=0.1).operator) is type(CATALOGUE[name](lam=0.1))
    assert V1SparseCoding(penalty="lq", q=0.4).operator == Lq(1.0, 0.4)
    assert V1SparseCoding(penalty="scad", bend=2.5).operator == Scad(1.0, 2.5)
    assert V1SparseCoding(penalty="l0", non_negative=True).operator == NonNegative(L0(1.0))
    for wrong in ({"penalty": "top_k"}, {"penalty": "l2"}, {"penalty": "lq", "q": 1.0}, {"penalty": "mcp", "bend": 0.0}):
        with pytest.raises(BadInput):
            V1SparseCoding(**wrong)


def test_cel0_needs_fewer_coefficients_than_l1_for_a_planted_code():
    rng = generator(0, "planted")
    columns = torch.linalg.qr(torch.randn(16, 16, generator=rng)).Q
    codes = torch.zeros(400, 16).scatter_(1, torch.rand(400, 16, generator=rng).argsort(1)[:, :3], 1.0)
    x = (codes * (1 + torch.rand(400, 16, generator=rng))) @ columns.T + 0.1 * torch.randn(400, 16, generator=rng)
    told = {}
    for name, method in (("cel0", V1SparseCoding(lam=0.2)), ("l1", get("l1_coding")(lam=0.2))):
        got = method.operator.prox(x @ columns)
        told[name] = got.mask, float((x - got.value @ columns.T).square().sum())
    assert torch.equal(told["cel0"][0].keep, codes != 0)  # just what was planted
    assert told["cel0"][0].count < told["l1"][0].count and told["cel0"][1] < told["l1"][1] / 1.5


def test_the_twin_makes_large_entries_smaller_and_cel0_does_not():
    u = torch.tensor([0.2, 1.0, 4.0])
    assert torch.allclose(Turned(0.5).prox(u, 0.25).value, torch.tensor([0.0, 0.6, 3.0]))
    assert torch.allclose(Cel0(0.5).prox(u, 0.25).value, torch.tensor([0.0, 1.0, 4.0]))


def test_the_claim_reads_a_curve_between_its_points_and_not_outside():
    points = [(100.0, 0.1), (10.0, 0.4), (1.0, 0.6)]  # error falls by .3 and .2 a factor of ten
    told = _figures(points, 200, "full")
    assert told["ln_nonzeros_at_error_0.3"] == pytest.approx(math.log(10) * (1 + 1 / 3))
    assert told["ln_nonzeros_at_error_0.5"] == pytest.approx(math.log(10) * 0.5)
    assert told["ln_error_at_share_0.05"] == pytest.approx(math.log(0.4))  # 10 of 200
    assert (told["share_0"], told["error_0"]) == (0.005, 0.6)
    assert math.isnan(_figures(points[:2], 200, "full")["ln_nonzeros_at_error_0.5"])
    assert math.isnan(_figures([(1.0, 0.3), (2.0, 0.4)], 20, "full")["ln_error_at_share_0.05"])  # no curve: it rises
