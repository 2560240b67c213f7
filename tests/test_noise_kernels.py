"""The native pass of noise against numpy and torch: the same bits, on every instruction set of this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.kernels.noise import fits, load, move
from maskwright.updates.noise import normal, stream, table
from maskwright.updates.sparse_mezo.sites import Site

SIZES = (1, 7, 8, 9, 1023, 1024, 1025, 5000)  # about the pass's blocks of 1024
SCALES = (1e-3, -2e-3, 0.3, 1.0, -0.0)
native = pytest.mark.skipif(load() is not None, reason=str(load()))


def sets():
    capable = torch.backends.cpu.get_cpu_capability()
    return ["avx2", "avx512"] if "512" in capable else ["avx2"]


def call(impl, row, seed, place, bits, scales, decay):
    signed = (word - (1 << 64) if word >> 63 else word for word in stream(seed, "w"))
    torch.ops.maskwright.noise_move(row, *signed, place, table(), bits, scales, decay, impl)
    return row


def by_hand(row, seed, place, keep, scales, decay):
    """In numpy, one rounding at a time, on the kept entries alone."""
    z, out = normal(seed, "w", place, place + len(row)).numpy(), row.numpy().copy()
    for at, scale in enumerate(scales):
        step = z * np.float32(scale)
        if decay and at == len(scales) - 1:
            step = step + out * np.float32(decay)
        out[keep] = (out + step)[keep]
    return torch.from_numpy(out)


def packed(keep):
    return torch.from_numpy(np.packbits(keep, bitorder="little"))


def same_bits(a, b):
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def weights(n, seed=0):
    row = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1
    row[::5], row[1::5] = -0.0, 0.0
    return row


@native
@pytest.mark.parametrize("impl", sets())
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pass_is_numpys_to_the_bit(impl, data):
    n, place = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(0, 9) | st.integers(2**33, 2**40))
    scales = data.draw(st.lists(st.sampled_from(SCALES), max_size=3))
    decay, seed = data.draw(st.sampled_from([0.0, -1e-3, 0.7])), data.draw(st.integers(0, 2**64 - 1))
    density = data.draw(st.sampled_from([None, 0.0, 0.01, 0.25, 0.5, 0.99, 1.0]))
    keep = np.ones(n, bool) if density is None else np.random.default_rng(n).random(n) < density
    row = weights(n)
    got = call(impl, row.clone(), seed, place, None if density is None else packed(keep), scales, decay)
    same_bits(got, by_hand(row, seed, place, keep, scales, decay))
    same_bits(got[torch.from_numpy(~keep)], row[torch.from_numpy(~keep)])


@native
@pytest.mark.parametrize("impl", sets())
@pytest.mark.parametrize("place", [0, 1, 4095])
def test_on_negative_zeros_it_is_the_noise_itself(impl, place):
    n = 200_001  # more than a thread's share, and a ragged end
    got = call(impl, torch.full((n,), -0.0), 3, place, None, [1.0], 0.0)
    same_bits(got, normal(3, "w", place, place + n))


@native
@pytest.mark.parametrize("impl", sets())
def test_every_segment_of_the_table_is_the_one_that_numpy_takes(impl):
    """A table of the segments' own numbers: what comes back says which were read."""
    numbered = torch.stack((torch.arange(len(table()), dtype=torch.float32), torch.zeros(len(table()))), 1).contiguous()
    row, (start, increment) = torch.full((1 << 18,), -0.0), stream(0, "w")
    signed = (word - (1 << 64) if word >> 63 else word for word in (start, increment))
    torch.ops.maskwright.noise_move(row, *signed, 0, numbered, None, [1.0], 0.0, impl)
    z = normal(0, "w", 0, len(row))
    order = row.abs().argsort(stable=True)  # segments rise with the share of the tail, from far out to the middle
    assert bool((z.abs()[order].diff() <= 0.01).all()) and 127 * 256 <= row.abs().min() and row.abs().max() < 158 * 256 + 1


