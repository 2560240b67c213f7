"""Noise by seed, name and offset: known answers, independence of the borders, and the distributions."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.updates import noise
from maskwright.updates.noise import bernoulli, normal, uniform_bits

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def mix(state: int) -> int:
    """SplitMix64's mix in Python's whole numbers, as published."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def entry(seed: int, name: str, at: int) -> int:
    first, gamma = noise.stream(seed, name)
    return mix(first + (at // 2 + 1) * gamma & MASK) >> 32 * (at % 2) & 0xFFFFFFFF


def test_known_answers_of_splitmix64():
    # The published generator with seeds 1234567 and 0 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert noise._mixed(1234567, GOLDEN, 0, 5).tolist() == known
    assert noise._mixed(1234567, GOLDEN, 3, 2).tolist() == known[3:]
    assert noise._mixed(0, GOLDEN, 0, 3).tolist() == [16294208416658607535, 7960286522194355700, 487617019471545679]


def test_known_answers_of_ours():
    # Frozen: a change would make every saved log and every seeded merge mean something else.
    assert noise.stream(0, "weight") == (9366495212941329472, 8375057945452996435)
    assert uniform_bits(0, "weight", 0, 4).tolist() == [962494977, 2445874932, 2507339023, 2722966532]
    assert normal(0, "weight", 0, 4).numpy().view(np.uint32).tolist() == [3208783906, 1069377364, 1068541324, 1066256894]


@given(st.integers(0, 2**40), st.integers(0, 9), st.sampled_from(["", "a.weight", "é"]), st.integers(-(2**70), 2**70))
@settings(max_examples=30, deadline=None)
def test_every_entry_is_a_half_word_by_hand(start, count, name, seed):
    assert uniform_bits(seed, name, start, start + count).tolist() == [entry(seed, name, start + i) for i in range(count)]


@given(st.lists(st.integers(0, 3 * 2**15 + 7), max_size=6))
@settings(max_examples=20, deadline=None)
def test_the_same_whatever_the_borders(borders):
    length = 3 * 2**15 + 7
    cuts = sorted({0, length, *borders})
    pairs = list(itertools.pairwise(cuts))
    for make in (
        lambda a, b: torch.from_numpy(uniform_bits(3, "w", a, b).astype(np.int64)),
        lambda a, b: normal(3, "w", a, b),
    ):
        assert torch.equal(torch.cat([make(a, b) for a, b in pairs]), make(0, length))
    keep = torch.cat([bernoulli(3, "w", a, b, 0.3) for a, b in pairs])
    assert torch.equal(keep, bernoulli(3, "w", 0, length, 0.3))


def test_the_same_from_many_threads():
    edges = range(0, 400_001, 40_000)
    whole = normal(1, "w", 0, 400_000)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda at: normal(1, "w", at, at + 40_000), edges[:-1]))
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_and_names_give_other_noise_that_is_not_correlated():
    draws = [normal(seed, name, 0, 50_000) for seed, name in ((0, "a"), (1, "a"), (0, "b"), (0, "a\0"))]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(float(first @ second) / 50_000) < 4 / 50_000**0.5
    assert abs(float(draws[0][:-1] @ draws[0][1:]) / 49_999) < 4 / 50_000**0.5  # nor with its own neighbour


def test_every_bit_of_the_words_is_fair():
    bits = uniform_bits(5, "w", 0, 200_000)
    shares = [(bits >> np.uint32(place) & np.uint32(1)).mean() for place in range(32)]
    assert np.abs(np.array(shares) - 0.5).max() < 4.5 * 0.5 / 200_000**0.5


@pytest.mark.parametrize("density", [0.0, 2.0**-33, 2.0**-32, 0.1, 0.5, 1 - 2.0**-32, 1.0])
def test_bernoulli_is_below_the_floored_bound(density):
    bits = uniform_bits(9, "w", 1, 30_000).astype(np.int64)
    keep = bernoulli(9, "w", 1, 30_000, density)
    assert keep.dtype == torch.bool
    assert np.array_equal(keep.numpy(), bits < int(density * 2**32))
    assert abs(float(keep.float().mean()) - density) < 4 / 30_000**0.5


def test_bernoulli_nests():
    sparse, dense = bernoulli(2, "w", 0, 9999, 0.2), bernoulli(2, "w", 0, 9999, 0.7)
    assert not bool((sparse & ~dense).any())


def test_normals_are_the_inverse_distribution_function_of_the_bits():
    bits = uniform_bits(4, "w", 0, 3000).astype(np.int64)
    low = (bits & 0x7FFFFFFF) | 1
    want = np.array([NormalDist().inv_cdf(int(k) / 2**32) for k in low])
    want = np.where(bits >> 31, -want, want)
    assert np.abs(normal(4, "w", 0, 3000).numpy() - want).max() < 2e-6


@pytest.mark.parametrize("half", [0, 1, 2, 3, 255, 2**23 + 1, 2**24 + 1, 2**30, 2**31 - 129, 2**31 - 1])
def test_normals_of_chosen_bits_mirror_and_hold_in_the_tail(monkeypatch, half):
    def pieces(*_):
        yield 0, np.array([half, half | 1 << 31], np.uint32)

    monkeypatch.setattr(noise, "_pieces", pieces)
    below, above = normal(0, "w", 0, 2).tolist()
    assert below == -above
    assert abs(below - NormalDist().inv_cdf((half | 1) / 2**32)) < 2e-6


def test_moments_and_shape_of_the_normals():
    z = normal(7, "w", 0, 1_000_000).double()
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - want) < 4 * (variance / 1e6) ** 0.5
    ordered = z.sort().values
    share = torch.special.ndtr(ordered)
    assert float((share - torch.arange(0.5, 1e6, dtype=torch.float64) / 1e6).abs().max()) < 1.95 / 1000  # KS at 0.1 %


def test_out_takes_the_result_and_nothing_is_read_beyond():
    room = torch.full((12,), 9.0)
    normal(0, "w", 5, 15, out=room[1:11])
    assert torch.equal(room[1:11], normal(0, "w", 5, 15)) and room[0] == 9 and room[11] == 9
    keep = torch.zeros(4, dtype=torch.bool)
    assert bernoulli(0, "w", 0, 4, 1.0, out=keep) is keep and bool(keep.all())
    assert normal(0, "w", 3, 3).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_bits(0, "layer", 5, 4),
        lambda: normal(0, "layer", -1, 4),
        lambda: bernoulli(0, "layer", 0, 4, 1.1),
        lambda: bernoulli(0, "layer", 0, 4, float("nan")),
        lambda: normal(0, "layer", 0, 4, out=torch.zeros(5)),
        lambda: normal(0, "layer", 0, 4, out=torch.zeros(4, dtype=torch.bfloat16)),
        lambda: normal(0, "layer", 0, 4, out=torch.zeros(8)[::2]),
        lambda: bernoulli(0, "layer", 0, 4, 0.5, out=torch.zeros(4)),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call):
    with pytest.raises(BadInput, match=r"^layer: [^\n]+$"):
        call()
