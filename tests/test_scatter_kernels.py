"""Sparse additions: the native operators against their torch twins, to the bit, also on weights mapped from a file."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.kernels import scatter
from maskwright.kernels.scatter import Stored, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 1 << 21
native = pytest.mark.skipif(scatter.load() is not None, reason=str(scatter.load()))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def spots(length, density, seed):
    where = (torch.rand(length, generator=rng(seed)) < density).nonzero().flatten()
    return where, torch.randn(len(where), generator=rng(seed + 1)) * 0.01


def of_file(path, numbers, kind=torch.bfloat16, at=0, flags=None):
    """Tensors one after the other in a file's mapping, which is theirs alone."""
    total = sum(numbers)
    values = (torch.randn(total, generator=rng(7)) * 0.02).to(kind)
    path.write_bytes(b"\0" * at + bits(values).numpy().tobytes())
    flags = mmap.MAP_PRIVATE if flags is None else flags
    with path.open("r+b") as handle:
        memory = mmap.mmap(handle.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return list(torch.frombuffer(memory, dtype=kind, offset=at, count=total).split(numbers)), values.split(numbers)


def paths():
    """Bytes of this process that are mapped from files, by path."""
    out = {}
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            parts = line.split(maxsplit=5)
            if len(parts) == 6:
                low, high = (int(end, 16) for end in parts[0].split("-"))
                out[parts[5].strip()] = out.get(parts[5].strip(), 0) + high - low
    return out


@native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_additions_and_old_entries(data):
    targets, indices, values = [], [], []
    for seed in range(data.draw(st.integers(0, 4))):
        length = data.draw(st.sampled_from([0, 1, 100, 5000, 600_000]))
        where, added = spots(length, data.draw(st.sampled_from([0.0, 0.01, 1.0])), seed)
        targets.append(torch.randn(length, generator=rng(seed)).to(data.draw(st.sampled_from((*DTYPES, torch.float64)))))
        indices.append(where)
        values.append(added.to(data.draw(st.sampled_from(DTYPES))))
    mine, theirs = [t.clone() for t in targets], [t.clone() for t in targets]
    old = scatter.add(mine, indices, values)
    other = [reference.add(*each) for each in zip(theirs, indices, values, strict=True)]
    for a, b in zip([*mine, *old], [*theirs, *other], strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def test_by_hand():
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    (old,) = scatter.add([target], [torch.tensor([1, 2])], [torch.tensor([0.5, 2**-8])])
    assert old.tolist() == [2, 3] and target.tolist() == [[1, 2.5], [3, 4]]  # 3 + 1/256 rounds to 3
    target = torch.tensor([65504.0, 1.0], dtype=torch.float16)
    scatter.add([target], [torch.tensor([0])], [torch.tensor([65504.0])])
    assert target.tolist() == [float("inf"), 1]


@native
@pytest.mark.parametrize("at", [0, 8, 4096 + 8])
@pytest.mark.parametrize("density", [0.0001, 0.02])
def test_a_private_mapping_gets_the_same_bits_at_the_same_addresses(tmp_path, at, density):
    numbers = [LARGE // 2 - 40, 3, LARGE, 17, LARGE * 2 + 5]  # entries of two bytes: large pages lie across them
    mapped, values = of_file(tmp_path / "w", numbers, at=at)
    aliases, content = (
        [t.numpy() if t.dtype != torch.bfloat16 else bits(t).numpy() for t in mapped],
        (tmp_path / "w").read_bytes(),
    )
    mapped[2][5] = 3.0  # written to before: a page that is no longer the file's
    values[2][5] = 3.0
    chosen = [spots(number, density, seed) for seed, number in enumerate(numbers)]
    before = paths().get(str(tmp_path / "w"))
    for round_ in range(2):
        for drop in ((), (2,))[round_ : round_ + 1]:  # the second time some of them
            where = [w for i, (w, _) in enumerate(chosen) if i not in drop]
            added = [v for i, (_, v) in enumerate(chosen) if i not in drop]
            old = scatter.add([t for i, t in enumerate(mapped) if i not in drop], where, added)
            other = [reference.add(t, *c) for i, (t, c) in enumerate(zip(values, chosen, strict=True)) if i not in drop]
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(old, other, strict=True))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mapped, values, strict=True))
            assert all((a == bits(b).numpy()).all() for a, b in zip(aliases, values, strict=True))  # what looked on sees it
    assert (tmp_path / "w").read_bytes() == content
    left = paths().get(str(tmp_path / "w"), 0)
    told = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    large = told.is_file() and "[never]" not in told.read_text()
    assert (left < before - 2 * LARGE) == (large and density == 0.02)  # few entries: nothing is made anew


@native
def test_a_shared_mapping_stays_shared(tmp_path):
    numbers = [LARGE * 3]
    mapped, values = of_file(tmp_path / "w", numbers, flags=mmap.MAP_SHARED)
    where, added = spots(numbers[0], 0.02, 0)
    scatter.add(mapped, [where], [added])
    reference.add(values[0], where, added)
    assert (tmp_path / "w").read_bytes() == bits(values[0]).numpy().tobytes()


@native
def test_tensors_that_overlap_are_added_to_in_their_order():
    one = torch.zeros(100, dtype=torch.bfloat16)
    two = one.clone()
    where = torch.arange(0, 100, 3)
    values = [torch.ones(len(where)), torch.full((len(where),), 2**-9)]
    old = scatter.add([one, one[:]], [where, where], values)
    other = [reference.add(two, where, value) for value in values]
    assert torch.equal(one, two) and torch.equal(old[1], other[1]) and old[1].tolist() == [1.0] * len(where)


