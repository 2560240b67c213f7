"""The packed kernels: every route against float64, the portable twin beside them, index groups by brute force, modules."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear import (
    NEVER,
    PackedLinear,
    engine,
    index,
    linear,
    pack,
    reference,
    steady,
    unpack,
)
from maskwright.kernels.packed_linear.layout import VALUES, unpack_bits

FLOATS = VALUES[:3]
EPS = torch.finfo(torch.float32).eps
OPS = torch.ops.maskwright


@pytest.fixture(scope="module")
def native():
    """Skips where the native kernels do not run, naming the reason."""
    if not engine().native:
        pytest.skip(f"no native kernels: {engine().reason}")


def made(rows, cols, density, values=torch.float32, seed=0):
    """A random packed weight."""
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=rng) < density
    weight = torch.randn(rows, cols, generator=rng) * keep
    return pack(weight if values == torch.int8 else weight.to(values), keep, values)


def nm(kept, of, rows=5, cols=104, values=torch.float32, seed=0):
    """A packed weight that keeps `kept` of every `of` entries of a row."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, cols // of, of, generator=rng).argsort(-1)
    keep = (order < kept).reshape(rows, cols)
    return pack(torch.randn(rows, cols, generator=rng) * keep, keep, values)


def held(packed):
    """The dense weight in the dtype of the values, int8 not yet scaled."""
    out = torch.zeros(packed.rows, packed.cols, dtype=packed.values.dtype)
    out[torch.from_numpy(unpack_bits(packed.bitmask, packed.cols))] = packed.values
    return out


def input_of(batch, cols, dtype=torch.float32, seed=1):
    return torch.randn(batch, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sums(x, packed, bias):
    """(y, sum of magnitudes) in float64."""
    parts = [(x.double(), unpack(packed).double(), None if bias is None else bias.double())]
    parts.append(tuple(None if t is None else t.abs() for t in parts[0]))
    return [F.linear(*each) for each in parts]


def tolerance(x, packed, bias):
    """How far a result may be from float64: twice what a dense Linear is off, float32 sums and one rounding more.

    The dense Linear gets the float32 values of x and weight, and rounds once: no dtype makes it sloppier.
    """
    exact, size = sums(x, packed, bias)
    dense = F.linear(x.float(), unpack(packed).float(), None if bias is None else bias.float()).to(x.dtype)
    info = torch.finfo(x.dtype)
    last = info.eps * (exact.abs() + (0 if bias is None else bias.double().abs())) + info.smallest_normal * info.eps
    return exact, 2 * (dense.double() - exact).abs() + 4 * EPS * size + last


def twin(x, packed, bias):
    """The portable results: bitmask, indexed, dense."""
    ix = index(packed)
    bitmask = (packed.values, packed.bitmask, packed.row_offsets, packed.scale)
    indexed = (ix.values, ix.offsets, ix.bases, ix.row_groups, ix.scale)
    yield "bitmask", reference.packed_linear(x, *bitmask, bias, steady(packed), NEVER, "")
    yield "indexed", reference.indexed_linear(x, *indexed, bias, NEVER, "")
    yield "dense", reference.dense_linear(x, held(packed), packed.scale, bias, "")


def routes(x, packed, bias):
    """The results of every native route."""
    ix = index(packed)
    yield "bitmask", linear(x, packed, bias)
    yield "indexed", linear(x, ix, bias)
    yield "dense", linear(x, held(packed), bias, scale=packed.scale)
    yield "bitmask by blocks", linear(x, packed, bias, dense_from=1)
    yield "indexed by blocks", linear(x, ix, bias, dense_from=1)


def judge(results, x, packed, bias):
    exact, limit = tolerance(x, packed, bias)
    for route, y in results:
        assert y.dtype == x.dtype and y.shape == exact.shape, route
        far = (y.double() - exact).abs() - limit
        assert not far.numel() or far.max() <= 0, f"{route} is off by {far.max():.2g} more than allowed"


SIDES = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 200])
CASES = {
    "rows": st.integers(0, 20),
    "cols": SIDES,
    "density": st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    "values": st.sampled_from(VALUES),
    "batch": st.integers(1, 17),
    "dtype": st.sampled_from(FLOATS),
    "biased": st.booleans(),
    "form": st.sampled_from(["plain", "three", "vector", "strided"]),
    "seed": st.integers(0, 999),
}


