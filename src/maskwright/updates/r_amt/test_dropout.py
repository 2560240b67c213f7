"""Gradient dropout and the distillation loss against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.updates.r_amt import agreement, distillation, gradient_dropout


@pytest.mark.parametrize(("a", "b", "p"), [(1, 1, 1), (1, -3, 0.25), (-2, 1, 2 / 3), (0, 5, 0.5), (0, 0, 0.5), (-1, -9, 1)])
def test_agreement_numbers_and_keep_rate(a, b, p):
    n = 100_000
    a, b = torch.full((n,), float(a)), torch.full((n,), float(b))
    assert agreement(a, b)[0].item() == pytest.approx(p, abs=1e-6)
    used = gradient_dropout(a, b, 1.0, generator(0, "u"))
    assert set(used.tolist()) <= {0.0, a[0].item()}
    if a[0] != 0:
        kept = (used != 0).sum().item()
        assert abs(kept - n * p) <= 4 * math.sqrt(n * p * (1 - p))
        assert p < 1 or kept == n


@given(st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gradient_dropout_against_the_formula(seed, lam):
    rng = generator(seed, "ab")
    a, b = torch.randn(7, 5, generator=rng), torch.randn(7, 5, generator=rng)
    uniform = torch.rand(7, 5, generator=generator(seed, "u"))
    p = 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs()))
    wanted = ((1 - lam) + lam * (p > uniform).float()) * a
    torch.testing.assert_close(gradient_dropout(a, b, lam, generator(seed, "u")), wanted)


def test_a_dropped_entry_keeps_1_less_lambda_and_lambda_0_is_the_plain_gradient():
    a, b = torch.ones(50), torch.full((50,), -1e9)  # P rounds to 0
    assert torch.equal(gradient_dropout(a, b, 0.3, generator(0)), torch.full((50,), 0.7))
    assert torch.equal(gradient_dropout(a, b, 1.0, generator(0)), torch.zeros(50))
    assert torch.equal(gradient_dropout(a, b, 0.0, generator(0)), a)


@given(st.integers(0, 99), st.sampled_from([1e-30, 1e-9, 1.0, 1e30]))
@settings(max_examples=20, deadline=None)
def test_without_an_old_gradient_everything_is_kept_at_any_scale(seed, scale):
    a = torch.randn(100, generator=generator(seed)) * scale
    assert torch.equal(gradient_dropout(a, torch.zeros(100), 1.0, generator(seed, "u")), a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_dropout_refuses(bad):
    one = torch.ones(2, 3)
    for a, b in ((one * bad, one), (one, one * bad)):
        with pytest.raises(BadInput, match=r"\(2, 3\) is NaN or infinite"):
            gradient_dropout(a, b, 0.3, generator(0))
    with pytest.raises(BadInput, match=r"\(2, 3\) and \(3,\)"):
        gradient_dropout(one, torch.ones(3), 0.3, generator(0))
    for lam in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="lam"):
            gradient_dropout(one, one, lam, generator(0))


def test_distillation_is_the_divergence_up_to_a_constant():
    student = torch.randn(5, 4, generator=generator(1), requires_grad=True)
    teacher = torch.randn(5, 4, generator=generator(2), requires_grad=True)
    for t in (1.0, 2.0):
        (got,) = torch.autograd.grad(distillation(student, teacher, t), student)
        kl = t * t * F.kl_div((student / t).log_softmax(-1), (teacher.detach() / t).softmax(-1), reduction="batchmean")
        (wanted,) = torch.autograd.grad(kl, student)
        torch.testing.assert_close(got, wanted)
    assert torch.autograd.grad(distillation(student, student), student)[0].abs().max() < 1e-7