@native
@pytest.mark.parametrize("impl", sets())
def test_dropped_entries_keep_every_bit_of_any_kind(impl):
    kinds = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    row = kinds.repeat(500)
    row.view(torch.int32)[2::6] |= 0x1234  # a NaN's own bits
    got = call(impl, row.clone(), 0, 0, torch.zeros(375, dtype=torch.uint8), [1.0, -0.5], 0.3)
    same_bits(got, row)


@native
def test_nothing_beyond_the_row_is_written():
    room = torch.full((1050,), 9.0)
    move(room[3:1028], stream(0, "w"), table(), packed(np.ones(1025, bool)), [1.0])
    same_bits(room[3:1028], by_hand(torch.full((1025,), 9.0), 0, 0, np.ones(1025, bool), [1.0], 0.0))
    assert bool((room[:3] == 9).all()) and bool((room[1028:] == 9).all())


@native
@pytest.mark.parametrize("kind", ["small", "large", "random", "dense"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_site_moves_the_same_with_and_without(kind, decay):
    n = 70_001  # more than a piece of the twin's
    ends = []
    for passes in (False, True):
        site = Site("w", nn.Parameter(weights(n)), kind, n if kind == "dense" else n // 4)
        site.settle(0)
        for seed in (1, 2):
            if passes:
                with torch.no_grad():
                    site._passes(site.flat, seed, (1e-3, -0.5), decay)
            else:
                before = site.parameter._version
                site.move(seed, (1e-3, -0.5), decay)
                assert site.parameter._version > before  # autograd sees the change
        ends.append(site.flat)
    same_bits(*ends)
    assert not torch.equal(ends[0], weights(n))


def test_rows_that_do_not_fit_go_to_the_twin():
    assert fits(torch.zeros(4)) is (load() is None)
    assert not any(map(fits, (torch.zeros(4).double(), torch.zeros(4).half(), torch.zeros(2, 2), torch.zeros(8)[::2])))
    site = Site("w", nn.Parameter(torch.ones(9, dtype=torch.float64)), "dense", 9)
    site.move(5, (0.5,))
    assert torch.equal(site.flat, 1 + 0.5 * normal(5, "w", 0, 9).double())


@native
@pytest.mark.parametrize(
    "bad,word",
    [
        ((torch.zeros(8).double(), None, table()), "float32"),
        ((torch.zeros(16)[::2], None, table()), "contiguous"),
        ((torch.zeros(9), torch.zeros(1, dtype=torch.uint8), table()), "9 entries have 2 bytes"),
        ((torch.zeros(8), torch.zeros(1, dtype=torch.bool), table()), "bytes of bits"),
        ((torch.zeros(8), None, table()[:100]), "chords"),
    ],
)
def test_what_would_read_beyond_is_refused(bad, word):
    row, bits, chords = bad
    with pytest.raises(RuntimeError, match=word):
        torch.ops.maskwright.noise_move(row, 1, 1, 0, chords, bits, [1.0], 0.0)
    with pytest.raises(RuntimeError, match="no instruction set sse"):
        torch.ops.maskwright.noise_move(torch.zeros(8), 1, 1, 0, table(), None, [1.0], 0.0, "sse")


SCRIPT = """
import hashlib
import torch
from torch import nn
from maskwright.kernels.noise import load
from maskwright.updates.sparse_mezo import SparseMezo
for kind in ("small", "random", "dense"):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 30)), torch.randn(8, 30)
    with SparseMezo(mask=kind, weight_decay=0.1, n=2).attach(model) as run:
        for _ in range(3):
            run.step(lambda: (model(x) - x).square().mean(), lr=1e-2)
    print(run.log.rows, hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
print(load() is None)
"""


@native
def test_a_run_without_native_kernels_has_the_same_log_and_weights():
    told = []
    for on in ("1", "0"):
        env = os.environ | {"MASKWRIGHT_NATIVE": on}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        told.append(run.stdout.split("\n"))
    assert told[0][:-2] == told[1][:-2] and len(told[0]) == 5
    assert (told[0][-2], told[1][-2]) == ("True", "False")
