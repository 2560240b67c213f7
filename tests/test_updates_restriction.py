"""`restrict` and the two phases: what is frozen stays bit for bit, whatever the optimiser does."""

import warnings

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates import TwoPhase, add, restrict, two_phase


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(32, 8, generator=rng), torch.randint(3, (32,), generator=rng)


def masks_of(model, share=0.3):
    rng = torch.Generator().manual_seed(4)
    return MaskSet(
        {n: Mask(torch.rand(model.get_parameter(n).shape, generator=rng) < share) for n in ("0.weight", "3.weight")}
    )


def steps(model, optimizer, number=3, clip=None):
    for i in range(number):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dropped_entries_keep_their_bits_and_have_no_state(kind):
    model, start = net(), net().state_dict()
    masks = masks_of(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 2)  # momentum from before must not move them either
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with restrict(optimizer, masks, model):
        steps(model, optimizer)
    for name, mask in masks.items():
        now = model.state_dict()[name]
        assert torch.equal(now[~mask.keep], start[name][~mask.keep]) and not torch.equal(
            now[mask.keep], start[name][mask.keep]
        )
        for value in optimizer.state[model.get_parameter(name)].values():
            if isinstance(value, torch.Tensor) and value.shape == now.shape:
                assert (value[~mask.keep] == 0).all()
    assert not torch.equal(model.state_dict()["3.bias"], start["3.bias"])  # no mask: free
    steps(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(not w._post_accumulate_grad_hooks for w in model.parameters())


def test_kept_entries_move_as_if_alone():
    """AdamW is entrywise: where nothing else depends on the frozen entries, kept ones move as in a plain run."""
    model, other = nn.Linear(6, 1, bias=False), nn.Linear(6, 1, bias=False)
    other.load_state_dict(model.state_dict())
    keep = torch.tensor([[True, False, True, False, False, True]])
    a, b = (torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, other))
    grads = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    with restrict(a, {"weight": Mask(keep)}, model):
        for grad in grads:
            for m, o in ((model, a), (other, b)):
                m.weight.grad = grad.clone()
                o.step()
    assert torch.equal(model.weight[keep], other.weight[keep])


def test_clipping_sees_the_masked_gradient():
    model = net()
    masks = masks_of(model)
    with restrict(torch.optim.SGD(model.parameters(), lr=0.1), masks, model):
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, mask in masks.items():
            assert (model.get_parameter(name).grad[~mask.keep] == 0).all()
        x, y = batch(1)
        nn.functional.cross_entropy(model(x), y).backward()  # accumulated
        assert (model.get_parameter("0.weight").grad[~masks["0.weight"].keep] == 0).all()


def test_names_from_the_optimiser_and_what_is_refused():
    model = net()
    masks = masks_of(model)
    with restrict(torch.optim.AdamW(model.named_parameters(), lr=0.1), masks):
        pass
    with (
        pytest.raises(BadInput, match="knows no names"),
        restrict(torch.optim.AdamW(model.parameters(), lr=0.1), masks),
    ):
        pass
    with (
        pytest.raises(BadInput, match="0.weight: masked, but the optimiser does not hold it"),
        restrict(torch.optim.AdamW(model[3].parameters(), lr=0.1), masks, model),
    ):
        pass
    with (
        pytest.raises(BadInput, match=r"3.weight: the mask has shape \(2, 2\)"),
        restrict(torch.optim.AdamW(model.parameters()), {"3.weight": Mask(torch.ones(2, 2, dtype=torch.bool))}, model),
    ):
        pass


def test_an_optimiser_without_names_is_refused_with_what_to_do():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(BadInput, match=r"restrict\(optimizer, masks, model=\.\.\.\)"), restrict(optimizer, masks_of(model)):
        pass
    with restrict(optimizer, masks_of(model), model=model):  # what it says to do
        steps(model, optimizer)


def test_without_the_rest_only_masked_entries_move():
    model = net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with restrict(optimizer, masks_of(model), model, rest=False):
        steps(model, optimizer)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"0.weight", "3.weight"}


# Two phases


def trainer(lr=0.05, number=4, **kinds):
    def train(phase):
        optimizer = torch.optim.AdamW(phase.trainable, lr=lr, **kinds)
        with phase.restrict(optimizer):
            for i in range(number):
                x, y = batch(i)
                optimizer.zero_grad()
                (nn.functional.cross_entropy(phase.model(x), y) + phase.penalty()).backward()
                optimizer.step()

    return train


