"""HeadPlan: the integer program against enumeration, the front, and the file."""

import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention.heads import Choice, HeadPlan, Rule, front, pareto, solve
from maskwright.attention.site import ModelShape
from maskwright.core.errors import BadInput


def enumerated(loss, cost, bounds, at_most=None, layer_of=None, most=()):
    """Every choice that holds, as (losses, rules), by trying all."""
    _, heads, rules = loss.shape
    layer_of = layer_of or [0] * heads
    for choice in itertools.product(range(rules), repeat=heads):
        total, mean = (table[:, range(heads), choice] for table in (loss, cost))
        total, mean = total.sum(1), mean.mean(1)
        if any(not low - 1e-9 <= m <= high + 1e-9 for m, (low, high) in zip(mean, bounds, strict=True)):
            continue
        if any(limit is not None and total[i] > limit + 1e-9 for i, limit in enumerate(most)):
            continue
        per = [len({r for r, at in zip(choice, layer_of, strict=True) if at == layer}) for layer in set(layer_of)]
        if at_most is None or max(per) <= at_most:
            yield total, choice


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([None, 1, 2]))
def test_a_solution_is_the_best_of_all_choices(heads, rules, seed, at_most):
    rng = np.random.default_rng(seed)
    loss, cost = rng.random((2, heads, rules)), rng.random((2, heads, rules))
    layer_of = [h // 2 for h in range(heads)]
    bounds, most = [(0.2, 0.6), (0.0, 0.7)], (None, 0.6 * heads)
    want = list(enumerated(loss, cost, bounds, at_most, layer_of, most))
    got = solve(loss, cost, bounds, at_most_rules=at_most, layer_of=layer_of, most=most)
    if not want:
        assert got is None
        return
    assert got.loss[0] == pytest.approx(min(total[0] for total, _ in want), abs=1e-7)
    assert tuple(got.rules) in {choice for _, choice in want}
    assert got.cost == pytest.approx(cost[:, range(heads), got.rules].mean(1))


def test_two_heads_of_three_rules():
    loss = np.array([[0.0, 1.0, 5.0], [0.0, 3.0, 4.0]])
    cost = np.array([[1.0, 0.5, 0.25], [1.0, 0.5, 0.25]])
    assert solve(loss, cost, [(0, 0.75)]).rules.tolist() == [1, 0]
    assert solve(loss, cost, [(0, 0.5)]).rules.tolist() == [1, 1]
    assert solve(loss, cost, [(0, 0.75)], at_most_rules=1).rules.tolist() == [1, 1]
    assert solve(loss, cost, [(0.3, 0.3)]) is None
    loss[0, 1] = np.inf
    assert solve(loss, cost, [(0, 0.75)]).rules.tolist() == [0, 1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_the_front_lies_on_the_true_front_and_holds_every_objectives_optimum(seed):
    rng = np.random.default_rng(seed)
    loss, cost = rng.random((3, 4, 3)), rng.random((1, 4, 3))
    every = [total for total, _ in enumerated(loss, cost, [(0, 0.6)])]
    found = pareto(loss, cost, [(0, 0.6)], points=3)
    assert bool(found) == bool(every)
    for choice in found:
        assert not any((other < choice.loss - 1e-9).all() for other in every)
        assert not any(o is not choice and (o.loss <= choice.loss).all() for o in found)
    firsts = [choice.loss[0] for choice in found]
    assert firsts == sorted(firsts)
    for i in range(3 if every else 0):
        assert min(c.loss[i] for c in found) == pytest.approx(min(t[i] for t in every), abs=1e-6)


def test_front_drops_the_dominated_and_the_repeated():
    def at(*loss):
        return Choice(np.zeros(1, int), np.array(loss, float), np.zeros(1))

    kept = front([at(2, 2), at(1, 3), at(2, 2), at(3, 3), at(3, 1), at(1, 4)])
    assert [tuple(c.loss) for c in kept] == [(1, 3), (2, 2), (3, 1)]


def test_tables_that_disagree_are_refused():
    for loss, cost, bounds in (
        (np.zeros((2, 3)), np.zeros((2, 2)), [(0, 1)]),
        (np.zeros((2, 3)), np.zeros((2, 3)), []),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), [(0, 1)]),
    ):
        with pytest.raises(BadInput, match="losses"):
            solve(loss, cost, bounds)
    with pytest.raises(BadInput, match="layers"):
        solve(np.zeros((2, 3)), np.zeros((2, 3)), [(0, 1)], layer_of=[0])


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(BadInput, match=r"maskwright\[lab\]"):
        solve(np.zeros((2, 3)), np.zeros((2, 3)), [(0, 1)])


def plan_of(layers=2, heads=4, kv_heads=2):
    rules = tuple(tuple(Rule("affine", {"alpha": h, "beta": 0.5}) for h in range(heads)) for _ in range(layers))
    return HeadPlan("moa", layers, heads, kv_heads, rules, {"block": 64}, {"loss": [[0.5]]}, {"seed": 3})


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan, path = plan_of(), tmp_path / "plan.json"
    plan.save(path)
    again = HeadPlan.load(path)
    assert all(getattr(again, name) == getattr(plan, name) for name in HeadPlan.__dataclass_fields__)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    again.save(path)
    assert HeadPlan.load(path).rules == plan.rules


def test_a_plan_of_another_model_is_refused_naming_both():
    plan_of().fits(ModelShape(2, 4, 2, 16, True))
    with pytest.raises(BadInput, match="2 layers, 4 heads and 2 key heads; this model has 3, 4 and 2"):
        plan_of().fits(ModelShape(3, 4, 2, 16, True))
    with pytest.raises(BadInput, match="rules are for"):
        HeadPlan("moa", 3, 4, 2, plan_of().rules)


@pytest.mark.parametrize("change", [
    lambda b: b.pop("rules"), lambda b: b.update(format="other"), lambda b: b.update(version=9),
    lambda b: b.update(rules=[[1]]), lambda b: b.update(rules=b["rules"][:1]), lambda b: b["rules"][0][0].pop("name"),
    lambda b: b["rules"][0][0].update(alpha=float("inf")), lambda b: b["rules"][0][0].update(alpha=10**400),
    lambda b: b["rules"][0][0].update(alpha="x"), lambda b: b.update(model=[]), lambda b: b.update(table=3),
    lambda b: b["model"].update(heads="4"), lambda b: b.update(method=None), lambda b: b["rules"][0][0].update(alpha=[1]),
])  # fmt: skip
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, change):
    path = tmp_path / "plan.json"
    plan_of().save(path)
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(BadInput, match="plan.json") as error:
        HeadPlan.load(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    for text in ("", "{", "[]", '{"format": "maskwright.heads"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(BadInput, match="plan.json"):
            HeadPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    for bad in (path, tmp_path / "none.json", tmp_path):
        with pytest.raises(BadInput):
            HeadPlan.load(bad)
    with pytest.raises(BadInput, match="JSON"):
        HeadPlan("moa", 1, 1, 1, ((Rule("a"),),), table={"loss": float("nan")}).save(path)
    with pytest.raises(BadInput):
        plan_of().save(tmp_path / "no" / "plan.json")
    assert not list(tmp_path.glob("*.part"))
