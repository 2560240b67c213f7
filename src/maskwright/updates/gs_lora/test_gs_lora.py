import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.lab.models import Vit
from maskwright.updates.gs_lora import GsLora, forget, harmonic, prototypes
from maskwright.updates.gs_lora.losses import of_classes
from maskwright.updates.gs_lora.method import mlp_layers
from maskwright.updates.lora import Lora


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.mix(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Layer(), Layer(), Layer()), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(x))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def rows(classes, each=12, seed=0):
    y = torch.tensor(classes).repeat(each)
    noise = torch.randn(len(y), 8, generator=generator(seed))
    return 0.4 * noise + 2 * F.one_hot(y, 8).float(), y


def batches(classes, size=8, **how):
    x, y = rows(classes, **how)
    return list(zip(x.split(size), y.split(size), strict=True))


def recogniser():
    model = net().train()
    x, y = rows([0, 1, 2, 3])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def right(model, classes):
    x, y = rows(classes, seed=9)
    return float((model(x).argmax(-1) == y).float().mean())


def both(remain=(2, 3), bad=(0, 1)):
    return batches(list(remain)), batches(list(bad))


def test_harmonic_mean():
    assert harmonic(80, 80) == 80
    assert harmonic(0, 80) == 0 and harmonic(-3, 3) == 0 and harmonic(-80, 80) == 0 and harmonic(5, 0) == 0
    assert harmonic(0.5, 1.0) == pytest.approx(2 / 3)


def test_prototypes_are_mean_outputs_in_eval_mode():
    model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)).train()
    x, y = rows([0, 2])
    found = prototypes(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert set(found) == {0, 2} and model.training
    torch.testing.assert_close(found[2], model[0](x[y == 2]).mean(0).detach())
    inner = prototypes(model, [(x, y)], lambda m, x: (m(x), x))
    torch.testing.assert_close(inner[0], x[y == 0].mean(0))
    assert of_classes(found, torch.tensor([2, 0, 2]))[0].equal(found[2])
    with pytest.raises(BadInput, match="class 1 has no prototype"):
        of_classes(found, torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="no rows"):
        prototypes(model, [])


def test_the_mlp_layers_are_found_by_shape():
    assert list(mlp_layers(net())) == [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]
    vit = Vit(16, 4, layers=2, width=16, heads=2)
    assert list(mlp_layers(vit)) == [f"blocks.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)]
    with pytest.raises(BadInput, match="no MLP"):
        mlp_layers(nn.Sequential(nn.Sequential(nn.Linear(8, 8))))


@pytest.mark.parametrize(("by", "number"), [("block", 3), ("module", 6), ("matrix", 12)])
def test_groupings(by, number):
    with GsLora(rank=2, group_by=by).attach(net()) as run:
        assert len(run.groups) == number
        members = [id(m) for group in run.groups.values() for m in group]
        assert sorted(members) == sorted(id(p) for p in run.trainable)
        if by == "block":
            assert list(run.groups) == ["blocks.0", "blocks.1", "blocks.2"] and len(run.groups["blocks.1"]) == 4
            want = math.sqrt(sum(m.square().sum().item() for m in run.groups["blocks.1"]))
            assert run.group_norms()["blocks.1"] == pytest.approx(want)
        assert run.penalty().item() == pytest.approx(sum(run.group_norms().values()), rel=1e-5)


def test_at_step_zero_the_output_is_the_models_own():
    model, (x, _) = net(), rows([0, 1])
    base = model(x)
    with GsLora().attach(model) as run:
        assert torch.equal(model(x), base)
        assert not any(run.effects().values()) and all(run.group_norms().values())


def test_the_written_out_loss():
    model = net()
    (xr, yr), (xf, yf) = rows([2, 3]), rows([0, 1])
    centres = {0: torch.randn(4, generator=generator(1)), 1: torch.zeros(4), 2: torch.ones(4), 3: torch.zeros(4)}
    method = GsLora(rank=2, alpha=0.3, beta=0.2, bound=3.0, forget_weight=0.4, remain_weight=0.5, proto_bound=2.0)
    with method.attach(model) as run:
        r, f = model(xr), model(xf)
        total, parts = run.loss((r, yr), (f, yf), centres=centres)
        targets = torch.stack([centres[c] for c in yf.tolist()]), torch.stack([centres[c] for c in yr.tolist()])
        kl = [
            F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="batchmean") for o, t in zip((f, r), targets, strict=True)
        ]
        want = F.cross_entropy(r, yr) + 0.2 * F.relu(3 - F.cross_entropy(f, yf)) + 0.3 * run.penalty()
        want = want + 0.4 * F.relu(2 - kl[0]) + 0.5 * kl[1]
        torch.testing.assert_close(total, want)
        assert parts["kl_forget"] == pytest.approx(float(kl[0].detach()), rel=1e-4)
        assert set(parts) == {"remain", "forget", "lasso", "kl_forget", "kl_remain"}
        with pytest.raises(BadInput, match="no prototypes"):
            run.loss((r, yr), (f, yf))
        apart, _ = run.loss((r, yr), (f, yf), centres=centres, outputs=(f, r))  # another output is compared
        assert float(apart.detach()) != pytest.approx(float(total.detach()))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("known", [False, True], ids=["no prototypes", "prototypes that weigh nothing"])
def test_without_its_terms_it_is_a_plain_lora_run(known):
    """alpha = 0 and both weights of ++ 0: step for step LoRA under the same loss and seed."""
    remain, bad = both()
    ours, plain = recogniser(), recogniser()
    centres = prototypes(ours, [*remain, *bad]) if known else None
    method = GsLora(rank=2, alpha=0.0, beta=0.2)
    forget(ours, method, remain, bad, epochs=2, lr=0.05, final_lr=0.05, centres=centres, seed=3)
    where = tuple(f"{n.removesuffix('.weight')}" for n in mlp_layers(plain))
    with Lora(rank=2, alpha=2.0, where=where).attach(plain, seed=3) as run:
        plain.train()
        optimizer = torch.optim.AdamW(run.trainable, lr=0.05, weight_decay=0.0)
        for (xr, yr), (xf, yf) in [*zip(remain, bad, strict=True)] * 2:
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(xr), yr) + 0.2 * F.relu(10 - F.cross_entropy(plain(xf), yf))
            loss.backward()
            optimizer.step()
        run.merge()
    assert same(state(ours), state(plain))


