"""Merging against brute force: whole-tensor formulas written again with core.select, over shapes, ties and dtypes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.pattern import Unstructured
from maskwright.core.select import select
from maskwright.kernels.merge import kept, piece
from maskwright.updates import Merging, merge, merging
from maskwright.updates.breadcrumbs import Breadcrumbs
from maskwright.updates.cuts import Row, cuts
from maskwright.updates.dare import Dare
from maskwright.updates.sparsify import Band
from maskwright.updates.state import StateTensors
from maskwright.updates.task_arithmetic import TaskArithmetic
from maskwright.updates.ties import Ties


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def models(number=3, dtype=torch.float32, shape=(6, 8)):
    base = {"a": rand(*shape, dtype=dtype), "b": rand(5, seed=1, dtype=dtype), "s": torch.tensor(0.5, dtype=dtype)}
    base["n"] = torch.tensor([3, 4])
    tuned = []
    for i in range(number):
        more = {k: rand(*v.shape, seed=10 * i + j).to(dtype) * 0.1 for j, (k, v) in enumerate(base.items())}
        tuned.append({k: v + more[k] if v.is_floating_point() else v + 1 for k, v in base.items()})
    return base, tuned


def banded(delta, density, drop, pattern=None):
    """The band by core.select on the whole magnitude."""
    pattern = pattern or Unstructured()
    number = pattern.grid(tuple(delta.shape))[1]
    top = int(drop * number)
    kept = max(1, min(int(density * number), number - top))
    keep = select(delta.abs(), pattern, top + kept).keep & ~select(delta.abs(), pattern, top).keep
    return torch.where(keep, delta, 0.0)


def chunked(values, size):
    starts = tuple(range(0, len(values), size))
    zero = torch.zeros_like(values)
    wide = values.dtype == torch.float64
    return Row(
        "row",
        starts,
        len(values),
        lambda i, count: tuple(piece(v[starts[i] : starts[i] + size][: count or None]) for v in (zero, values)),
        wide=wide,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1e-40, 0.5, -0.5, 1.0, -2.0, 3.5, 2.0**-14]), min_size=1, max_size=40),
       st.integers(1, 9), st.data())  # fmt: skip
def test_cuts_keep_what_select_keeps(values, size, data):
    values = torch.tensor(values)
    counts = data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=3))
    for count, cut in zip(counts, cuts(chunked(values, size), counts), strict=True):
        got = torch.cat([kept(part, cut.keep(i)) for i, part in enumerate(values.split(size))])
        assert torch.equal(got, select(values.abs(), Unstructured(), count).keep)


@pytest.mark.parametrize("head", [1 << 15, 300])
@pytest.mark.parametrize("shape", ["even", "quantised", "sorted"])
def test_cuts_from_a_sample_and_where_it_misleads(monkeypatch, shape, head):
    monkeypatch.setattr("maskwright.updates.cuts._HEAD", head)
    monkeypatch.setattr("maskwright.updates.cuts._SEEN", 0)
    values = rand(20_000, seed=5)
    values = {"even": values, "quantised": values.mul(4).round() / 4, "sorted": values.abs().sort().values}[shape]
    counts = [1, 40, 4000, 10_000, 19_990, 20_000]
    for count, cut in zip(counts, cuts(chunked(values, 1000), counts), strict=True):
        got = torch.cat([kept(part, cut.keep(i)) for i, part in enumerate(values.split(1000))])
        assert torch.equal(got, select(values.abs(), Unstructured(), count).keep)


def test_a_sample_spares_the_full_count(monkeypatch):
    monkeypatch.setattr("maskwright.updates.cuts._SEEN", 120_000)
    values, asked = torch.linspace(1, 2, 200_000)[torch.randperm(200_000, generator=torch.Generator().manual_seed(0))], []
    row = chunked(values, 50_000)
    cuts(replace(row, read=lambda i, count: (asked.append(count), row.read(i, count))[1]), [40_000, 90_000])
    assert asked.count(30_000) == 4 and asked.count(0) == 4  # one pass over everything, no ties to part


def test_cuts_of_float64_and_in_threads():
    values = rand(1000, seed=3)
    for row in (values, values.double() + 1e-12):
        with ThreadPoolExecutor(3) as pool:
            (cut,) = cuts(chunked(row, 7), [313], pool)
        got = torch.cat([kept(part, cut.keep(i)) for i, part in enumerate(row.split(7))])
        assert torch.equal(got, select(row.abs(), Unstructured(), 313).keep)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_deltas_that_are_not_finite_are_refused_by_name(bad):
    base, tuned = models()
    tuned[1]["a"][2, 3] = bad
    for method in (TaskArithmetic(), Ties(), Dare(), Breadcrumbs(), Ties(group="row"), Ties(group="global")):
        with pytest.raises(BadInput, match=r"a: 1 deltas|all 2 tensors: 1 deltas"):
            merge(base, tuned, method)


def test_the_sheets_band():
    base = {"w": torch.zeros(10)}
    tuned = {"w": torch.arange(1.0, 11)}
    for group in ("tensor", "row", "global"):
        out = merge(base, [tuned], Breadcrumbs(1.0, 0.5, 0.1, group))
        assert out.state["w"].tolist() == [0, 0, 0, 0, 5, 6, 7, 8, 9, 0]
        assert out.report["w"].kept == [5]
    assert Band(0.5, 0.1).counts(10) == (1, 5)


def test_a_tensor_smaller_than_one_over_drop_top_is_not_wiped():
    base = {"w": torch.zeros(5), "one": torch.zeros(1)}
    tuned = {"w": torch.arange(1.0, 6), "one": torch.ones(1)}
    out = merge(base, [tuned], Breadcrumbs(1.0, 0.6, 0.1)).state
    assert out["w"].tolist() == [0, 0, 3, 4, 5] and out["one"].tolist() == [1]
    assert merge(base, [tuned], Breadcrumbs(1.0, 0.01, 0.0)).state["w"].tolist() == [0, 0, 0, 0, 5]


def test_whole_band_is_task_arithmetic_and_copies_come_back():
    base, tuned = models()
    assert_same(merge(base, tuned, Breadcrumbs(0.4, 1.0, 0.0)), merge(base, tuned, TaskArithmetic(0.4)))
    thrice = merge(base, [tuned[0]] * 3, TaskArithmetic(), weights=[1 / 3] * 3).state
    for name, value in tuned[0].items():
        want = value if value.is_floating_point() else base[name]
        assert torch.allclose(thrice[name], want, atol=1e-6)
    one = merge(base, [tuned[0]], Breadcrumbs(1.0, 0.3, 0.0)).state["a"]
    assert torch.equal(one, base["a"] + banded(tuned[0]["a"] - base["a"], 0.3, 0.0))


def assert_same(one, other):
    assert list(one.state) == list(other.state)
    for name, value in one.state.items():
        assert value.dtype == other.state[name].dtype and torch.equal(value, other.state[name]), name


def test_ties_on_hand_written_numbers():
    def run(deltas, method, weights=None):
        base = {"w": torch.zeros(len(deltas[0]))}
        return merge(base, [{"w": torch.tensor(d)} for d in deltas], method, weights=weights).state["w"].tolist()

    assert run([[1.5, -2.0]], Ties(density=1.0)) == [1.5, -2.0]
    assert run([[3.0], [-1.0]], Ties(density=1.0)) == [3.0]
    assert run([[2.0, 1.0], [-2.0, 1.0]], Ties(density=1.0)) == [2.0, 1.0]
    # the majority of all signs (+, +, 0 | -, -: here one + against two -) settles the tie of the first entry
    assert run([[2.0, -1.0, -1.0], [-2.0, -1.0, -1.0]], Ties(density=1.0, zero="majority")) == [-2.0, -1.0, -1.0]
    assert run([[2.0, 1.0], [-2.0, 3.0]], Ties(density=1.0, zero="majority")) == [2.0, 2.0]
    assert run([[1.0], [3.0]], Ties(density=1.0), weights=[3.0, 1.0]) == [1.5]
    assert run([[1.0], [3.0]], Ties(density=1.0, normalise=False)) == [4.0]


def elected(deltas, weights, normalise):
    parts = torch.stack([d * w for d, w in zip(deltas, weights, strict=True)])
    sign = torch.where(parts.sum(0) >= 0, 1.0, -1.0)
    agree = parts.sign() == sign
    out = torch.where(agree, parts, 0.0).sum(0)
    share = (agree * torch.tensor(weights)[:, None, None]).sum(0)
    return out / torch.where(share == 0, 1.0, share) if normalise else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [5, 8, 1 << 18])
def test_every_method_against_whole_tensor_formulas(monkeypatch, dtype, chunk):
    monkeypatch.setattr(merging, "CHUNK", chunk)
    base, tuned = models(3, dtype)
    weights = [0.5, 1.0, 0.25]
    deltas = [t["a"].float() - base["a"].float() for t in tuned]

    def check(method, delta):
        got = merge(base, tuned, method, weights=weights).state["a"]
        want = (base["a"].float() + delta).to(dtype)
        assert got.dtype == dtype
        assert torch.allclose(got.float(), want.float(), rtol=0 if dtype == torch.float32 else 1e-2, atol=1e-6)

    check(TaskArithmetic(0.7), 0.7 * sum(w * d for w, d in zip(weights, deltas, strict=True)))
    check(TaskArithmetic(normalise=True), sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights))
    for group, pattern in (("tensor", Unstructured()), ("row", Unstructured((0,)))):
        cut = [banded(d, 0.4, 0.1, pattern) for d in deltas]
        check(Breadcrumbs(0.3, 0.4, 0.1, group), 0.3 * sum(w * d for w, d in zip(weights, cut, strict=True)))
        check(Breadcrumbs(0.3, 0.4, 0.1, group, elect=True), 0.3 * elected(cut, weights, False))
        trimmed = [banded(d, 0.4, 0.0, pattern) for d in deltas]
        check(Ties(1.0, 0.4, group), elected(trimmed, weights, True))
        check(Ties(1.0, 0.4, group, normalise=False), elected(trimmed, weights, False))


@pytest.mark.parametrize("chunk", [4, 1 << 18])
def test_global_thresholds_rank_all_tensors_together(monkeypatch, chunk):
    monkeypatch.setattr(merging, "CHUNK", chunk)
    base = {"x": torch.zeros(6), "y": torch.zeros(2, 3), "s": torch.tensor(0.0), "running_mean": torch.zeros(2)}
    tuned = {"x": torch.tensor([1.0, 5, 2, 2, 0, 0]), "y": torch.tensor([[2.0, 9, 2], [7, 1, 2]])}
    tuned |= {"s": torch.tensor(4.0), "running_mean": torch.tensor([0.1, 8])}
    out = merge(base, [tuned], Breadcrumbs(1.0, 5 / 12, 1 / 12, "global"))
    # 9 is cut off; 7, 5 and the first three of five 2s stay; the scalar and the statistics are merged whole
    assert out.state["x"].tolist() == [0, 5, 2, 2, 0, 0] and out.state["y"].tolist() == [[2, 0, 0], [7, 0, 0]]
    assert out.state["s"] == 4 and out.state["running_mean"].tolist() == pytest.approx([0.1, 8])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.sampled_from([0.0, 0.01, 0.1]), st.booleans())
def test_kept_counts_are_exact_with_ties_and_zeros(number, density, drop, zeros):
    delta = torch.arange(number).remainder(3).float() * (0 if zeros else 1)
    report = merge({"w": torch.zeros(number)}, [{"w": delta}], Breadcrumbs(1.0, density, drop)).report["w"]
    dropped = int(drop * number)
    assert report.kept == [max(1, min(int(density * number), number - dropped))] and report.total == number


def test_overlap_and_conflict_match_brute_force():
    base, tuned = models(3)
    told = merge(base, tuned, Breadcrumbs(1.0, 0.4, 0.1)).report["a"]
    cut = torch.stack([banded(t["a"] - base["a"], 0.4, 0.1) for t in tuned])
    assert told.overlap == int(((cut != 0).sum(0) > 1).sum())
    assert told.conflict == int(((cut > 0).any(0) & (cut < 0).any(0)).sum())
    assert told.kept == [int((one != 0).sum()) for one in cut]


def test_with_and_without_statistics_the_same_bits():
    base, tuned = models(3)
    for method in (Ties(density=0.3), Breadcrumbs(0.3, 0.3, 0.1), Dare(density=0.4), Ties(group="row")):
        whole = merge(base, tuned, method, seed=4).state
        state = [StateTensors(t, "model") for t in tuned]
        work = Merging(StateTensors(base, "base"), state, method, seed=4)
        work.prepare()
        out = torch.empty(48)
        work.tensor("a", lambda start, stop, out=out: out[start:stop])
        assert torch.equal(out.view(6, 8), whole["a"])


def test_dare_keeps_the_expectation_the_seed_and_every_order_of_tensors():
    base, tuned = {"a": torch.zeros(400), "b": torch.zeros(3)}, {"a": rand(400), "b": rand(3)}
    method = Dare(density=0.25)
    one = merge(base, [tuned], method, seed=1)
    assert_same(one, merge(base, [tuned], method, seed=1))
    turned = merge({k: base[k] for k in "ba"}, [{k: tuned[k] for k in "ba"}], method, seed=1).state
    assert torch.equal(turned["a"], one.state["a"])
    assert not torch.equal(one.state["a"], merge(base, [tuned], method, seed=2).state["a"])
    assert torch.equal(one.state["a"], torch.where(one.state["a"] != 0, tuned["a"] * 4, 0))
    mean = sum(merge(base, [tuned], method, seed=s).state["a"] for s in range(600)) / 600
    assert float((mean - tuned["a"]).abs().max()) < 5 * float(tuned["a"].abs().max()) * (3 / 600) ** 0.5
    assert_same(merge(base, [tuned], Dare(density=1.0)), merge(base, [tuned], TaskArithmetic()))
    scaled = merge(base, [tuned], Dare(density=0.25, rescale="l1"), seed=1).state["a"]
    assert float(scaled.abs().sum()) == pytest.approx(float(tuned["a"].abs().sum()), rel=1e-5)


def test_tied_tensors_are_merged_once_and_stay_tied():
    shared = rand(3, 4)
    base = {"embed": shared, "head": shared}
    moved = shared + 1
    out = merge(base, [{"embed": moved, "head": moved}], TaskArithmetic(0.5)).state
    assert out["embed"] is out["head"] and torch.allclose(out["embed"], shared + 0.5)


def test_inputs_and_integers_stay_as_they_are():
    base, tuned = models()
    before = [{k: v.clone() for k, v in state.items()} for state in (base, *tuned)]
    out = merge(base, tuned, Ties()).state
    assert out["n"].tolist() == [3, 4] and out["n"] is not base["n"]
    for state, old in zip((base, *tuned), before, strict=True):
        assert all(torch.equal(state[k], old[k]) for k in old)


def test_what_does_not_fit_is_refused():
    base, tuned = models()
    with pytest.raises(BadInput, match="model 0: a is in only one"):
        merge(base, [{k: v for k, v in tuned[0].items() if k != "a"}], Ties())
    with pytest.raises(BadInput, match=r"model 0: a has shape \(8, 6\), in the base \(6, 8\)"):
        merge(base, [{**tuned[0], "a": tuned[0]["a"].T.contiguous()}], Ties())
    with pytest.raises(BadInput, match="model 0: n is torch.float32"):
        merge(base, [{**tuned[0], "n": torch.ones(2)}], Ties())
    with pytest.raises(BadInput, match="nothing to merge"):
        merge(base, [], Ties())
    with pytest.raises(BadInput, match="3 models but 2 weights"):
        merge(base, tuned, Ties(), weights=[1, 1])
    with pytest.raises(BadInput, match="must be >= 0 and not all 0"):
        merge(base, tuned, Ties(), weights=[1, -1, 1])
    with pytest.raises(BadInput, match="must be >= 0 and not all 0"):
        merge(base, tuned, TaskArithmetic(normalise=True), weights=[0, 0, 0])
    with pytest.raises(BadInput, match="finite"):
        merge(base, tuned, Ties(), weights=[1, float("nan"), 1])
    with pytest.raises(BadInput, match="agree on consensus"):
        merge(base, tuned, [Ties(), Ties(), Dare()])
    with pytest.raises(BadInput, match="1 is int, not a tensor"):
        merge({"1": 3}, [{"1": 3}], Ties())


def test_settings_that_make_no_sense_are_refused():
    for bad in ({"density": 0.0}, {"density": 1.1}, {"drop_top": 1.0}, {"drop_top": -0.1}, {"density": 0.9, "drop_top": 0.2},
                {"group": "layer"}, {"scale": float("nan")}):  # fmt: skip
        with pytest.raises(BadInput):
            Breadcrumbs(**bad)
    with pytest.raises(BadInput, match="rescale"):
        Dare(rescale="l2")
    with pytest.raises(BadInput, match="zero"):
        Ties(zero="minus")
    assert Breadcrumbs.between(0.85, 0.993).parts().sparsify == Band(0.993 - 0.85, 1 - 0.993)


def test_each_model_may_have_settings_of_its_own():
    base, tuned = models(2)
    out = merge(base, tuned, [Ties(density=0.5), Ties(density=0.25)])
    assert out.report["a"].kept == [24, 12]


def test_the_order_of_models_only_moves_the_last_bit():
    base, tuned = models(3)
    for method in (Ties(density=0.4), Breadcrumbs(0.3, 0.4, 0.1), TaskArithmetic(0.3)):
        one, other = merge(base, tuned, method).state["a"], merge(base, tuned[::-1], method).state["a"]
        assert torch.allclose(one, other, atol=1e-6)