def case(rows, cols, density, values, batch, dtype, biased, form, seed):
    packed = made(rows, cols, density, values, seed)
    x = input_of(batch, cols, dtype, seed + 1)
    if form == "three":
        x = x.reshape(-1, 2 - batch % 2, cols)
    elif form == "vector":
        x = x[0]
    elif form == "strided":
        x = x.T.contiguous().T
    return x, packed, input_of(1, rows, dtype, seed + 2)[0] if biased else None


@settings(max_examples=250, deadline=None)
@given(**CASES)
def test_every_native_route_is_as_near_to_float64_as_a_dense_linear(native, **drawn):
    x, packed, bias = case(**drawn)
    judge(routes(x, packed, bias), x, packed, bias)


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_the_portable_twin_is_too(**drawn):
    x, packed, bias = case(**drawn)
    judge(twin(x, packed, bias), x, packed, bias)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_native_and_twin_agree(native, **drawn):
    x, packed, bias = case(**drawn)
    both = dict(routes(x, packed, bias))
    size = sums(x, packed, bias)[1]
    for route, y in twin(x, packed, bias):
        apart = (both[route].double() - y.double()).abs()
        assert (apart <= 4 * EPS * size + torch.finfo(x.dtype).eps * y.double().abs() + 2**-24).all(), route


def test_long_rows_and_many_rows_of_input(native):
    for values in VALUES:
        packed, bias = made(19, 5000, 0.4, values), input_of(1, 19)[0]
        for batch in (1, 3, 16, 40):
            x = input_of(batch, 5000)
            judge(routes(x, packed, bias), x, packed, bias)


def test_no_columns_no_rows_and_no_input(native):
    bias = torch.arange(3.0)
    none = pack(torch.zeros(3, 0))
    for results in (routes(torch.zeros(4, 0), none, bias), twin(torch.zeros(4, 0), none, bias)):
        assert all(torch.equal(y, bias.expand(4, 3)) for _, y in results)
    packed, x = made(3, 9, 0.5), torch.zeros(2, 0, 9)
    for results in (routes(x, packed, bias), twin(x, packed, bias)):
        assert all(y.shape == (2, 0, 3) for _, y in results)
    assert linear(torch.zeros(5, 9), made(0, 9, 0.5)).shape == (5, 0)


def test_zeros_in_the_weight_do_not_hide_infinite_input_and_rows_of_zeros_give_the_bias(native):
    packed, bias = made(4, 70, 0.0), input_of(1, 4)[0]
    assert all(torch.equal(y[0], bias) for _, y in routes(torch.ones(1, 70), packed, bias))
    x = torch.ones(2, 70)
    x[:, 69] = torch.inf
    assert all(y.isinf().all() for _, y in routes(x, pack(torch.ones(4, 70)), None))


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize(("kept", "of", "step"), [(2, 4, 4), (4, 8, 4), (1, 4, 2), (1, 8, 1), (8, 8, 8)])
def test_nm_masks_take_the_steady_path_to_the_same_values(native, kept, of, step, values):
    for cols in (8, 24, 104, 256):
        packed = nm(kept, of, 5, cols, values)
        assert steady(packed) == step
        parts = (packed.values, packed.bitmask, packed.row_offsets, packed.scale, None)
        for batch, dtype in ((1, torch.float32), (5, torch.float32), (1, torch.bfloat16), (3, torch.bfloat16)):
            x = input_of(batch, cols, dtype)
            fast, counted = (OPS.packed_linear(x, *parts, each, NEVER) for each in (step, 0))
            size = sums(x, packed, None)[1]
            rounding = EPS if dtype == torch.float32 else torch.finfo(dtype).eps
            assert ((fast.double() - counted.double()).abs() <= 4 * EPS * size + rounding * counted.double().abs()).all()
            judge([("steady", fast)], x, packed, None)


