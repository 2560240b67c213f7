"""The shared preference loss: hand-worked numbers, what must not matter, chunks, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.preference import IGNORE, Terms, preference_loss, token_preference_loss, token_terms

N, LENGTH, WORDS = 3, 6, 5


def case(seed=0, dtype=torch.float64):
    rng = generator(seed, "case")
    logits = [torch.randn(N, LENGTH, WORDS, generator=rng, dtype=torch.float64).to(dtype) for _ in range(4)]
    labels = [torch.randint(WORDS, (N, LENGTH), generator=rng) for _ in range(2)]
    for rows in labels:
        rows[:, :2] = IGNORE
        rows[1, 4:] = IGNORE
    return [*logits, *labels]


def given_terms(rewards, kls):
    """Terms of one sequence from plain numbers."""
    reward, kl = torch.tensor([rewards], dtype=torch.float64), torch.tensor([kls], dtype=torch.float64)
    return Terms(reward, kl, torch.ones_like(reward, dtype=torch.bool))


def test_tiny_numbers():
    loss, told = preference_loss(given_terms((1, 0), (0, 0)), given_terms((0.5,), (0,)), beta=1.0)
    assert told.margin.item() == 0.5 and loss.item() == pytest.approx(0.4741, abs=5e-5)
    loss, told = preference_loss(given_terms((1, 0), (0.15, 0.05)), given_terms((0.5,), (0.1,)), beta=1.0)
    assert told.margin.item() == pytest.approx(0.6) and loss.item() == pytest.approx(0.4375, abs=5e-5)
    assert told.kl_chosen.item() == pytest.approx(0.2) and told.accuracy == 1.0


@given(st.integers(0, 50), st.floats(0.05, 3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_against_sums_over_tokens_and_words(seed, beta, hold):
    pw, pl, rw, rl, lw, ll = case(seed)
    rng = generator(seed, "weights")
    m_u, m_d = (tuple(torch.rand(N, LENGTH - 1, generator=rng, dtype=torch.float64) for _ in range(2)) for _ in range(2))
    loss, told = token_preference_loss(pw, pl, rw, rl, lw, ll, m_u, m_d, beta, hold_chosen_kl=hold)
    for row in range(N):
        u = delta = 0.0
        for sign, side, p, r, y in ((1, 0, pw, rw, lw), (-1, 1, pl, rl, ll)):
            for t in range(1, LENGTH):
                if y[row, t] != IGNORE:
                    now, before = F.log_softmax(p[row, t - 1], 0), F.log_softmax(r[row, t - 1], 0)
                    u += sign * m_u[side][row, t - 1] * (now - before)[y[row, t]]
                    delta -= sign * m_d[side][row, t - 1] * F.kl_div(now, before, log_target=True, reduction="sum")
        torch.testing.assert_close(told.losses[row], -F.logsigmoid(beta * (u - delta)))
    torch.testing.assert_close(loss, told.losses.mean())


def test_no_weight_is_ln_2_and_so_is_a_policy_that_is_the_reference():
    pw, pl, rw, rl, lw, ll = case()
    zero = (torch.zeros(N, LENGTH - 1), torch.zeros(N, LENGTH - 1))
    for m in (0.0, zero):
        assert token_preference_loss(pw, pl, rw, rl, lw, ll, m, m, 1.0)[0].item() == pytest.approx(math.log(2), abs=1e-12)
    # beta = 0 would be ln 2 as well, whatever the models say: refused, see below; the limit shows it.
    assert token_preference_loss(pw, pl, rw, rl, lw, ll, beta=1e-12)[0].item() == pytest.approx(math.log(2), abs=1e-9)


def test_at_the_reference_only_the_rewards_pull_by_half_beta():
    *_, rw, rl, lw, ll = case()
    policy = [t.clone().requires_grad_() for t in (rw, rl)]
    m = tuple(torch.rand(N, LENGTH - 1, generator=generator(1), dtype=torch.float64).requires_grad_() for _ in range(2))
    loss, told = token_preference_loss(*policy, rw, rl, lw, ll, m, m, 0.6)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12) and told.kl_chosen.abs().max() < 1e-12
    *pulls, on_w, on_l = torch.autograd.grad(loss, [*policy, *m])
    assert torch.equal(on_w, torch.zeros_like(on_w)) and torch.equal(on_l, torch.zeros_like(on_l))
    for sign, logits, labels, weight, pull in zip((-1, 1), policy, (lw, ll), m, pulls, strict=True):
        shifted = labels[:, 1:].clamp_min(0)
        logp = logits[:, :-1].log_softmax(-1).gather(-1, shifted[..., None])[..., 0]
        wanted = sign * 0.6 / 2 * (weight.detach() * logp * (labels[:, 1:] != IGNORE)).sum() / N
        torch.testing.assert_close(pull, torch.autograd.grad(wanted, logits)[0])
    # The divergences alone pull nowhere there.
    alone = token_preference_loss(*policy, rw, rl, lw, ll, 0.0, 1.0, 0.6)[0]
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(alone, policy))


def test_divergence_of_the_rejected_response_costs_and_of_the_chosen_pays():
    def loss(k_w, k_l):
        return preference_loss(given_terms((0.3,), (k_w,)), given_terms((0.1,), (k_l,)), beta=1.0)[0].item()

    assert loss(0.1, 0.2) > loss(0.1, 0.1) > loss(0.2, 0.1)


def test_prompt_and_padding_change_nothing_nan_included():
    clean = case()
    loss = token_preference_loss(*clean)[0]
    bad = [t.clone() for t in clean[:4]]
    for logits, labels in zip(bad, (clean[4], clean[5]) * 2, strict=True):
        counts = F.pad(labels[:, 1:] != IGNORE, (0, 1))
        logits[~counts] = torch.nan
    policy = [t.requires_grad_() for t in bad[:2]]
    again = token_preference_loss(*policy, *bad[2:], *clean[4:])[0]
    assert torch.equal(loss, again)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(again, policy))
    weights = tuple(torch.ones(N, LENGTH - 1, dtype=torch.float64) for _ in range(2))
    for weight, labels in zip(weights, clean[4:], strict=True):
        weight[labels[:, 1:] == IGNORE] = torch.nan
    assert torch.equal(token_preference_loss(*clean, weights, weights)[0], loss)


def test_a_permuted_batch_permutes_the_losses_and_no_order_matters():
    told, order = case(), torch.tensor([2, 0, 1])
    plain, moved = token_preference_loss(*told)[1], token_preference_loss(*(t[order] for t in told))[1]
    torch.testing.assert_close(plain.losses[order], moved.losses, rtol=1e-14, atol=0)


def test_chunks_change_nothing_and_half_precision_is_widened():
    told = case()
    policy = [t.clone().requires_grad_() for t in told[:2]]
    whole = token_preference_loss(*policy, *told[2:])[0]
    parts = token_preference_loss(*policy, *told[2:], chunk=2 * WORDS)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(whole, policy), torch.autograd.grad(parts, policy), strict=True):
        torch.testing.assert_close(a, b)
    half = [t.bfloat16() for t in told[:4]]
    assert token_preference_loss(*half, *told[4:])[0].dtype == torch.float32
    wide = [t.float() for t in half]
    assert torch.equal(token_preference_loss(*half, *told[4:])[0], token_preference_loss(*wide, *told[4:])[0])


def test_a_word_that_both_models_rule_out_has_no_divergence():
    told = case()
    dull = [t.clone() for t in told[:4]]
    rows = [t.clone() for t in told[4:]]
    for t in dull:
        t[..., 4] = -torch.inf
    for t in rows:
        t[t == 4] = 3
    policy = [t.requires_grad_() for t in dull[:2]]
    loss = token_preference_loss(*policy, *dull[2:], *rows)[0]
    fewer = token_preference_loss(*(t[..., :4] for t in dull), *rows)[0]
    torch.testing.assert_close(loss, fewer)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, policy))


def test_what_is_refused():
    pw, pl, rw, rl, lw, ll = case()
    ones = torch.ones(N, LENGTH - 1)
    for change, words in (
        ({0: pw[:, 1:]}, r"\(3, 5, 5\), \(3, 6, 5\) and \(3, 6\)"),
        ({2: rw.clone().requires_grad_()}, "torch.no_grad"),
        ({4: lw.clone().fill_(IGNORE)}, "row 0 .* no response token"),
        ({4: lw.clone().fill_(WORDS)}, "the vocabulary is 5"),
        ({4: lw.clone().fill_(-1)}, "labels hold -1"),
        ({4: lw[:2], 0: pw[:2], 2: rw[:2]}, "2 chosen and 3 rejected"),
        ({4: lw[:, :1]}, r"\(3, 1\)"),
        ({0: pw * math.nan}, "row 0, token 2"),
        ({6: (ones, -ones)}, "m_u .* negative"),
        ({7: (ones * math.inf, ones)}, "m_d .* not finite"),
        ({6: -1.0}, "m_u .* negative"),
        ({7: (ones[:, 1:], ones)}, r"m_d of shape \(3, 4\)"),
        ({8: 0.0}, "beta"),
        ({8: -1.0}, "beta"),
        ({8: math.nan}, "beta"),
    ):
        args = [pw, pl, rw, rl, lw, ll, 1.0, 1.0, 0.1]
        for at, value in change.items():
            args[at] = value
        with pytest.raises(BadInput, match=words):
            token_preference_loss(*args)
    plain = [token_terms(p, r, y, kl=False) for p, r, y in ((pw, rw, lw), (pl, rl, ll))]
    with pytest.raises(BadInput, match="m_d weighs divergences"):
        preference_loss(*plain)
