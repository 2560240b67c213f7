"""LT-SFT by its sheet's exact checks (the parts: tests/test_updates_restriction.py, tests/test_updates_deltas.py)."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import Deltas, add
from maskwright.updates.lt_sft import LtSft

MASKABLE = 6 * 12 + 12 + 12 * 4 + 4


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value.view(torch.int32), other[name].view(torch.int32)) for name, value in one.items())


def steps(model, parameters, seed, penalty=lambda: 0.0, clip=None):
    """A generator: an optimiser with decay and momentum, to be entered around, then ten steps of it."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 6, generator=rng), torch.randint(4, (64,), generator=rng)
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    yield optimizer
    for _ in range(10):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + penalty()).backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def train(seed, told=None, clip=None):
    def run(phase):
        if told is not None:
            told[phase.name] = state(phase.model)
        loop = steps(phase.model, phase.trainable, seed, phase.penalty, clip)
        with phase.restrict(next(loop)):
            list(loop)

    return run


# Sheet: sum(b) == k exactly, ties by value then index; where fewer moved only those, with a warning; the selection is that
# of brute force (flatten all tensors, sort, take k).


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_selection_is_brute_force_over_all_tensors(data):
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    moved = [data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)) for n in sizes]  # many ties, many zeros
    flat = [abs(d) for part in moved for d in part]
    count = data.draw(st.integers(0, len(flat)))
    model = nn.ModuleList(nn.Linear(n, 1, bias=False) for n in sizes)
    for layer in model:
        nn.init.constant_(layer.weight, 2.0)
    method = LtSft(count=count) if count else LtSft(density=0.0)
    with method.attach(model) as run, torch.no_grad(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for layer, part in zip(model, moved, strict=True):
            layer.weight += torch.tensor([part])
        run.select(run.count)
        found = [bool(k) for mask in run.masks().values() for k in mask.keep.flatten()]
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    wanted = {i for i in best if flat[i] > 0}
    assert found == [i in wanted for i in range(len(flat))]
    assert sum(found) == min(count, sum(d > 0 for d in flat)) and len(heard) == (len(wanted) < count)


def test_the_sheets_example():
    model = nn.ModuleDict({"A": nn.Linear(2, 1, bias=False), "B": nn.Linear(3, 1, bias=False)})
    for layer in model.values():
        nn.init.zeros_(layer.weight)
    with LtSft(count=2).attach(model) as run, torch.no_grad():
        model["A"].weight += torch.tensor([[0.1, -0.5]])
        model["B"].weight += torch.tensor([[0.3, 0.2, -0.05]])
        run.select(run.count)
        masks = run.masks()
    assert masks["A.weight"].keep.tolist() == [[False, True]] and masks["B.weight"].keep.tolist() == [[True, False, False]]


def test_embedding_rows_that_never_moved_are_not_selected():
    model = nn.Sequential(nn.Embedding(20, 3), nn.Flatten(), nn.Linear(3, 2, bias=False))

    def run(phase):
        optimizer = torch.optim.AdamW(phase.trainable, lr=0.1, weight_decay=0.0)
        with phase.restrict(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(torch.tensor([[4], [7]])), torch.tensor([0, 1])).backward()
                optimizer.step()

    with pytest.warns(UserWarning, match="60 entries were asked for but only 12 moved"):
        found = LtSft(count=60).fit(model, run)
    assert found.count <= 12 and set((found["0.weight"].indices // 3).tolist()) == {4, 7}


# Sheet: after phase 2, theta2 == theta0 bit for bit where b = 0; nnz(phi) <= k.


@pytest.mark.parametrize("clip", [None, 0.1])
def test_what_was_not_selected_is_the_bases_to_the_bit(clip):
    model, base, told = net(), state(net()), {}
    with LtSft(density=0.1, full=("3.bias",)).attach(model) as run:
        found = run.fit(train(1, told, clip))
        masks = run.masks()
    k = round(0.1 * (MASKABLE - 4))
    assert masks.count == k and found.count <= k and found.made_by["method"] == "lt_sft"
    assert same(told["full"], base) and same(told["sparse"], base)  # rewound, the head too
    for name, value in model.state_dict().items():
        if name in masks:
            lost = ~masks[name].keep
            assert torch.equal(value[lost].view(torch.int32), base[name][lost].view(torch.int32))
    assert same({n: v for n, v in state(model).items() if n.startswith("1.")}, base)  # norms are not trained
    with add(net(), found) as on:
        assert all(torch.allclose(value, state(model)[name], atol=1e-7) for name, value in state(on.model).items())


def test_rounds_add_to_what_is_there():
    counts = []

    def run(phase):
        counts.append((phase.name, phase.run.masks()))
        train(3)(phase)

    found = LtSft(count=9, rounds=2).fit(net(), run)
    assert [(name, masks.count) for name, masks in counts] == [("full", 0), ("sparse", 4), ("full", 4), ("sparse", 9)]
    first, last = counts[1][1], counts[3][1]
    assert all((last[name].keep | ~first[name].keep).all() for name in first) and found.count <= 9


# Sheet: apply then revert restores within 1 ulp, store and restore to the bit; a file comes back bit for bit.


def test_added_and_taken_off(tmp_path):
    found = LtSft(density=0.3, full=("3.*",)).fit(net(), train(1))
    base, before = net(), state(net())
    with add(base, found):
        assert torch.equal(base[3].weight, found.full["3.weight"]) and not torch.equal(base[0].weight, before["0.weight"])
    assert same(state(base), before)
    phi = found.without_full()
    add(base, phi)
    on = state(base)
    add(base, -phi)
    for name, value in state(base).items():
        larger = torch.maximum(before[name].abs(), on[name].abs())
        ulp = torch.nextafter(larger, torch.tensor(torch.inf)) - larger
        assert ((value - before[name]).abs() <= ulp).all()
    found.save(tmp_path / "phi.safetensors")
    back = Deltas.load(tmp_path / "phi.safetensors")
    assert list(back) == list(found) and back.base == found.base and same(back.full, found.full)
    for name in found:
        assert torch.equal(back[name].indices, found[name].indices)
        assert torch.equal(back[name].values.view(torch.int32), found[name].values.view(torch.int32))


# Sheet: k = all is ordinary fine-tuning from theta0; k = 0 leaves the model, and its head is trained.


def plain(names, seed):
    model = net()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(names))
    list(steps(model, [p for p in model.parameters() if p.requires_grad], seed))
    return state(model)


def test_all_entries_are_ordinary_fine_tuning():
    model = net()
    LtSft(density=1.0).fit(model, train(2))
    assert same(state(model), plain(("0.", "3."), 2))


def test_no_entry_trains_the_head_alone():
    model = net()
    found = LtSft(density=0.0, full=("3.*",)).fit(model, train(2))
    assert found.count == 0 and set(found.full) == {"3.weight", "3.bias"}
    assert same(state(model), plain(("3.",), 2)) and not torch.equal(model[3].weight, net()[3].weight)
    assert torch.equal(model[0].weight, net()[0].weight)


# Sheet: phi_a + phi_b is commutative; a then b is a + b up to rounding.


def test_two_differences_compose():
    one, two = (LtSft(density=0.1).fit(net(), train(seed)) for seed in (1, 2))
    both = [{name: (a + b)[name] for name in sorted(a + b)} for a, b in ((one, two), (two, one))]
    for name, delta in both[0].items():
        assert torch.equal(delta.indices, both[1][name].indices) and torch.equal(delta.values, both[1][name].values)
    models = [net() for _ in range(4)]
    add(models[0], one), add(models[0], two)
    add(models[1], two), add(models[1], one)
    add(models[2], one + two)
    add(models[3], one, two)
    for name, value in net().named_parameters():
        wanted = value.detach() + sum(d[name].dense() for d in (one, two) if name in d)
        for model in models:
            assert torch.allclose(model.get_parameter(name), wanted, atol=1e-6)
    assert 0 < one.overlap(two) < 1


def test_a_task_trained_on_a_language_is_a_difference_from_there():
    language = LtSft(density=0.2, where=("0.*",)).fit(net(), train(1))
    model = net()
    add(model, language)
    there = state(model)
    task = LtSft(density=0.1, full=("3.*",)).fit(model, train(2))
    assert torch.allclose(there["0.weight"] + task["0.weight"].dense(), model[0].weight, atol=1e-7)
    base = net()
    with pytest.raises(BadInput, match="made for another base"):
        add(base, task)
    with add(base, language, task, check="none"):
        assert all(torch.allclose(value, state(model)[name], atol=1e-6) for name, value in state(base).items())


# Sheet: the L1 term is lambda * sum |theta - theta0| / N, its gradient lambda * sign / N, zero at theta0.


def test_the_pull_to_the_start():
    model, seen = net(), {}
    number = sum(p.numel() for p in model.parameters())  # frozen norms are counted

    def run(phase):
        start = state(model)
        assert float(phase.penalty().detach()) == 0
        phase.penalty().backward()
        assert all(not p.grad.any() for p in phase.trainable if p.grad is not None)
        with torch.no_grad():
            move = torch.zeros(12, 6)
            move[0, :3] = torch.tensor([0.5, -1.0, 2.0])
            model[0].weight += move
            model[3].bias += 5.0  # the head is not pulled
        model.zero_grad()
        value = phase.penalty()
        value.backward()
        gap = model[0].weight.detach() - start["0.weight"]
        seen[phase.name] = (float(value.detach()) * number, model[0].weight.grad * number, gap.sign())
        model.zero_grad()

    LtSft(count=3, full=("3.bias",), full_l1=0.6, sparse_l1=1.2).fit(model, run)
    for name, l1 in (("full", 0.6), ("sparse", 1.2)):
        value, gradient, sign = seen[name]
        assert value == pytest.approx(l1 * 3.5, rel=1e-5) and torch.allclose(gradient, l1 * sign)


def test_chance_draws_the_same_number_without_a_full_phase():
    names = []

    def run(phase):
        names.append(phase.name)
        train(0)(phase)

    drawn = []
    for seed in (1, 1, 2):
        with LtSft(count=7, chance=True).attach(net(), seed=seed) as held:
            held.fit(run)
            drawn.append(held.masks())
    assert set(names) == {"sparse"} and drawn[0].count == 7
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_settings_that_make_no_sense_are_refused():
    nan = float("nan")
    bad = [{"density": 1.1}, {"density": nan}, {"count": -1}, {"rounds": 0}, {"eps": -1.0}, {"full_l1": -0.1}]
    for settings_ in (*bad, {"eps": nan}, {"sparse_l1": nan}, {"full_l1": float("inf")}):
        with pytest.raises(BadInput) as told:
            LtSft(**settings_)
        assert "\n" not in str(told.value)
    with pytest.raises(BadInput, match="9999 entries were asked for, 136 of 4 tensors"), LtSft(count=9999).attach(net()):
        pass
    with pytest.raises(BadInput, match="'classifier' matches no parameter"), LtSft(full=("classifier",)).attach(net()):
        pass
