"""The losses of GS-LoRA in numbers: the group lasso, the proximal step, the bound, the divergence."""

import math

import pytest
import torch

from maskwright.updates.gs_lora.losses import bounded, divergence, group_lasso, group_norm, proximal


def test_group_norm_and_lasso():
    three, four = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert float(group_norm([three, four])) == 5
    groups = {"a": [three, four], "b": [torch.tensor([[12.0]])]}
    assert float(group_lasso(groups)) == 17
    assert float(group_lasso(groups, True)) == pytest.approx(5 * math.sqrt(2) + 12)


def test_gradient_of_a_group_is_the_matrix_over_the_norm_and_zero_at_zero():
    A, B = torch.tensor([[3.0]], requires_grad=True), torch.tensor([[4.0, 0.0]], requires_grad=True)
    group_norm([A, B]).backward()
    assert A.grad.tolist() == [[pytest.approx(0.6)]] and B.grad.tolist() == [[pytest.approx(0.8), 0.0]]
    zero = torch.zeros(2, 2, requires_grad=True)
    group_norm([zero]).backward()
    assert not bool(zero.grad.any()) and not bool(zero.grad.isnan().any())


def test_proximal_step():
    A, B = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    proximal([A, B], 1.0)
    assert float(group_norm([A, B])) == pytest.approx(4) and float(A / B) == pytest.approx(0.75)
    small = [torch.tensor([[0.3]]), torch.tensor([[0.4]])]
    proximal(small, 1.0)
    assert not any(bool(m.any()) for m in small)
    proximal(small, 1.0)  # at 0 it stays, without a NaN
    assert not any(bool(m.isnan().any() | m.any()) for m in small)


def test_bounded_loss():
    ce = torch.tensor(0.3, requires_grad=True)
    value = bounded(ce, 1.0)
    value.backward()
    assert value.item() == pytest.approx(0.7) and ce.grad.item() == -1
    for beyond in (1.0, 2.0):
        ce = torch.tensor(beyond, requires_grad=True)
        value = bounded(ce, 1.0)
        value.backward()
        assert value.item() == 0 and ce.grad.item() == 0


def test_divergence_from_a_prototype():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(divergence(p, q)) == pytest.approx(0.368, abs=5e-4)
    assert float(divergence(q, p)) != pytest.approx(0.368, abs=5e-4)  # the direction counts
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-7)
    assert float(divergence(p.repeat(3, 1), q.repeat(3, 1))) == pytest.approx(0.368, abs=5e-4)  # a mean over rows
