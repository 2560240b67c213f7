"""The native passes of a merge against their torch twins: the same bits, on every instruction set of this machine."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.kernels.merge import (
    ABS,
    BINS,
    LOW,
    SPAN,
    Keep,
    Piece,
    Rule,
    Side,
    combine,
    equal,
    histogram,
    kept,
    load,
    magnitude_bits,
    piece,
    reference,
    within,
)
from maskwright.kernels.merge.ops import _numbers, _pair
from maskwright.kernels.merge.reference import difference
from maskwright.updates.noise import bernoulli, stream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 16, 1023, 1024, 1025, 3000)  # about the passes' blocks of 1024
native = pytest.mark.skipif(load() is not None, reason=str(load()))


def sets():
    capable = torch.backends.cpu.get_cpu_capability()
    return ["avx2", "avx512"] if "512" in capable else ["avx2"]


def pieces(n, dtypes=(torch.bfloat16,) * 4, seed=0):
    """A base and three models near it, with equal differences, none and -0.0 among them."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=rng) * 0.02
    out = [base.to(dtypes[0])]
    for dtype in dtypes[1:]:
        moved = torch.randn(n, generator=rng).mul(4).round() * 0.001  # few values: many ties
        out.append((base.to(dtypes[0]).float() + moved).to(dtype))
    out[0][::5] = -0.0
    return out


def stored(tensors, how, folder):
    """The same tensors as pieces: in memory, or in files, to be passed through or to be kept."""
    if how == "memory":
        return [piece(x) for x in tensors]
    out = []
    for number, x in enumerate(tensors):
        path = folder / str(len(made) + number)
        path.write_bytes(b"junk" + x.view(torch.uint8).numpy().tobytes())
        memory = torch.full((max(SPAN, len(x)) if how == "kept" else SPAN,), 7.0).to(x.dtype)
        out.append(Piece(memory, len(x), os.open(path, os.O_RDWR), 4))
    return out


@pytest.fixture
def places(tmp_path):
    yield lambda tensors, how: made.extend(stored(tensors, how, tmp_path)) or made[-len(tensors) :]
    for each in made:
        if each.file >= 0:
            os.close(each.file)
    made.clear()


made = []


def pair(base, tuned):
    return _pair(piece(base), piece(tuned))


def call(impl, base, tuned, sides, rule, dtype):
    out = torch.empty(len(base), dtype=dtype)
    told = torch.ops.maskwright.merge_combine(
        out, base, tuned, [-1, 0] * (2 + len(tuned)), len(base), [n for side in sides for n in _numbers(side.keep)],
        [side.keep.mask for side in sides], [side.factor for side in sides], [side.weight for side in sides], *rule, impl,
    )  # fmt: skip
    return out, *told


def twin(base, tuned, sides, rule, dtype):
    out = torch.empty(len(base), dtype=dtype)
    return out, *reference.combine(base, tuned, sides, rule, out)


def same_bits(a, b):
    kinds = {2: torch.int16, 4: torch.int32}
    assert a.dtype == b.dtype and torch.equal(a.view(kinds[a.itemsize]), b.view(kinds[b.itemsize]))


@native
@pytest.mark.parametrize("impl", sets())
@pytest.mark.parametrize("n", SIZES)
def test_counts_and_bins(n, impl):
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        base, tuned = pieces(n, dtypes)
        bins, theirs = torch.ones(2, BINS, dtype=torch.int64)  # what is there is added to
        torch.ops.maskwright.merge_histogram(bins, *pair(base, tuned), impl)
        reference.histogram(theirs, base, tuned)
        assert torch.equal(bins, theirs) and int(bins.sum()) == n + BINS
        used = [0, *(bins > 1).nonzero().flatten()[:3].tolist()]
        wide = [0, 1, 3, 2][: len(used)]
        counts, theirs = torch.ones(2, sum(wide) << LOW, dtype=torch.int64)
        above = torch.ops.maskwright.merge_within(counts, *pair(base, tuned), used, wide, impl)
        assert above == reference.within(theirs, base, tuned, used, wide) and torch.equal(counts, theirs)
        levels = magnitude_bits(difference(base, tuned)).unique()[:4].tolist()
        counts = torch.ops.maskwright.merge_equal(*pair(base, tuned), levels, impl)
        assert counts == reference.equal(base, tuned, levels) and min(counts) > 0