@pytest.mark.parametrize("method", [GsLora(rank=2, alpha=0.0, bound=1e-3), GsLora(rank=2, alpha=0.0, beta=0.0)])
def test_beyond_the_bound_or_without_beta_it_is_plain_fine_tuning_on_the_rest(method):
    """Written out here, without any batch of the classes to forget."""
    remain, bad = both()
    ours, plain = net(), net()
    forget(ours, method, remain, bad, epochs=2, lr=0.05, final_lr=0.05, seed=3)
    where = tuple(f"{n.removesuffix('.weight')}" for n in mlp_layers(plain))
    with Lora(rank=2, alpha=2.0, where=where).attach(plain, seed=3) as run:
        optimizer = torch.optim.AdamW(run.trainable, lr=0.05, weight_decay=0.0)
        for x, y in remain * 2:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
        run.merge()
    assert same(state(ours), state(plain))


def test_without_beta_nothing_is_forgotten_and_with_it_the_classes_go():
    model = recogniser()
    assert right(model, [0, 1]) > 0.9 and right(model, [2, 3]) > 0.9
    kept = copy.deepcopy(model)
    forget(kept, GsLora(beta=0.0), *both(), epochs=5, lr=0.02)
    assert right(kept, [0, 1]) > right(model, [0, 1]) - 0.1
    told = forget(model, GsLora(alpha=1e-3, beta=0.5), *both(), epochs=25, lr=0.02)
    assert right(model, [0, 1]) < 0.25 and right(model, [2, 3]) > 0.9
    assert told.steps == 75 and set(told.terms) == {"remain", "forget", "lasso"}


