"""The sheet's exact checks of SparsePO's masks and its run."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from maskwright.core import store
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.dpo import Dpo
from maskwright.inputs.pairs import Pairs
from maskwright.inputs.preference import token_preference_loss
from maskwright.inputs.sparsepo import SparsePo, TokenMaskNet
from maskwright.lab.decoder import llama

LEARNED = ("common", "independent")


def small(seed=0):
    return llama(11, layers=2, width=16, heads=2, kv_heads=1, hidden=16, context=16, seed=seed)


def pair_batch(n=3, length=9, seed=0):
    ids = torch.randint(1, 11, (2 * n, length), generator=generator(seed, "ids"))
    attention, labels = torch.ones_like(ids), ids.clone()
    attention[1, 7:], attention[-1, 6:] = 0, 0
    labels[:, :3] = -100
    return Pairs(ids, attention, labels.masked_fill(attention == 0, -100))


def models():
    return small(1), small(2).requires_grad_(False)


def shaken(run, seed=0):
    """A mask network as if trained: some weights 0, others not."""
    for i, net in enumerate(run.nets):
        for layer in net.layers:
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(seed, f"shake {i}")))
                layer.bias.fill_(0.1)


# --- the loss with masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", *LEARNED])
def test_a_mask_of_ones_is_tdpo1_and_one_on_the_reward_alone_starts_there_too(mask):
    policy, reference = models()
    with Dpo(beta=0.7, form="tdpo1").attach(policy, reference) as run:
        wanted = run.loss(pair_batch())[0]
    for settings in ({}, {"on_kl": False}, {"on_reward": False}):
        with SparsePo(mask=mask, beta=0.7, dropout=0.0, **settings).attach(policy, reference) as run:
            torch.testing.assert_close(run.loss(pair_batch())[0], wanted)


class Says(torch.nn.Module):
    """A model whose logits are its weights."""

    def __init__(self, name, train):
        super().__init__()
        logits = torch.randn(6, 9, 11, generator=generator(0, name), dtype=torch.float64)
        self.logits = torch.nn.Parameter(logits, requires_grad=train)

    def forward(self, **_):
        return SimpleNamespace(logits=self.logits)


def test_the_loss_with_reward_weights_1_and_no_divergence_is_dpo():
    policy, reference, pairs = Says("policy", True), Says("reference", False), pair_batch()
    with Dpo(beta=0.7, form="dpo").attach(policy, reference) as run:
        dpo = run.loss(pairs)[0]
    now, before, labels = policy.logits, reference.logits, pairs.labels
    ours = token_preference_loss(
        now[:3], now[3:], before[:3], before[3:], labels[:3], labels[3:], m_u=1.0, m_d=0.0, beta=0.7
    )[0]
    ratio = (now.log_softmax(-1) - before.log_softmax(-1))[:, :-1].gather(2, pairs.ids[:, 1:, None])[..., 0]
    sums = (ratio * (labels[:, 1:] != -100)).sum(1)
    plain = -torch.nn.functional.logsigmoid(0.7 * (sums[:3] - sums[3:])).mean()
    assert torch.equal(ours, dpo)
    torch.testing.assert_close(ours, plain)
    one, two, three = (torch.autograd.grad(loss, policy.logits)[0] for loss in (ours, dpo, plain))
    assert torch.equal(one, two) and one.abs().max() > 1e-3
    torch.testing.assert_close(one, three)


def test_a_mask_of_zeros_is_ln_2():
    policy, reference = models()
    with SparsePo(beta=0.7).attach(policy, reference) as run:
        with torch.no_grad():
            run.nets[0].mixer.weight.fill_(-1.0)
        assert run.loss(pair_batch())[0].item() == pytest.approx(math.log(2), abs=1e-6)
        assert run.sparsity(pair_batch())["reward"].dead == run.sparsity(pair_batch())["kl"].zeros == 1.0


@pytest.mark.parametrize("mask", LEARNED)
def test_where_the_policy_is_the_reference_the_mask_gets_exactly_no_gradient(mask):
    reference = small(1).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    with SparsePo(mask=mask, dropout=0.0).attach(policy, reference) as run:
        shaken(run)
        loss, _ = run.loss(pair_batch())
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        loss.backward()
        assert all(bool((p.grad == 0).all()) for p in run.mask_parameters)
        assert any(bool((p.grad != 0).any()) for p in policy.parameters())


def test_common_is_one_mask_and_independent_two_networks():
    policy, reference = models()
    with SparsePo(mask="common").attach(policy, reference) as run:
        weights = run._read(pair_batch())[1]
        assert weights.reward is weights.kl and len(run.nets) == 1
    with SparsePo(mask="independent", on_kl=False, dropout=0.0).attach(policy, reference) as run:
        assert len(run.nets) == 2
        run.loss(pair_batch())[0].backward()
        first, second = ([p.grad for p in net.parameters()] for net in run.nets)
        assert any(g is not None and bool((g != 0).any()) for g in first)
        assert all(g is None or bool((g == 0).all()) for g in second)


def test_everything_learns_and_nothing_flows_to_the_reference():
    policy, reference = models()
    with SparsePo(mask="independent").attach(policy, reference) as run:
        groups = run.groups(1e-3, mask_lr=1e-2, weight_decay=0.5)
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.5), (1e-2, 0.01)]
        optimizer = torch.optim.AdamW(groups)
        run.loss(pair_batch())[0].backward()
        before = [p.clone() for p in (*policy.parameters(), *run.mask_parameters)]
        optimizer.step()
        after = [*policy.parameters(), *run.mask_parameters]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.grad is not None and b.grad.any())
        for net in run.nets:
            assert all(layer.weight.grad.abs().max() > 0 for layer in net.layers)
    assert all(p.grad is None for p in reference.parameters())
    with SparsePo(mask="mapo").attach(policy, reference) as run:
        assert run.mask_parameters == [] and len(run.groups(1e-3)) == 1


def test_the_penalty_is_the_l1_norms_of_both_responses():
    policy, reference = models()
    for settings in ({"l1_u": 0.3, "l1_d": 0.2}, {"l1_u": 0.3, "l1_d": 0.2, "on_kl": False}):
        found = {}
        for name, more in (("with", settings), ("without", {"on_kl": settings.get("on_kl", True)})):
            with SparsePo(mask="independent", dropout=0.0, **more).attach(policy, reference, seed=3) as run:
                shaken(run)
                found[name] = run.loss(pair_batch())[0]
                masks = run.masks(pair_batch())
        norms = {k: sum(masks[f"{side}.{k}"].values.sum(1) for side in ("chosen", "rejected")) for k in ("reward", "kl")}
        wanted = 0.3 * norms["reward"] + (0.2 * norms["kl"] if settings.get("on_kl", True) else 0.0)
        torch.testing.assert_close(found["with"] - found["without"], wanted.mean())


# --- the network ----------------------------------------------------------------------------------------------------


def test_the_network_on_numbers_worked_out_by_hand():
    net = TokenMaskNet(2, 2, dropout=0.0)
    with torch.no_grad():
        for layer, weight, bias in zip(net.layers, ([1.0, 0.0], [0.0, 2.0]), (0.5, 0.0), strict=True):
            layer.weight.copy_(torch.tensor([weight]))
            layer.bias.fill_(bias)
        net.mixer.weight.copy_(torch.tensor([[1.0, -0.25]]))
    states = [torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]), torch.tensor([[[0.0, 8.0], [8.0, 0.0]]])]
    # LayerNorm of two numbers: (1, -1) where the first is greater, else (-1, 1). z1 = relu(1.5), relu(-0.5) = 1.5, 0;
    # z2 = relu(2), relu(-2) = 2, 0; m = relu(1.5 - 0.5), relu(0) = 1, 0.
    assert net(states)[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_it_starts_the_same_everywhere_and_the_wide_form_too():
    states = [torch.randn(2, 4, 8, generator=generator(i)) for i in range(3)]
    for inner in (0, 5):
        net = TokenMaskNet(8, 3, inner=inner, start=0.4, dropout=0.0)
        assert torch.allclose(net(states), torch.full((2, 4), 0.4))
        net(states).sum().backward()
        assert all(layer.weight.grad.abs().max() > 0 for layer in net.layers)
    assert not torch.equal(TokenMaskNet(8, 1, inner=5).inner[0].weight, TokenMaskNet(8, 1, inner=5, seed=1).inner[0].weight)
    with pytest.raises(BadInput, match="over 3 layers was given the states of 2"):
        net(states[:2])


@pytest.mark.parametrize("mask", ["common", "mapo"])
def test_a_tokens_weight_does_not_know_the_token_nor_what_comes_after(mask):
    policy, reference = models()
    pairs, ids = pair_batch(), pair_batch().ids.clone()
    ids[:, 5] = ids[:, 5] % 10 + 1
    labels = ids.masked_fill(pairs.labels == -100, -100)
    with SparsePo(mask=mask, dropout=0.0).attach(policy, reference) as run:
        shaken(run)
        # MaPO's raw activity has the property; its scale is the whole response's, so it is looked at before.
        now = [_raw(run, p) for p in (pairs, Pairs(ids, pairs.attention, labels))]
    same = (now[0] == now[1]).all(0)
    assert bool(same[:5].all()) and not bool(same[5:].all())


def _raw(run, pairs):
    if run.method.mask == "common":
        return run._read(pairs)[1].reward
    from maskwright.inputs.sparsepo.activations import Watch

    with torch.no_grad(), Watch(run.reference, "residual") as watch:
        run.reference(input_ids=pairs.ids, attention_mask=pairs.attention)
    return torch.stack(watch.seen["residual"]).sum(0)[:, :-1]


# --- looking at masks -----------------------------------------------------------------------------------------------


def test_masks_are_soft_masks_that_save_and_tell_their_sparsity(tmp_path):
    policy, reference = models()
    pairs = pair_batch()
    with SparsePo(mask="independent", dropout=0.9).attach(policy, reference, seed=5) as run:
        shaken(run)
        found, told = run.masks(pairs), run.sparsity(pairs)
        assert all(net.training for net in run.nets)  # back in training after the look without dropout
        run.save_masks(pairs, tmp_path / "masks.safetensors")
    loaded = store.load(tmp_path / "masks.safetensors")
    assert list(loaded) == ["chosen.reward", "rejected.reward", "chosen.kl", "rejected.kl"]
    assert all(torch.equal(loaded[k].values, found[k].values) for k in found)
    assert loaded.made_by["method"] == "sparsepo" and loaded.made_by["seed"] == 5
    values = torch.cat([found["chosen.reward"].values, found["rejected.reward"].values])
    assert bool((values[~pairs.response] == 0).all())
    used = values[pairs.response]
    assert told["reward"].zeros == float((used == 0).double().mean()) and 0 < told["reward"].zeros < 1
    assert told["reward"].greatest == float(used.max())
    assert told["kl"] != told["reward"]


def test_random_masks_are_new_each_time_and_seeded():
    policy, reference = models()
    drawn = []
    for seed in (0, 0, 1):
        with SparsePo(mask="random").attach(policy, reference, seed=seed) as run:
            drawn.append([run.masks(pair_batch())["chosen.kl"].values for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][0], drawn[2][0]) and drawn[0][0].max() < 1
    assert torch.equal(SparsePo(mask="random").keep(torch.zeros(2, 3), rng=generator(1)).values,
                       torch.rand(2, 3, generator=generator(1)))  # fmt: skip


def test_a_ceiling_bounds_the_weights_and_last_reads_one_layer():
    policy, reference = models()
    with SparsePo(ceiling=0.25, last=True).attach(policy, reference) as run:
        assert len(run.nets[0].layers) == 1
        assert run.sparsity(pair_batch())["reward"].greatest == 0.25


def test_settings_that_cannot_be_are_refused():
    for settings, words in (
        ({"mask": "best"}, "not 'best'"),
        ({"beta": 0.0}, "above 0"),
        ({"ceiling": math.nan}, "above 0"),
        ({"l1_u": -1.0}, "at least 0"),
        ({"l1_d": math.nan}, "at least 0"),
        ({"mask": "mapo", "l1_u": 0.1}, "learned masks"),
        ({"dropout": 1.0}, "dropout"),
        ({"start": 0.0}, "start"),
        ({"hooks": ("heads",)}, "heads"),
        ({"hooks": ()}, "none"),
    ):
        with pytest.raises(BadInput, match=words):
            SparsePo(**settings)
    with pytest.raises(BadInput, match="attach it"):
        SparsePo().keep(torch.zeros(2, 3))
    nameless = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(BadInput, match="Linear has no config"), SparsePo().attach(small(), nameless):
        pass