def test_other_masks_are_not_steady():
    assert steady(made(5, 104, 0.5)) == 0 and steady(nm(2, 4, 5, 12)) == 0 and steady(pack(torch.zeros(0, 8))) == 0
    uneven = torch.zeros(2, 16)
    uneven[0, :8] = uneven[1, 8:] = 1.0
    assert steady(pack(uneven)) == 0


@pytest.mark.parametrize(
    ("rows", "cols", "density"),
    [(6, 300, 0.3), (6, 300, 1.0), (4, 9000, 0.002), (4, 9000, 0.0005), (7, 1000, 0.01), (3, 1, 1.0), (3, 50, 0.0),
     (0, 50, 0.5), (5, 0, 0.5), (1, 257, 1.0)],
)  # fmt: skip
def test_index_groups_hold_each_entry_once(rows, cols, density):
    packed = made(rows, cols, density, seed=3)
    if rows > 3:  # an empty row inside, and the outermost columns of another
        weight = unpack(packed)
        weight[2] = 0
        if cols:
            weight[1, 0] = weight[1, -1] = 1.0
        packed = pack(weight)
    ix, dense = index(packed), unpack(packed)
    starts, bases = ix.row_groups.tolist(), ix.bases.tolist()
    offsets, values = ix.offsets.view(-1, 8).tolist(), ix.values.view(-1, 8).tolist()
    assert ix.offsets.dtype == torch.uint8 and starts[0] == 0 and starts[-1] == len(bases) == len(offsets) == len(values)
    for row in range(rows):
        wanted = [(c, v) for c, v in enumerate(dense[row].tolist()) if v]
        found = []
        for group in range(starts[row], starts[row + 1]):
            inside = [k for k in range(8) if values[group][k]]
            assert inside == list(range(len(inside))) and inside, "padding comes last, no group is empty"
            assert offsets[group][len(inside) :] == [0] * (8 - len(inside)), "padding points at the base"
            assert offsets[group][0] == 0, "a group begins at its base"
            found += [(bases[group] + offsets[group][k], values[group][k]) for k in inside]
            following = wanted[len(found)][0] if len(found) < len(wanted) else None
            assert len(inside) == 8 or following is None or following - bases[group] > 255, "a group ends early"
        assert found == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(1, 1500), st.floats(0, 1), st.sampled_from(VALUES), st.integers(0, 99))
def test_an_indexed_weight_is_the_packed_one(rows, cols, share, values, seed):
    packed = made(rows, cols, share**4, values, seed)
    ix = index(packed)
    column = ix.bases.long().repeat_interleave(8) + ix.offsets
    row = torch.repeat_interleave(torch.arange(rows), torch.diff(ix.row_groups) * 8)
    dense = torch.zeros(rows, cols).index_put_((row, column), ix.values.float(), accumulate=True)
    assert torch.equal(dense, held(packed).float()) and ix.scale is packed.scale