def test_merged_output_equals_unmerged_and_a_fresh_pair_changes_nothing():
    model, (x, y) = recogniser(), rows([0, 1, 2, 3])
    with GsLora(rank=2).attach(model) as run:
        optimizer = torch.optim.Adam(run.trainable, 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        attached = model(x)
        run.merge()
    merged = model(x)
    torch.testing.assert_close(merged, attached, rtol=1e-5, atol=1e-5)
    with GsLora(rank=2).attach(model, seed=1):
        assert torch.equal(model(x), merged)


def test_pruned_groups_are_exactly_zero_for_good_and_leave_their_weights_alone():
    model = recogniser()
    base = state(model)
    (xr, yr), (xf, yf) = rows([2, 3]), rows([0, 1])
    with GsLora(rank=2).attach(model) as run:
        optimizer = torch.optim.SGD(run.trainable, 0.05)

        def step():
            optimizer.zero_grad()
            run.loss((model(xr), yr), (model(xf), yf))[0].backward()
            optimizer.step()

        step()
        for matrix in run.groups["blocks.1"]:
            matrix.data.mul_(1e-4)
        assert run.zero_groups() == ["blocks.1"] == run.prune_groups(0.01)
        step()
        assert run.group_norms()["blocks.1"] == 0 and run.zero_groups(0.0) == ["blocks.1"]
        masks = run.masks().check()
        assert [n for n, m in masks.items() if not m.count] == ["blocks.1.up.weight", "blocks.1.down.weight"]
        assert masks.density == pytest.approx(2 / 3)
        run.merge()
    after = state(model)
    assert torch.equal(base["blocks.1.up.weight"], after["blocks.1.up.weight"])
    assert not torch.equal(base["blocks.0.up.weight"], after["blocks.0.up.weight"])


def test_momentum_does_not_revive_a_zeroed_group_and_with_none_left_it_says_so():
    model = recogniser()
    (xr, yr), (xf, yf) = rows([2, 3]), rows([0, 1])
    with GsLora(rank=2, alpha=0.1).attach(model) as run:
        optimizer = torch.optim.AdamW(run.trainable, 0.05, weight_decay=0.1)
        for turn in range(6):
            optimizer.zero_grad()
            run.loss((model(xr), yr), (model(xf), yf))[0].backward()
            optimizer.step()
            if turn == 2:
                for matrix in run.groups["blocks.2"]:
                    matrix.data.zero_()
                assert run.prune_groups(0.0) == ["blocks.2"]
        assert run.group_norms()["blocks.2"] == 0 and run.group_norms()["blocks.0"] > 0
        for matrix in run.trainable:
            matrix.data.zero_()
        run.prune_groups(0.0)
        assert not run.alive and run.masks().density == 0
        with pytest.raises(BadInput, match="all 3 groups are 0"):
            run.loss((model(xr), yr), (model(xf), yf))


def test_a_pruned_matrix_takes_its_pair_out_of_the_mask():
    with GsLora(rank=2, group_by="matrix").attach(net()) as run:
        assert run.masks().density == 1.0  # B = 0 at the start is not a dropped group
        run.pairs["blocks.0.up.weight"].A.data.zero_()
        run.prune_groups(0.0)
        assert run.masks()["blocks.0.up.weight"].count == 0 and run.masks()["blocks.0.down.weight"].density == 1


def test_a_larger_alpha_zeroes_more_groups_until_nothing_is_forgotten():
    shares, accuracies = [], []
    for alpha in (0.0, 0.5, 50.0):
        model = recogniser()
        told = forget(model, GsLora(rank=2, alpha=alpha, proximal=True), *both(), epochs=20, lr=0.02)
        shares.append(told.zero_share)
        accuracies.append(right(model, [0, 1]))
        assert (told.masks.density == 0) == (alpha == 50.0)
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert accuracies[0] < 0.1 and accuracies[-1] > 0.9


def test_the_warm_up_the_pruning_and_the_running_mean_of_the_loop():
    lasso = []
    model = recogniser()
    forget(
        model,
        GsLora(alpha=0.1, alpha_epoch=2),
        *both(),
        epochs=3,
        on_step=lambda step, terms: lasso.append("lasso" in terms),
    )
    assert lasso == [False] * 6 + [True] * 3
    told = forget(recogniser(), GsLora(rank=2, alpha=0.5), *both(), epochs=10, lr=0.02, prune=0.5)
    assert told.zero_share > 0 and all(told.group_norms[name] == 0 for name in told.zero_groups)
    results = []
    for decay in (0.0, 0.9):
        model = recogniser()
        forget(model, GsLora(ema_decay=decay, ema_epoch=1), *both(), epochs=3, lr=0.02)
        results.append(state(model))
    assert not same(*results)


def test_the_running_mean_is_the_one_written_out():
    means = []
    values = [[nn.Parameter(torch.tensor([v]))] for v in (1.0, 2.0, 4.0)]
    from maskwright.updates.gs_lora.forget import _averaged

    for value in values:
        means = _averaged(means, value, 0.9)
    assert means[0].item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def test_plus_plus_uses_prototypes_of_logits_or_embeddings():
    method = GsLora(rank=2, alpha=0.0, forget_weight=0.5, proto_bound=5.0, beta=0.0)
    model = recogniser()
    everything = batches([0, 1, 2, 3])
    forget(model, method, *both(), epochs=15, lr=0.02, centres=prototypes(model, everything))
    assert right(model, [0, 1]) < 0.5

    def outputs(model, x):
        hidden = model.blocks(x)
        return model.head(hidden), hidden

    model = recogniser()
    centres = prototypes(model, everything, outputs)
    assert len(centres[0]) == 8
    told = forget(model, method, *both(), epochs=2, centres=centres, outputs=outputs)
    assert told.terms["kl_forget"] > 0
    with pytest.raises(BadInput, match="class 0 has no prototype"):
        forget(model, method, *both(), epochs=1, centres={k: v for k, v in centres.items() if k}, outputs=outputs)


def test_tasks_follow_each_other():
    """Two requests: what the first forgot stays forgotten, and the later remain set has no part in it."""
    model = recogniser()
    forget(model, GsLora(), batches([1, 2, 3]), batches([0]), epochs=15, lr=0.02, seed=0)
    forget(model, GsLora(), batches([2, 3]), batches([1]), epochs=15, lr=0.02, seed=1)
    assert right(model, [0]) < 0.2 and right(model, [1]) < 0.2 and right(model, [2, 3]) > 0.8


def test_what_the_loop_refuses_leaves_the_model_as_it_was():
    model = recogniser()
    before = state(model)
    remain, bad = both()
    for wrong, told in (
        ((remain, []), "forget set is empty"), (([], bad), "remain set is empty"),
        ((remain, batches([3, 0])), "class 3 is in the remain and in the forget set"),
        ((batches([2, 1]), batches([0]) + batches([1])), "class 1 is in"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=told):
            forget(model, GsLora(rank=2), *wrong, epochs=2)
    with pytest.raises(BadInput, match="the loss is"):
        forget(model, GsLora(rank=2), [(torch.full((2, 8), float("nan")), torch.tensor([2, 3]))], bad, epochs=1)
    with pytest.raises(BadInput, match="epochs >= 1"):
        forget(model, GsLora(), remain, bad, epochs=0)
    assert same(before, state(model)) and not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0}, {"bound": 0.0}, {"bound": -1.0}, {"proto_bound": 0.0}, {"alpha": -1.0}, {"beta": float("nan")},
        {"forget_weight": -0.1}, {"group_by": "layer"}, {"scale": 0.0}, {"ema_decay": 1.0}, {"ema_epoch": -1},
        {"bound": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(BadInput, match="gs_lora"):
        GsLora(**bad)


def test_it_attaches_to_nothing_else():
    with pytest.raises(BadInput, match="no Linear"), GsLora().attach(nn.Sequential(nn.Conv2d(1, 2, 3))):
        pass
    with pytest.raises(BadInput, match="matches no Linear"), GsLora(where=("tail",)).attach(net()):
        pass
    with GsLora(where=("mix",), rank=2).attach(net()) as run:  # attention in place of the MLP, by name
        assert list(run.pairs) == [f"blocks.{i}.mix.weight" for i in range(3)]
