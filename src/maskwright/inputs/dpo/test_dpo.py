"""DPO, TDPO1 and TDPO2 against formulas written out again here, and against TRL's numbers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.dpo import Dpo
from maskwright.inputs.pairs import Pairs
from maskwright.inputs.preference import IGNORE, token_preference_loss
from maskwright.lab.decoder import llama


def small(seed=0):
    return llama(11, layers=2, width=16, heads=2, kv_heads=1, hidden=16, context=16, seed=seed)


def batch(n=3, length=9, seed=0):
    ids = torch.randint(1, 11, (2 * n, length), generator=generator(seed, "ids"))
    attention, completion = torch.ones_like(ids), torch.ones_like(ids)
    completion[:, :3] = 0
    attention[1, 7:], attention[-1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion * attention}


def models():
    policy, reference = small(1), small(2).requires_grad_(False)
    return policy.train(), reference.train()


def by_hand(policy, reference, told, beta, form, alpha=0.5):
    """The papers' sums, one sequence at a time."""
    n = len(told["input_ids"]) // 2
    sums = []
    for row in range(2 * n):
        ids, attention = told["input_ids"][row : row + 1], told["attention_mask"][row : row + 1]
        now = policy(input_ids=ids, attention_mask=attention).logits[0].log_softmax(-1)
        before = reference(input_ids=ids, attention_mask=attention).logits[0].log_softmax(-1)
        reward, kl = 0.0, 0.0
        for t in range(1, ids.shape[1]):
            if told["completion_mask"][row, t]:
                reward = reward + now[t - 1, ids[0, t]] - before[t - 1, ids[0, t]]
                kl = kl + (before[t - 1].exp() * (before[t - 1] - now[t - 1])).sum()
        sums.append((reward, kl))
    losses = []
    for (r_w, k_w), (r_l, k_l) in zip(sums[:n], sums[n:], strict=True):
        delta = {"dpo": 0.0, "tdpo1": k_l - k_w, "tdpo2": alpha * (k_l - torch.as_tensor(k_w).detach())}[form]
        losses.append(-F.logsigmoid(beta * (r_w - r_l - delta)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("form", ["dpo", "tdpo1", "tdpo2"])
def test_loss_and_gradient_are_the_papers(form):
    policy, reference = models()
    told, weights = batch(), list(policy.parameters())
    with Dpo(beta=0.7, form=form, alpha=0.3).attach(policy, reference) as run:
        loss, stats = run.loss(told)
    wanted = by_hand(policy, reference, told, 0.7, form, 0.3)
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    assert stats.losses.shape == (3,) and not stats.losses.requires_grad
    assert bool(stats.kl_chosen.isnan().all()) == (form == "dpo")


def test_trls_sigmoid_loss_on_numbers_worked_out_by_hand():
    # TRL 1.16, DPOTrainer: -logsigmoid(beta * ((log pi - log pi_r)(chosen) - the same (rejected))), summed log-probs of
    # the completion. Two words; a logit pair (ln p, ln(1 - p)) gives probability p to word 0. The prompt is one token.
    def logits(*shares):
        return torch.tensor([[[math.log(p), math.log(1 - p)] for p in (*shares, 0.5)]], dtype=torch.float64)

    chosen, rejected = torch.tensor([[IGNORE, 0, 0]]), torch.tensor([[IGNORE, 1, 0]])
    loss, stats = token_preference_loss(
        logits(0.8, 0.5), logits(0.8, 0.5), logits(0.4, 0.5), logits(0.4, 0.25), chosen, rejected, m_d=0.0, beta=0.5
    )
    # chosen: 0.8 * 0.5 = 0.4 against 0.4 * 0.5 = 0.2: ln 2. rejected: 0.2 * 0.5 = 0.1 against 0.6 * 0.25 = 0.15: ln(2/3)
    assert stats.reward_chosen.item() == pytest.approx(math.log(2), abs=1e-12)
    assert stats.reward_rejected.item() == pytest.approx(math.log(2 / 3), abs=1e-12)
    # u = ln 3, beta u = ln sqrt 3, loss = ln(1 + 1 / sqrt 3) = 0.45575
    assert loss.item() == pytest.approx(math.log(1 + 3**-0.5), abs=1e-12) == pytest.approx(0.45575, abs=1e-5)


def test_the_reference_is_still_and_comes_back_as_it_was():
    policy, reference = models()
    reference.model.layers[0].eval()
    modes = [module.training for module in reference.modules()]
    with Dpo().attach(policy, reference) as run:
        assert not any(module.training for module in reference.modules()) and policy.training
        run.loss(batch())[0].backward()
    assert [module.training for module in reference.modules()] == modes
    assert all(p.grad is None for p in reference.parameters()) and all(p.grad is not None for p in policy.parameters())
    with pytest.raises(BadInput, match=r"embed_tokens.weight is the policy's own"), Dpo().attach(policy, policy):
        pass
    with pytest.raises(BadInput, match="asks for a gradient"), Dpo().attach(policy, copy.deepcopy(policy)):
        pass


def test_trls_collator_and_columns_of_two_sides_are_read_alike():
    # The example of TRL's DataCollatorForPreference.
    told = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]),
    }
    pairs = Pairs.of(told)
    assert pairs.labels.tolist()[1] == [IGNORE, IGNORE, 9, IGNORE, IGNORE]
    assert pairs.response.tolist()[3] == [False, True, True, False]
    apart = {f"chosen_{key}": value[:2] for key, value in told.items()}
    apart |= {f"rejected_{key}": value[2:, :4] for key, value in told.items()}  # a narrower side is padded
    for got, want in zip(vars(Pairs.of(apart)).values(), vars(pairs).values(), strict=True):
        assert torch.equal(got, want)
    policy, reference = models()
    with Dpo(form="tdpo1").attach(policy, reference) as run:
        assert torch.equal(run.loss(told)[0], run.loss(Pairs.of(apart))[0])


def test_bad_batches_and_settings_are_refused():
    good = batch()
    for change, words in (
        ({"completion_mask": torch.zeros_like(good["input_ids"])}, "row 0 .* no response"),
        ({"attention_mask": good["attention_mask"].flip(1)}, "padded on the left"),
        ({"completion_mask": torch.ones_like(good["input_ids"])}, "in the padding"),
        ({"completion_mask": good["completion_mask"][:, 1:]}, r"\(6, 8\) lies on ids of \(6, 9\)"),
        ({key: value[:5] for key, value in good.items()}, r"\(2 n, length\)"),
    ):
        with pytest.raises(BadInput, match=words):
            Pairs.of({**good, **change})
    with pytest.raises(BadInput, match="lacks attention_mask, labels or completion_mask; it has input_ids"):
        Pairs.of({"input_ids": good["input_ids"]})
    for settings in ({"beta": 0.0}, {"beta": math.nan}, {"alpha": -1.0}, {"form": "ipo"}):
        with pytest.raises(BadInput):
            Dpo(**settings)


def test_every_token_counts_the_same():
    assert torch.equal(Dpo().keep(torch.zeros(2, 5, 3)).values, torch.ones(2, 5))
