"""The packed layout: bits and order by brute force, round trips bit for bit, int8 to the last digit, every refusal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear import layout
from maskwright.kernels.packed_linear.layout import Packed, check, pack, packed_bytes, unpack

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(0, 19), min_size=1, max_size=4).map(tuple) | st.tuples(st.integers(0, 40), st.integers(0, 40))


def same(a, b):
    """Equal bit for bit: -0.0 is not 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(layout.bit_patterns(a), layout.bit_patterns(b))


def made(shape, density, dtype=torch.float32, seed=0):
    """(weight, keep): zero outside keep; inside also some 0.0 and -0.0."""
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=rng) < density
    weight = torch.randn(shape, generator=rng)
    odd = torch.rand(shape, generator=rng)
    weight = weight.masked_fill(odd < 0.1, 0.0).masked_fill(odd > 0.9, -0.0)
    return weight.masked_fill(~keep, 0).to(dtype), keep


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.sampled_from(FLOATS), st.booleans(), st.integers(0, 99))
def test_any_weight_comes_back_bit_for_bit(shape, density, dtype, masked, seed):
    weight, keep = made(shape, density, dtype, seed)
    packed = check(pack(weight, keep if masked else None))
    assert same(unpack(packed), weight) and packed.shape == shape and packed.values.dtype == dtype
    assert packed.kept == int(keep.sum() if masked else (layout.bit_patterns(weight) != 0).sum())
    assert packed.nbytes == packed_bytes(shape, packed.kept, dtype) and packed.scale is None
    assert packed.density == (packed.kept / weight.numel() if weight.numel() else 1.0)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_the_stored_bits_and_values_are_those_of_a_loop(shape, density, seed):
    weight, keep = made(shape, density, seed=seed)
    packed = pack(weight, keep)
    flat, held = weight.reshape(packed.rows, packed.cols).tolist(), keep.reshape(packed.rows, packed.cols).tolist()
    bits = np.zeros((packed.rows, -(-packed.cols // 8)), dtype=np.uint8)
    values, offsets = [], []
    for r in range(packed.rows):
        offsets.append(len(values))
        for c in range(packed.cols):
            if held[r][c]:
                bits[r, c // 8] |= 1 << c % 8
                values.append(flat[r][c])
    assert np.array_equal(packed.bitmask.numpy(), bits) and packed.row_offsets.tolist() == offsets
    assert same(packed.values, torch.tensor(values, dtype=torch.float32))
    assert packed.counts.tolist() == keep.reshape(packed.rows, packed.cols).sum(1).tolist()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(FLOATS), st.integers(0, 99))
def test_int8_is_the_nearest_step_of_each_row(shape, density, dtype, seed):
    weight, keep = made(shape, density, dtype, seed)
    packed = check(pack(weight, keep, torch.int8))
    flat = weight.float().reshape(packed.rows, packed.cols).numpy()
    held = keep.reshape(flat.shape).numpy()
    top = np.abs(flat).max(1, initial=0.0)
    assert np.array_equal(packed.scale.numpy(), top / np.float32(127))
    for row in range(packed.rows):
        got = packed.values[packed.row_offsets[row] :][: packed.counts[row]].numpy()
        scale = packed.scale[row].item()
        exact = np.rint(flat[row][held[row]] / np.float32(scale)) if scale else np.zeros(held[row].sum())
        assert np.array_equal(got, exact.clip(-127, 127)) and (not scale or np.abs(got).max() == 127)
    dense = unpack(packed).reshape(flat.shape)
    assert dense.dtype == torch.float32 and (np.abs(dense.numpy() - flat) <= top[:, None] / 127 * 0.5001).all()
    assert packed.nbytes == packed_bytes(shape, packed.kept, torch.int8)


def test_halves_round_to_even_and_tiny_rows_become_zero():
    tiny = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [1e-45, 0, -1e-45, 0, 0, 0]])
    packed = check(pack(tiny, values=torch.int8))
    assert packed.values.tolist() == [127, 0, 2, 2, 0, -2, 0, 0] and packed.scale.tolist() == [1.0, 0.0]
    small = torch.full((1, 3), 2e-43)  # the quotient's rounding would exceed 127
    assert pack(small, values=torch.int8).values.abs().max() <= 127


def test_minus_zero_is_stored_without_a_mask_and_dropped_outside_one():
    weight = torch.tensor([[-0.0, 0.0, 1.0]])
    assert same(unpack(pack(weight)), weight) and pack(weight).kept == 2
    keep = torch.tensor([[False, True, True]])
    assert same(unpack(pack(weight, keep)), torch.tensor([[0.0, 0.0, 1.0]])) and pack(weight, keep).kept == 2


def test_other_dtypes_and_layouts_of_memory():
    weight, keep = made((9, 33), 0.5)
    assert same(unpack(pack(weight.T, keep.T)), weight.T.contiguous())
    assert same(unpack(pack(weight, keep, torch.bfloat16)), weight.bfloat16())
    assert same(unpack(pack(weight.double(), values=torch.float32)), weight)
    assert pack(torch.nn.Parameter(weight)).kept == pack(weight).kept
    assert pack(torch.ones(3, 4), values=torch.float16).density == 1.0


def test_work_by_blocks_gives_the_same(monkeypatch):
    weight, keep = made((50, 37), 0.4)
    whole, eight = pack(weight, keep), pack(weight, keep, torch.int8)
    monkeypatch.setattr(layout, "_BLOCK", 100)
    for one, two in ((whole, pack(weight, keep)), (eight, pack(weight, keep, torch.int8))):
        assert all(torch.equal(getattr(one, k), getattr(two, k)) for k in ("values", "bitmask", "row_offsets"))
        assert same(unpack(check(two)), unpack(one))
    assert torch.equal(eight.scale, pack(weight, keep, torch.int8).scale)


@pytest.mark.parametrize(
    ("weight", "more", "says"),
    [
        (torch.tensor([[1.0, torch.inf]]), {}, "inf or NaN"),
        (torch.tensor([[1.0, torch.nan]]), {"values": torch.int8}, "inf or NaN"),
        (torch.ones(2, 3).double(), {}, "float64 values cannot be packed"),
        (torch.ones(2, 3).int(), {}, r"got int32 of shape \(2, 3\)"),
        (torch.tensor(1.0), {}, "1 or more dims"),
        (torch.ones(2, 3), {"values": torch.int16}, "int16 values"),
        (torch.full((1, 2), 70000.0), {"values": torch.float16}, "beyond the range of float16"),
        (torch.full((1, 2), 1e300, dtype=torch.float64), {"values": torch.int8}, "beyond the range of float32"),
        (torch.ones(2, 3), {"keep": torch.eye(2, 3).bool()}, "4 weights outside the mask are not 0"),
        (torch.full((1, 2), torch.nan), {"keep": torch.zeros(1, 2).bool()}, "2 weights outside"),
        (torch.ones(2, 3), {"keep": torch.ones(3, 2).bool()}, r"mask is bool of shape \(3, 2\), .* \(2, 3\)"),
        (torch.ones(2, 3), {"keep": torch.ones(2, 3)}, "mask is float32"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused(weight, more, says):
    with pytest.raises(BadInput, match=says) as caught:
        pack(weight, **more)
    assert "\n" not in str(caught.value)


def spoilt():
    weight, keep = made((4, 11), 0.5)
    good, eight = pack(weight, keep), pack(weight, keep, torch.int8)
    spare, flipped, moved = good.bitmask.clone(), good.bitmask.clone(), good.row_offsets.clone()
    spare[1, 1] |= 128
    flipped[0, 0] ^= 1
    moved[1] += 1
    nan, low, scale = good.values.clone(), eight.values.clone(), eight.scale.clone()
    nan[0], low[0], scale[2] = torch.nan, -128, -1.0
    swapped = good.bitmask.clone()  # as many bits, in another row
    rows = good.counts.tolist()
    assert rows[0] != rows[1]
    swapped[[0, 1]] = swapped[[1, 0]]
    yield replace(good, bitmask=spare), "spare bits"
    yield replace(good, bitmask=flipped), "the bitmask keeps"
    yield replace(good, bitmask=swapped), "row_offsets are not those"
    yield replace(good, bitmask=good.bitmask.short()), "bitmask is int16"
    yield replace(good, bitmask=good.bitmask[:, :1]), "bitmask is uint8 of shape"
    yield replace(good, bitmask=good.bitmask.T.contiguous().T), "contiguous"
    yield replace(good, row_offsets=moved), "row_offsets are not those"
    yield replace(good, row_offsets=moved.int()), "row_offsets is int32"
    yield replace(good, values=good.values[1:]), "there are"
    yield replace(good, values=good.values[None]), "not a row"
    yield replace(good, values=good.values.double()), "values are float64"
    yield replace(good, values=nan), "inf or NaN"
    yield replace(good, shape=(4, 10)), "spare bits"
    yield replace(good, shape=(4, -11)), "not the shape"
    yield replace(good, shape=()), "not the shape"
    yield replace(good, scale=eight.scale), "int8 values, and only they"
    yield replace(eight, scale=None), "int8 values, and only they"
    yield replace(eight, scale=scale), "negative, not finite"
    yield replace(eight, scale=scale * torch.nan), "negative, not finite"
    yield replace(eight, scale=scale[1:]), "scale is float32 of shape"
    yield replace(eight, values=low), "-128"


@pytest.mark.parametrize(
    ("packed", "says"), [pytest.param(p, says, id=f"{i}-{says}") for i, (p, says) in enumerate(spoilt())]
)
def test_check_finds_every_broken_invariant(packed: Packed, says: str):
    with pytest.raises(BadInput, match=says):
        check(packed)