@st.composite
def keeps(draw, n, levels):
    """Any choice a merge can ask for."""
    keep = Keep()
    if draw(st.booleans()):
        above, beyond = sorted((draw(st.sampled_from(levels)), draw(st.sampled_from(levels))))
        ties = st.integers(0, n + 1)
        keep = Keep(
            above - draw(st.integers(0, 1)), draw(ties), *((beyond, draw(ties)) if draw(st.booleans()) else (ABS, 0))
        )
    if draw(st.booleans()):
        seed, place = draw(st.integers(0, 2**40)), draw(st.integers(0, 2**33))
        keep = keep._replace(chance=(*stream(seed, "x"), place, draw(st.integers(0, 2**32 - 1))))
    if draw(st.booleans()):
        keep = keep._replace(mask=torch.rand(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) < 0.5)
    return keep


@native
@pytest.mark.parametrize("impl", sets())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_from_differences_to_the_rounded_sum(impl, data):
    n, number = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(1, 3))
    kinds = data.draw(st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4))
    base, *tuned = pieces(n, kinds, data.draw(st.integers(0, 9)))
    tuned = tuned[:number]
    levels = magnitude_bits(difference(base, tuned[0])).unique().tolist()
    factors = st.sampled_from([1.0, 5.0, 0.3])
    sides = [Side(data.draw(keeps(n, levels)), data.draw(factors), data.draw(factors)) for _ in tuned]
    rule = Rule(
        data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 1.0, 3.3])), data.draw(st.sampled_from([-1.0, 0.0, 1.0])),
        data.draw(st.sampled_from([1.0, 0.4])),
    )  # fmt: skip
    dtype = data.draw(st.sampled_from(DTYPES))
    got, wanted = call(impl, base, tuned, sides, rule, dtype), twin(base, tuned, sides, rule, dtype)
    same_bits(got[0], wanted[0])
    assert got[1:] == wanted[1:] == (0, 0)


@native
@pytest.mark.parametrize("impl", sets())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted_even_where_it_is_dropped(bad, impl):
    base, *tuned = pieces(1500, (torch.float32,) * 4)
    tuned[1][[3, 1400]] = bad
    sides = [Side(Keep(chance=(*stream(0, "x"), 0, 0)))] * 3  # nothing stays
    for told in (
        call(impl, base, tuned, sides, Rule(), torch.bfloat16),
        twin(base, tuned, sides, Rule(), torch.bfloat16),
    ):
        assert told[1:] == (2, 0)
        assert torch.equal(told[0], base.bfloat16())


@native
@pytest.mark.parametrize("impl", sets())
def test_results_that_do_not_fit_are_counted(impl):
    for dtype in DTYPES:
        top = torch.full((1100,), torch.finfo(dtype).max, dtype=dtype)
        base, tuned = top / 2, [top, top]
        base[7:] = 0
        tuned[0][9:] = 0
        tuned[1][9:] = 0
        got = call(impl, base, tuned, [Side(Keep())] * 2, Rule(), dtype)
        wanted = twin(base, tuned, [Side(Keep())] * 2, Rule(), dtype)
        assert got[1:] == wanted[1:]
        assert wanted[2] == 9  # 7 entries of half + 2 halves, 2 of 0 + 2 whole ones


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**33), st.integers(0, 50), st.integers(0, 2**64 - 1), st.floats(0, 0.999))
def test_chance_is_the_place_s_noise(place, count, seed, density):
    keep = Keep(chance=(*stream(seed, "name"), place, int(density * 2**32)))
    assert torch.equal(kept(torch.ones(count), keep), bernoulli(seed, "name", place, place + count, density))


