"""Merging's exact counts: the majority sign over all tensors, bands with heavy ties and zeros, overlap by brute force."""

import json

import pytest
import torch
from commands import good
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maskwright.updates import merge, merging
from maskwright.updates.breadcrumbs import Breadcrumbs
from maskwright.updates.ties import Ties

FEW = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -1.0, 2.0, -2.0])  # mostly zeros, and ties everywhere else


def zeros(*models):
    return {name: torch.zeros_like(value) for name, value in models[0].items()}


def band(values, density, drop):
    """Positions that stay, by a sort written out: the greatest magnitude first, of equal ones the lower index."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    top = int(drop * len(values))
    return set(order[top : top + max(1, min(int(density * len(values)), len(values) - top))])


def test_a_tie_takes_the_majority_of_all_tensors_and_not_of_its_own():
    # In `tie` the sums are 0 and, beside it, +1: its own majority is +. In `rest` three of three are -: over both it is -.
    one = {"tie": torch.tensor([2.0, 1.0]), "rest": torch.tensor([-1.0, -1.0, -1.0])}
    two = {"tie": torch.tensor([-2.0, 0.0]), "rest": torch.tensor([-3.0, -1.0, 0.0])}
    for names in (("tie", "rest"), ("rest", "tie")):
        pair = [{name: each[name] for name in names} for each in (one, two)]
        paper = merge(zeros(*pair), pair, Ties(density=1.0, zero="majority")).state
        assert paper["tie"].tolist() == [-2.0, 1.0] and paper["rest"].tolist() == [-2.0, -1.0, -1.0]
        assert merge(zeros(*pair), pair, Ties(density=1.0, zero="plus")).state["tie"].tolist() == [2.0, 1.0]
    alone = [{"tie": each["tie"]} for each in (one, two)]
    assert merge(zeros(*alone), alone, Ties(density=1.0, zero="majority")).state["tie"].tolist() == [2.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]), st.sampled_from([0.0, 0.1]),
       st.sampled_from([3, 1 << 20]), st.data())  # fmt: skip
def test_every_row_keeps_exactly_its_count(rows, width, density, drop, chunk, data):
    values = data.draw(st.lists(st.lists(FEW, min_size=width, max_size=width), min_size=rows, max_size=rows))
    delta = {"w": torch.tensor(values)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "CHUNK", chunk)
        out = merge(zeros(delta), [delta], Breadcrumbs(1.0, density, drop, "row"))
    number = max(1, min(int(density * width), width - int(drop * width)))
    assert out.report["w"].kept == [rows * number] and out.report["w"].total == rows * width
    for row, got in zip(values, out.state["w"].tolist(), strict=True):
        stay = band(row, density, drop)
        assert len(stay) == number and got == [value if i in stay else 0 for i, value in enumerate(row)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(FEW, min_size=1, max_size=15), min_size=1, max_size=4), st.sampled_from([0.1, 0.25, 0.5, 0.9]),
       st.sampled_from([0.0, 0.1]), st.sampled_from([3, 1 << 20]))  # fmt: skip
def test_all_tensors_together_keep_exactly_their_count(tensors, density, drop, chunk):
    delta = {f"w{i}": torch.tensor(values) for i, values in enumerate(tensors)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "CHUNK", chunk)
        out = merge(zeros(delta), [delta], Breadcrumbs(1.0, density, drop, "global"))
    values = [value for each in tensors for value in each]
    stay = band(values, density, drop)
    assert sum(report.kept[0] for report in out.report.values()) == len(stay)
    assert len(stay) == max(1, min(int(density * len(values)), len(values) - int(drop * len(values))))
    got = [value for each in out.state.values() for value in each.tolist()]
    assert got == [value if i in stay else 0 for i, value in enumerate(values)]
    at = 0
    for name, each in zip(delta, tensors, strict=True):
        assert out.report[name].kept == [len(stay & set(range(at, at + len(each))))]
        at += len(each)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.25, 0.5, 0.9]), st.sampled_from(["tensor", "global"]), st.booleans())
def test_overlap_and_conflict_of_three_models_by_brute_force(data, density, group, unmoved):
    sizes = {"a": 7, "b": 12, "c": 1}
    models = [{name: data.draw(st.lists(FEW, min_size=n, max_size=n)) for name, n in sizes.items()} for _ in range(3)]
    if unmoved:
        models[2] = {name: [0.0] * n for name, n in sizes.items()}  # it keeps zeros: they overlap but take no side
    entries = [(name, i) for name, n in sizes.items() for i in range(n)]
    kept = []
    for model in models:
        if group == "global":
            kept.append({entries[i] for i in band([model[name][i] for name, i in entries], density, 0.0)})
        else:
            kept.append({(name, i) for name in sizes for i in band(model[name], density, 0.0)})
    deltas = [{name: torch.tensor(value) for name, value in model.items()} for model in models]
    told = merge(zeros(*deltas), deltas, Ties(density=density, group=group)).report
    for name, report in told.items():
        overlap = conflict = 0
        for entry in entries:
            takers = [model for model, stay in zip(models, kept, strict=True) if entry in stay and entry[0] == name]
            values = [model[name][entry[1]] for model in takers]
            overlap += len(takers) >= 2
            conflict += min(values, default=0.0) < 0 < max(values, default=0.0)
        assert (report.overlap, report.conflict, report.total) == (overlap, conflict, sizes[name])
        assert report.kept == [sum(entry[0] == name for entry in stay) for stay in kept]


def test_the_shares_that_the_command_reports(tmp_path):
    # Kept at density 1/2 (a: 2 of 4, b: 1 of 2), ties to the lower index:
    #   one:   a 0, 2   b 1;   two: a 0, 3   b 1;   three, which moved nothing: a 0, 1   b 0
    # Two or more keep a 0 and b 1: 2 of 6. Both signs stand at a 0 alone: 1 of 6.
    (tmp_path / "in").mkdir()
    models = {
        "base": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0]), "one": ([3.0, 0.0, 1.0, -1.0], [0.0, 2.0]),
        "two": ([-3.0, 0.0, 0.5, 1.0], [0.0, 1.0]), "three": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0]),
    }  # fmt: skip
    paths = {name: tmp_path / "in" / f"{name}.safetensors" for name in models}
    for name, (a, b) in models.items():
        save_file({"a": torch.tensor(a), "b": torch.tensor(b)}, paths[name])
    words = [word for name in ("one", "two", "three") for word in ("--model", paths[name])]
    words += ["--method", "ties", "--density", 0.5, "--stats", "--json", tmp_path / "out"]
    told = json.loads(good("merge", "--base", paths["base"], *words).splitlines()[-1])
    assert told == json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["overlap"] == 2 / 6 and told["conflict"] == 1 / 6
    assert [(each["kept"], each["total"]) for each in told["models"]] == [(3, 6)] * 3
    assert told["tensors"]["a"] == {"total": 4, "kept": [2, 2, 2], "overlap": 1, "conflict": 1}
    assert told["tensors"]["b"] == {"total": 2, "kept": [1, 1, 1], "overlap": 1, "conflict": 0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "33.33 % of the entries are kept by two models or more, 16.67 % with both signs" in card