def operands(packed, x, bias=None):
    """The arguments of the three operators."""
    ix = index(packed)
    yield (
        OPS.packed_linear,
        (x, packed.values, packed.bitmask, packed.row_offsets, packed.scale, bias, steady(packed), NEVER),
    )
    yield OPS.indexed_linear, (x, ix.values, ix.offsets, ix.bases, ix.row_groups, ix.scale, bias, NEVER)
    yield OPS.dense_linear, (x, held(packed), packed.scale, bias)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_operators_keep_their_schema_and_their_fake(values):
    engine()
    packed = made(6, 20, 0.4, values)
    for x in (input_of(3, 20), input_of(4, 20, torch.bfloat16).reshape(2, 2, 20), input_of(1, 20)[0]):
        for op, given_ in operands(packed, x, input_of(1, 6, x.dtype)[0]):
            torch.library.opcheck(op.default, given_, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("form", [lambda packed: packed, index], ids=["bitmask", "indexed"])
def test_a_compiled_module_gives_the_same(form):
    layer = PackedLinear(form(made(6, 20, 0.4)), torch.ones(6))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for batch in (2, 3, 5, 17):
            x = input_of(batch, 20)
            assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()
    x = input_of(4, 20).reshape(2, 2, 20)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("form", [lambda packed: packed, index], ids=["bitmask", "indexed"])
def test_a_module_saves_and_loads(form, values, tmp_path):
    rows, cols = 6, 40
    packed = nm(2, 4, rows, cols, values)
    layer = PackedLinear(form(packed), input_of(1, rows)[0])
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = PackedLinear(form(nm(2, 4, rows, cols, values, seed=5)), torch.zeros(rows))
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = input_of(3, cols)
    assert torch.equal(other(x), layer(x)) and other.step == layer.step == (4 if layer.layout == "bitmask" else 0)
    judge([("module", other(x))], x, packed, layer.bias)
    assert layer.layout in repr(layer) and str(values).removeprefix("torch.") in repr(layer)


def spoilt():
    """(layout, what a checkpoint changes)."""
    packed = made(4, 40, 0.3)
    ix = index(packed)
    flipped, moved, nan = packed.bitmask.clone(), packed.row_offsets.clone(), packed.values.clone()
    flipped[0, 0] ^= 1
    moved[1] += 1
    nan[0] = torch.nan
    yield "bitmask", {"bitmask": flipped}
    yield "bitmask", {"row_offsets": moved}
    yield "bitmask", {"values": nan}
    yield "int8", {"scale": torch.full((4,), -1.0)}
    far, low, wrap, order, late = (t.clone() for t in (ix.bases, ix.bases, ix.bases, ix.row_groups, ix.row_groups))
    far[-1], low[0] = 40, -1
    wrap[-1] = 2**31 - 1
    offsets, odd = ix.offsets.clone(), ix.values.clone()
    offsets[:] = 255
    order[1], late[0], odd[0] = 99, 1, torch.inf
    yield "indexed", {"bases": far}
    yield "indexed", {"bases": low}
    yield "indexed", {"bases": wrap, "offsets": offsets.clamp(max=1)}
    yield "indexed", {"offsets": offsets}
    yield "indexed", {"row_groups": order}
    yield "indexed", {"row_groups": late}
    yield "indexed", {"values": odd}


@pytest.mark.parametrize(("kind", "changed"), [pytest.param(*e, id=f"{i}-{'-'.join(e[1])}") for i, e in enumerate(spoilt())])
def test_buffers_that_do_not_fit_together_are_not_loaded(kind, changed):
    packed = made(4, 40, 0.3, torch.int8 if kind == "int8" else torch.float32)
    layer = torch.nn.Sequential(PackedLinear(index(packed) if kind == "indexed" else packed))
    state = layer.state_dict()
    with pytest.raises(BadInput, match="^0: ") as caught:
        layer.load_state_dict(state | {f"0.{part}": value for part, value in changed.items()})
    assert "\n" not in str(caught.value)


def test_buffers_of_another_shape_are_not_loaded():
    for form in (lambda packed: packed, index):
        layer = PackedLinear(form(made(4, 40, 0.3)))
        with pytest.raises((BadInput, RuntimeError), match="keeps|does not fit|size mismatch for values"):
            layer.load_state_dict(PackedLinear(form(made(4, 40, 0.9))).state_dict())
    with pytest.raises(BadInput, match="2 dims"):
        PackedLinear(pack(torch.ones(2, 3, 4)))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()])
def test_casts_leave_an_int8_weight_and_its_scale_alone(cast):
    packed = made(5, 30, 0.5, torch.int8)
    packed = replace(packed, scale=packed.scale * 1e-4)  # float16 would make these zero or nearly so
    layer = cast(PackedLinear(packed, torch.ones(5)))
    assert layer.values.dtype == torch.int8 and layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, packed.scale), "the scale went through a shorter dtype"
    for values in FLOATS:
        plain = cast(PackedLinear(made(5, 30, 0.5, values)))
        assert plain.values.dtype == plain(input_of(2, 30, plain.values.dtype)).dtype and plain.scale is None