def test_ties_and_both_sides_by_hand():
    delta = torch.tensor([1.0, -2.0, 2.0, 3.0, -2.0, 0.0, 2.0])
    two = int(torch.tensor(2.0).view(torch.int32))
    assert kept(delta, Keep(two, 1)).tolist() == [False, True, False, True, False, False, False]
    assert kept(delta, Keep(0, 0, two, 2)).tolist() == [True, False, False, False, True, False, True]
    assert kept(delta, Keep()).all()


@pytest.mark.parametrize("how", ["through", "kept"])
@pytest.mark.parametrize("n", [5, SPAN, SPAN + 1, 2 * SPAN + 3000])
def test_pieces_in_files_are_as_those_in_memory(places, n, how):
    tensors = pieces(n, (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16))
    sides = [Side(Keep(mask=torch.arange(n) % 3 > 0)), Side(Keep(chance=(*stream(0, "x"), 11, 1 << 30)), 4.0), Side(Keep())]
    levels = [int(level) for level in magnitude_bits(difference(*tensors[:2])).unique()[:3]]
    told = []
    for where in ("memory", how):
        base, *tuned = places(tensors, where)
        out, bins, window = torch.empty(n).bfloat16(), torch.zeros(BINS, dtype=torch.int64), torch.zeros(1 << LOW).long()
        histogram(bins, base, tuned[0])
        above = within(window, base, tuned[0], [levels[-1] >> LOW], [1])
        counts = equal(base, tuned[0], levels)
        target = piece(out)
        if where != "memory":
            (target,) = places([out], "through")
        told.append((combine(base, tuned, sides, Rule(), target), target.load(), bins, window, above, counts))
        if where == "kept":
            assert all(torch.equal(p.memory[:n], x) for p, x in zip((base, *tuned), tensors, strict=True))
    for mine, theirs in zip(*told, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_a_file_that_ends_is_refused(places):
    short = [p._replace(at=p.at + 2) for p in places(pieces(100), "through")]
    for work in (lambda: combine(short[0], short[1:], [Side(Keep())] * 3, Rule(), piece(torch.empty(100))), short[0].load):
        with pytest.raises(BadInput, match="ended while it was read"):
            work()
    with pytest.raises(BadInput, match="100 and 5"):
        equal(short[0], piece(torch.zeros(5)), [])


def test_a_dtype_that_the_kernels_lack_goes_to_the_twin():
    base, tuned = pieces(50, (torch.float32,) * 2)
    got = torch.empty(50, dtype=torch.float64)
    assert combine(piece(base.double()), [piece(tuned.double())], [Side(Keep())], Rule(), piece(got)) == (0, 0)
    assert torch.equal(got, base.double() + (tuned.double() - base.double()))
    counts = torch.zeros(BINS, dtype=torch.int64)
    both = piece(base), piece(tuned)
    histogram(counts, *both)
    assert int(counts.sum()) == 50
    assert within(counts[:0], *both, [0], [0]) == [50] and equal(*both, []) == []


SCRIPT = """
import hashlib
import torch
from maskwright.kernels.merge import load
from maskwright.updates import merge
from maskwright.updates.breadcrumbs import Breadcrumbs
from maskwright.updates.dare import Dare
from maskwright.updates.ties import Ties
torch.manual_seed(0)
base = {"a": torch.randn(40, 50).bfloat16(), "b": torch.randn(7).half()}
tuned = [{k: v + 0.1 * torch.randn(v.shape).to(v.dtype) for k, v in base.items()} for _ in range(3)]
for method in (Ties(), Dare(), Breadcrumbs(), Ties(group="global", zero="majority"), Ties(group="row"), Dare(rescale="l1")):
    state = merge(base, tuned, method).state
    print([hashlib.sha256(value.view(torch.int16).numpy().tobytes()).hexdigest() for value in state.values()])
print(load() is None)
"""


@native
def test_a_merge_without_native_kernels_has_the_same_bits():
    told = []
    for on in ("1", "0"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=os.environ | {"MASKWRIGHT_NATIVE": on}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        told.append(run.stdout.split("\n"))
    assert told[0][:-2] == told[1][:-2] and len(told[0]) == 8
    assert (told[0][-2], told[1][-2]) == ("True", "False")
