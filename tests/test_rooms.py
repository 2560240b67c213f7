"""The contract: generated from the cards, every room passes it without a line of its own."""

import ast
import dataclasses
import inspect
import re

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.core.method import methods
from maskwright.core.score import Score
from maskwright.core.select import generator
from maskwright.weights import ByScore, MaskedTraining, OneShot, training

ALL = methods()
CARDS = methods("weights")
ONESHOT = [c for c in CARDS if c.when == "one-shot"]
TRAINING = [c for c in CARDS if c.when == "training"]
ids = pytest.mark.parametrize


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(Layer(), Layer())


def data(n=3):
    return [torch.randn(8, 5, 16, generator=generator(i)) for i in range(n)]


def method(card, **settings):
    return card.load()(**{**card.contract.tiny, **settings})


@ids("card", ALL, ids=lambda c: c.slug)
def test_card_readme_and_tests_are_there(card):
    assert card.path.name == card.slug and card.claim.endswith(".") and 1950 < card.year < 2030
    readme = (card.path / "README.md").read_text()
    fields = [f.name for f in dataclasses.fields(card.load())]
    for heading in ("What", "Use", "Settings", "Differences from the paper"):
        assert re.search(rf"^## {heading}$", readme, re.MULTILINE), heading
    assert [f for f in fields if f"`{f}`" not in readme] == []
    assert list(card.path.glob("test_*.py"))
    assert card.baseline or (card.path / "claim.py").exists()


@ids("card", ALL, ids=lambda c: c.slug)
def test_one_final_frozen_class_with_defaults(card):
    kind = card.load()
    assert kind.__final__ and kind.__dataclass_params__.frozen and kind.__doc__
    kind()
    numbers = [name for name, value in card.contract.tiny.items() if isinstance(value, (int, float)) and value is not True]
    bad = {"density": 1.5} if "density" in kind.__dataclass_fields__ else {numbers[0] if numbers else "n": -1}
    if bad == {"scale": -1}:  # a negative one forgets a task
        bad = {"scale": float("nan")}
    with pytest.raises(BadInput):
        kind(**bad)
    tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))
    code = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    places = "weights|updates|attention|inputs"
    others = {c.slug for c in methods()} - {card.slug}
    for found in code:
        match = re.match(rf"maskwright\.({places})\.(\w+)", found.module)
        assert not (match and match[2] in others), found.module


@ids("card", ONESHOT, ids=lambda c: c.slug)
def test_masks_density_determinism_and_untouched_model(card):
    model, before = net(), {k: v.clone() for k, v in net().state_dict().items()}
    masks = method(card).masks(model, data(), seed=1).check()
    assert masks.count == masks.total // 2
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert masks.equal(method(card).masks(net(), data(), seed=1))
    if card.contract.selects == "random":
        assert not masks.equal(method(card).masks(net(), data(), seed=2))
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    full = method(card, density=1.0).prune(model, data())
    assert full.density == 1.0 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert masks.made_by["method"] == card.slug


@ids("card", ONESHOT, ids=lambda c: c.slug)
def test_a_density_that_keeps_nothing_is_refused(card):
    if method(card).allocation.needs_scores:
        assert method(card, density=1e-9).masks(net(), data()).count == 0
        return
    with pytest.raises(BadInput):
        method(card, density=1e-9).masks(net(), data())


@ids("card", [c for c in ONESHOT if c.contract.selects == "score"], ids=lambda c: c.slug)
def test_kept_are_exactly_the_best_by_its_own_score(card, monkeypatch):
    seen = {}
    made = method(card)
    assert isinstance(made, ByScore)

    def spy(site):
        seen[site.name] = made.score(site)
        return seen[site.name]

    monkeypatch.setattr(type(made), "rank", lambda self, site: spy(site))
    monkeypatch.setattr(type(made), "solve", lambda self, site, counts: _solve(self, site, counts, spy))
    for name, mask in made.masks(net(), data()).items():
        kept, lost = seen[name][mask.keep], seen[name][~mask.keep]
        if made.within == "tensor":
            assert kept.min() >= lost.max()
        elif made.within == "row":
            worst = torch.where(mask.keep, seen[name], torch.inf).amin(1)
            assert (worst >= torch.where(mask.keep, -torch.inf, seen[name]).amax(1)).all()


def _solve(self, site, counts, score):
    from maskwright.core.select import select
    from maskwright.weights import Solved

    return Solved(select(score(site), site.pattern, counts))


@ids("card", ONESHOT, ids=lambda c: c.slug)
def test_save_load_other_model_nan_and_missing_calibration(card, tmp_path):
    masks = method(card).masks(net(), data())
    masks.save(tmp_path / "m.safetensors")
    assert MaskSet.load(tmp_path / "m.safetensors").equal(masks)
    with pytest.raises(BadInput, match=r"up\.weight"):
        masks.fits(nn.Sequential(nn.Linear(16, 16)))
    broken = net()
    with torch.no_grad():
        broken[1].up.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"1\.up\.weight"):
        method(card).masks(broken, data())
    if method(card).needs:
        with pytest.raises(BadInput, match="calibration"):
            method(card).masks(net())
        nan = [torch.full((1, 2, 16), float("nan"))]
        with pytest.raises(BadInput, match=r"0\.up\.weight.*NaN"):
            method(card).masks(net(), nan)


def test_nan_scores_are_refused_naming_the_site():
    @dataclasses.dataclass(frozen=True)
    class Bad(ByScore):
        @property
        def score(self):
            return Score(lambda site: site.value * float("nan"))

    with pytest.raises(BadInput, match=r"0\.up\.weight.*NaN"):
        Bad().masks(net())


@ids("card", TRAINING, ids=lambda c: c.slug)
def test_training_gradient_contract_and_no_trace(card):
    model = net()
    keys, weights = list(model.state_dict()), [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    made = method(card)
    assert isinstance(made, MaskedTraining)
    with training(model, optimizer, made, seed=0) as run:
        first = run.masks.check()
        site = run.found["0.up.weight"]
        model(data()[0]).square().mean().backward()
        dropped = ~run.masks["0.up.weight"].keep
        grad = site.parameter.grad[dropped]
        assert (grad == 0).all() if card.contract.gradient == "hard" else (grad != 0).any()
        optimizer.step()
        assert run.step == 1 and run.masks.count == first.count
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == weights
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    again = net()
    with training(again, torch.optim.SGD(again.parameters(), lr=0.1), made, seed=0) as other:
        assert other.masks.equal(first)


def test_every_room_is_one_of_these_two_kinds():
    assert {c.slug for c in CARDS} == {c.slug for c in ONESHOT + TRAINING}
    assert all(issubclass(c.load(), OneShot) for c in ONESHOT)


@ids("card", [c for c in ALL if not c.baseline], ids=lambda c: c.slug)
def test_claim_smoke_gives_the_promised_figures(card):
    from maskwright.lab.measure import load_claim, run

    claim = load_claim(card)
    assert {claim.method, claim.twin} <= set(claim.arms)
    assert any(effect.kind == "mechanism" and claim.method in (effect.better, effect.worse) for effect in claim.effects)
    report = run(card, claim, "smoke")
    for effect in claim.effects:
        for arm in (effect.better, effect.worse):
            assert all(effect.figure in row for row in report.figures[arm].values())