def test_what_does_not_fit_is_refused(native):
    packed, x = made(6, 20, 0.5), input_of(3, 20)
    ix = index(packed)
    for weight in (packed, ix, torch.ones(6, 20)):
        for wrong in (input_of(3, 19), input_of(3, 24), torch.tensor(1.0)):
            with pytest.raises(BadInput, match=r"does not fit a weight of shape \(6, 20\)"):
                linear(wrong, weight)
        for dtype in (torch.float64, torch.int64, torch.bool):
            with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
                linear(torch.ones(3, 20).to(dtype), weight)
        for impl in ("neon", "AVX2", " "):
            with pytest.raises(RuntimeError, match="no instruction set"):
                linear(x, weight, impl=impl)
        for dense_from in (1, NEVER):
            for bias in (torch.ones(5), torch.ones(1), torch.ones(6, 1)):
                with pytest.raises(RuntimeError, match="a bias of"):
                    linear(x, weight, bias, dense_from=dense_from)
    assert torch.equal(linear(x, packed, impl=engine().name), linear(x, packed))


def test_tensors_of_the_wrong_kind_are_refused(native):
    packed, x = made(6, 20, 0.5), input_of(3, 20)
    ix = index(packed)
    for part, wrong in (
        ("bitmask", packed.bitmask[:, :2].contiguous()),
        ("bitmask", packed.bitmask.int()),
        ("bitmask", packed.bitmask.T.contiguous().T),
        ("row_offsets", packed.row_offsets.int()),
        ("row_offsets", packed.row_offsets[:-1]),
        ("values", packed.values.double()),
        ("values", packed.values.repeat_interleave(2)[::2]),
        ("scale", torch.ones(5)),
        ("scale", torch.ones(6).double()),
    ):
        with pytest.raises(RuntimeError, match=f"packed_linear: {part}"):
            linear(x, replace(packed, **{part: wrong}))
    for part, wrong in (
        ("offsets", ix.offsets[:-8]),
        ("offsets", ix.offsets.int()),
        ("bases", ix.bases.long()),
        ("bases", ix.bases[:-1]),
        ("row_groups", ix.row_groups.int()),
        ("row_groups", ix.row_groups[:0]),
        ("values", ix.values.double()),
        ("scale", torch.ones(7)),
    ):
        with pytest.raises(RuntimeError, match=f"packed_linear: {part}"):
            linear(x, replace(ix, **{part: wrong}))
    with pytest.raises(RuntimeError, match="dense_linear: x"):
        OPS.dense_linear(x, torch.ones(6, 21), None, None)


_PORTABLE = """
import json, sys, torch
from maskwright.kernels.packed_linear import Packed, engine, index, linear
packed, x, bias = torch.load(sys.argv[1], weights_only=True)
packed = Packed(tuple(packed[0]), *packed[1:])
found = {"name": engine().name, "reason": engine().reason, "native": engine().native}
torch.save([linear(x, packed, bias), linear(x, index(packed), bias), linear(x, packed, bias, dense_from=1)], sys.argv[2])
print(json.dumps(found))
"""


def test_turned_off_the_portable_twin_runs_and_says_why(tmp_path):
    packed, x, bias = made(6, 40, 0.4, torch.bfloat16), input_of(5, 40), torch.ones(6)
    torch.save([[packed.shape, packed.values, packed.bitmask, packed.row_offsets, None], x, bias], tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", _PORTABLE, tmp_path / "in", tmp_path / "out"],
        capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "MASKWRIGHT_NATIVE": "0"},
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told == {"name": "portable", "reason": "turned off by MASKWRIGHT_NATIVE=0", "native": False}
    results = torch.load(tmp_path / "out", weights_only=True)
    judge([(str(i), y) for i, y in enumerate(results)], x, packed, bias)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_one_thread_and_two_give_the_same_bits(native, values):
    rows, cols = 301, 2000  # an odd number of rows, enough work for two threads
    packed = made(rows, cols, 0.3, values)
    forms = [packed, index(packed), held(packed), nm(2, 4, rows, cols, values)]
    threads = torch.get_num_threads()
    try:
        for batch, dtype in ((1, torch.float32), (2, torch.float32), (7, torch.bfloat16)):
            x = input_of(batch, cols, dtype)
            for form in forms:
                scale = packed.scale if isinstance(form, torch.Tensor) else None
                results = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(linear(x, form, scale=scale))
                assert torch.equal(*results)
    finally:
        torch.set_num_threads(threads)