@native
@pytest.mark.parametrize("where", [[-1, 2], [2, 100], [5, 5], [7, 3]])
def test_indices_that_do_not_fit_write_nowhere_else(where):
    held = torch.zeros(300)
    with pytest.raises(RuntimeError, match="indices must ascend and lie in their tensor"):
        scatter.add([held[100:200]], [torch.tensor(where)], [torch.ones(2)])
    assert not held[:100].any() and not held[200:].any()


def stored(counts, offsets, values, gap=0):
    """A file of one tensor's parts."""
    file = bytearray(gap)
    places = []
    for part in (counts, offsets, values):
        if part is not None:
            places.append(len(file))
            file += part.view(torch.uint8).numpy().tobytes() if part.numel() else b""
            file += bytes(-len(file) % 4)
    at = places if offsets is not None else [places[0], -1, places[1]]
    return torch.frombuffer(file + b"\0", dtype=torch.uint8), Stored(
        at[0], len(counts), at[1], len(values), at[2], values.dtype
    )


def offsets_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int32).to(torch.uint16)


@native
def test_places_by_hand_and_what_is_not_sound():
    counts = torch.tensor([2, 0, 1], dtype=torch.int32)
    good = stored(counts, offsets_of(3, 65535, 1), torch.ones(3).bfloat16())
    ((indices, last),) = scatter.places(good[0], [good[1]])
    assert indices.tolist() == [3, 65535, 131073] and last == 131073
    assert torch.equal(indices, reference.places(counts, offsets_of(3, 65535, 1), scatter.BLOCK))
    for bad in (
        stored(counts, offsets_of(3, 3, 1), torch.ones(3)),
        stored(counts, offsets_of(4, 3, 1), torch.ones(3)),
        stored(torch.tensor([2, -1, 2], dtype=torch.int32), offsets_of(3, 4, 1), torch.ones(3)),
        stored(torch.tensor([2, 0, 2], dtype=torch.int32), offsets_of(3, 4, 1), torch.ones(3)),
        stored(torch.tensor([2, 0, 0], dtype=torch.int32), offsets_of(3, 4, 1), torch.ones(3)),
        stored(torch.tensor([2**31 - 1] * 3, dtype=torch.int32), offsets_of(3, 4, 1), torch.ones(3)),
        stored(counts, offsets_of(3, 4, 1), torch.tensor([1.0, float("nan"), 1.0])),
        stored(counts, offsets_of(3, 4, 1), torch.tensor([1.0, 1.0, float("inf")]).half()),
        stored(counts, offsets_of(3, 4, 1), torch.tensor([-float("inf"), 1.0, 1.0]).bfloat16()),
        stored(counts, offsets_of(3, 4, 1), torch.ones(3), gap=2),
        stored(torch.tensor([7], dtype=torch.uint8), None, torch.ones(2)),
        stored(torch.tensor([1], dtype=torch.uint8), None, torch.ones(2)),
    ):
        both = torch.cat([bad[0][: len(bad[0]) // 4 * 4], good[0]])
        moved = good[1]._replace(**{k: getattr(good[1], k) + len(bad[0]) // 4 * 4 for k in ("counts", "offsets", "values")})
        (_, told), (found, last) = scatter.places(both, [bad[1], moved])
        assert told == -2 and last == 131073 and found.tolist() == [3, 65535, 131073]
    with pytest.raises(RuntimeError, match="outside the file"):
        scatter.places(good[0], [good[1]._replace(number=99)])
    with pytest.raises(RuntimeError, match="outside the file"):
        scatter.places(good[0], [good[1]._replace(blocks=2**62)])
    assert scatter.places(good[0], []) == []


@native
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 1, 8, 63, 64, 65, 70_000]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(DTYPES))
def test_bits_are_the_places_they_stand_for(length, density, dtype):
    keep = torch.rand(length, generator=rng(length)) < density
    where = keep.nonzero().flatten()
    packed = torch.cat([keep, torch.zeros(-length % 8, dtype=torch.bool)]).view(-1, 8)
    data = (packed * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    file, each = stored(data, None, torch.ones(len(where)).to(dtype))
    ((indices, last),) = scatter.places(file, [each])
    assert torch.equal(indices, where) and last == (int(where[-1]) if len(where) else -1)


@native
def test_samples():
    values = [torch.randn(n, generator=rng(n)).to(kind) for n in (0, 1, 1023, 1024, 1025, 100_003) for kind in DTYPES]
    for mine, value in zip(scatter.sample(values, 16, 64), values, strict=True):
        assert torch.equal(mine, reference.sample(value, 16, 64)) and mine.dtype == torch.float32
    assert scatter.sample([torch.ones(3, dtype=torch.float64)], 16, 64)[0].dtype == torch.float64


def test_room_is_its_own():
    one, two = (scatter.room(LARGE, torch.int16) for _ in range(2))
    one.fill_(1)
    two.fill_(2)
    assert int(one.sum()) == LARGE and one.is_contiguous() and scatter.room(0, torch.int64).numel() == 0


SCRIPT = """
import torch
from maskwright.kernels import scatter
x = torch.zeros(9).bfloat16()
print(scatter.add([x], [torch.tensor([1, 5])], [torch.ones(2)])[0].tolist(), x.tolist(), scatter.load() is None)
print(scatter.sample([torch.arange(3.0)], 16, 64)[0].tolist(), scatter.places(torch.zeros(8).byte(), []) is None)
"""


def test_without_native_kernels_the_twins_run():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"MASKWRIGHT_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "[0.0, 0.0] [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0] False", "[0.0, 1.0, 2.0] True",
    ]  # fmt: skip