def test_selection_over_all_tensors_is_the_sheets_and_ties_fall_low():
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(3, 1, bias=False)})
    with two_phase(TwoPhase(model, 2)) as run, torch.no_grad():
        model["a"].weight += torch.tensor([[0.1, -0.5]])
        model["b"].weight += torch.tensor([[0.3, 0.2, -0.05]])
        run.select(2)
        assert run.masks()["a.weight"].keep.tolist() == [[False, True]]
        assert run.masks()["b.weight"].keep.tolist() == [[True, False, False]]
        assert all(torch.equal(w, run.origin[n]) for n, w in model.named_parameters())
    model = nn.Linear(6, 1, bias=False)
    nn.init.zeros_(model.weight)
    with two_phase(TwoPhase(model, 3)) as run, torch.no_grad():
        model.weight += torch.tensor([[0.5, 1.0, 0.5, -0.5, 0.5, 0.0]])
        run.select(3)
        assert run.masks()["weight"].keep.tolist() == [[True, True, True, False, False, False]]


def test_only_what_moved_is_selected_when_too_little_did():
    model = nn.Linear(6, 1, bias=False)
    with two_phase(TwoPhase(model, 4)) as run:
        with torch.no_grad():
            model.weight[0, 2] += 1
        with pytest.warns(UserWarning, match="4 entries were asked for but only 1 moved"):
            run.select(4)
        assert run.masks().count == 1


def test_after_the_sparse_phase_frozen_entries_are_the_bases():
    model, base = net(), net()
    with two_phase(TwoPhase(model, 20, full=("3.bias",))) as run:
        deltas = run.fit(trainer(weight_decay=0.3))
        masks = run.masks()
        assert masks.count == 20 and set(masks) == {"0.weight", "0.bias", "3.weight"}  # norms and the head are not maskable
    for name, mask in masks.items():
        now, old = model.state_dict()[name], base.state_dict()[name]
        assert torch.equal(now[~mask.keep], old[~mask.keep])
    assert torch.equal(model.state_dict()["1.weight"], base.state_dict()["1.weight"])
    assert deltas.count <= 20 and list(deltas.full) == ["3.bias"] and all(p.requires_grad for p in model.parameters())
    again = net()
    add(again, deltas, check="full")
    for name, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=2e-7)


def test_all_entries_are_plain_fine_tuning_and_none_leaves_the_model():
    model, plain = net(), net()
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("1."))
    for name, weight in plain.named_parameters():
        weight.requires_grad_(not name.startswith("1."))
    with two_phase(TwoPhase(model, total)) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an entry may not have moved at all
        run.fit(trainer())
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    steps(plain, optimizer, 4)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6)
    model = net()
    with two_phase(TwoPhase(model, 0, full=("3.*",))) as run:
        deltas = run.fit(trainer())
    assert deltas.count == 0 and torch.equal(model[0].weight, net()[0].weight)
    assert not torch.equal(model[3].weight, net()[3].weight) and set(deltas.full) == {"3.weight", "3.bias"}


def test_the_penalty_is_the_papers():
    model = nn.Linear(3, 2, bias=False)
    with two_phase(TwoPhase(model, 2)) as run:
        seen = {}

        def train(phase):
            seen[phase.name] = float(phase.penalty().detach())
            with torch.no_grad():
                model.weight += torch.tensor([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0]])
            value = phase.penalty()
            value.backward()
            seen[phase.name + " moved"], seen[phase.name + " grad"] = float(value.detach()), model.weight.grad.clone()
            model.weight.grad = None

        run.fit(train, l1=(0.6, 1.2))
    assert seen["full"] == 0 and seen["full moved"] == pytest.approx(0.6 * 1.5 / 6, rel=1e-5)
    assert torch.allclose(seen["full grad"], torch.tensor([[0.1, 0, -0.1], [0, 0, 0]]))
    assert seen["sparse moved"] == pytest.approx(1.2 * 1.5 / 6, rel=1e-5)


def test_rounds_add_up_and_chance_draws():
    model = net()
    with two_phase(TwoPhase(model, 21)) as run:
        counts = []

        def train(phase):
            counts.append((phase.name, run.masks().count))
            trainer()(phase)

        deltas = run.fit(train, rounds=2)
        assert counts == [("full", 0), ("sparse", 10), ("full", 10), ("sparse", 21)] and deltas.count <= 21
    drawn = []
    for seed in (0, 0, 1):
        with two_phase(TwoPhase(net(), 30, chance=True, seed=seed)) as run:
            run.fit(trainer())
            drawn.append(run.masks())
    assert drawn[0].count == 30 and drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match=r"99999 entries were asked for, \d+ of"):
        TwoPhase(net(), 99999)
    with pytest.raises(BadInput, match="'decoder' matches no parameter"):
        TwoPhase(net(), 1, where=("decoder",))
    with pytest.raises(BadInput, match="rounds"), two_phase(TwoPhase(net(), 1)) as run:
        run.fit(trainer(), rounds=0)
