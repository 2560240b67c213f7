"""Mask, SoftMask and MaskSet: algebra, what check names, fits, hashes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet, base_hash, tensor_hash
from maskwright.core.pattern import NM, Block, Group, Pattern, Unstructured
from maskwright.core.select import draw, generator

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


def bools(*rows: list[int] | int) -> Tensor:
    return torch.tensor(rows).bool()


def some(seed: int, pattern: Pattern = Unstructured()) -> Mask:  # noqa: B008 frozen
    return draw(pattern, (4, 8), None if pattern.fixed else pattern.grid((4, 8))[1] // 2, rng=generator(seed))


# --- Mask


def test_counts_by_hand() -> None:
    mask = Mask(bools([1, 0, 1], [0, 0, 1]))
    assert (mask.count, mask.density, mask.shape, mask.indices().tolist()) == (3, 0.5, (2, 3), [0, 2, 5])
    assert Mask(torch.zeros(0, 3).bool()).density == 1.0 and Mask(torch.zeros(0, 3).bool()).count == 0
    assert Mask(torch.tensor(True)).count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64], ids=str)
def test_a_mask_is_boolean(dtype: torch.dtype) -> None:
    with pytest.raises(BadInput, match=r"boolean, got torch\.\w+ of shape \(2, 3\)") as caught:
        Mask(torch.ones(2, 3, dtype=dtype))
    assert "\n" not in str(caught.value)


def test_masks_are_frozen() -> None:
    mask = some(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.keep = ~mask.keep  # type: ignore[misc]
    masks = MaskSet({"a": mask})
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.base = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        masks["b"] = mask  # type: ignore[index]


def test_a_set_does_not_follow_the_dict_it_was_made_from() -> None:
    source, made = {"a": some(0)}, {"seed": 0}
    for masks in (MaskSet(source, made), SoftMaskSet({"a": SoftMask(torch.ones(2))}, made)):
        made["seed"] = 1
        assert masks.made_by == {"seed": 0}
        made["seed"] = 0
    masks = MaskSet(source)
    source["b"] = some(1)
    assert list(masks) == ["a"]


@QUICK
@given(a=st.integers(0, 99), b=st.integers(0, 99), pattern=st.sampled_from([Unstructured(), Block((2, 2)), Group((0,))]))
def test_set_algebra(a: int, b: int, pattern: Pattern) -> None:
    x, y = some(a, pattern), some(b, pattern)
    before = x.keep.clone()
    assert torch.equal((x & y).keep, x.keep & y.keep)
    assert torch.equal((x | y).keep, x.keep | y.keep)
    assert torch.equal((x - y).keep, x.keep & ~y.keep)
    assert torch.equal((~x).keep, ~x.keep)
    assert (~(x & y)).equal(~x | ~y) and (~~x).equal(x) and (x - y).equal(x & ~y)
    assert (x - y).count + (x & y).count == x.count
    # Whole units stay whole, so the pattern survives and holds.
    assert (x & y).check().pattern == (x | y).check().pattern == (x - y).check().pattern == pattern
    assert torch.equal(x.keep, before)


def test_a_count_per_group_does_not_survive_algebra() -> None:
    x, y = some(0, NM(1, 4)), some(1, NM(1, 4))
    assert (x & y).pattern == (x | y).pattern == (x - y).pattern == Unstructured()
    assert (~x).pattern == NM(3, 4) and (~x).check().count == 24 and (~~x).equal(x)
    assert (~Mask(torch.ones(4).bool(), NM(4, 4))).pattern == Unstructured()
    assert (x & some(0, Block((2, 2)))).pattern == Unstructured()


def test_masks_of_other_shapes_do_not_combine() -> None:
    # torch would broadcast these silently
    with pytest.raises(BadInput, match=r"\(4, 8\) and \(8,\)"):
        some(0) & Mask(torch.ones(8).bool())
    with pytest.raises(BadInput, match="cannot be combined"):
        some(0) | Mask(torch.ones(1, 8).bool())
    with pytest.raises(BadInput, match="cannot be combined"):
        some(0) - Mask(torch.ones(4, 1).bool())


def test_equal_asks_for_entries_and_pattern() -> None:
    keep = torch.ones(4, 8).bool()
    assert Mask(keep).equal(Mask(keep.clone()))
    assert not Mask(keep).equal(Mask(keep, Block((2, 2))))
    assert not Mask(keep).equal(~Mask(keep)) and not Mask(keep).equal(Mask(keep[:2]))


@pytest.mark.parametrize(
    ("pattern", "keep", "message"),
    [
        (NM(1, 4), bools([1, 0, 0, 0, 1, 0, 0, 1]), r"1:4 does not hold on shape \(1, 8\): group 1 keeps 2 \(1 groups of 2"),
        (NM(2, 4, 0), bools([1], [1], [1], [0]), r"2:4@0 does not hold on shape \(4, 1\): group 0 keeps 3"),
        (
            Block((2, 2)),
            bools([1, 1, 0, 1], [1, 1, 0, 0]),
            r"block:2x2 does not hold on shape \(2, 4\): 3 entries are split",
        ),
        (Block((2, 2), pad=True), bools([1, 1, 1], [1, 1, 0], [0, 0, 1]), r"\+pad does not hold.*: 1 entries"),
        (Group((1,)), bools([1, 0], [1, 1]), r"group:1 does not hold on shape \(2, 2\): 1 entries"),
    ],
    ids=str,
)
def test_check_names_what_is_wrong(pattern: Pattern, keep: Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Mask(keep, pattern).check()
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=rf"layer\.weight: .*{message}"):
        MaskSet({"fine": some(0), "layer.weight": Mask(keep, pattern)}).check()


@pytest.mark.parametrize(
    "pattern", [Unstructured((1,)), NM(1, 4), NM(3, 4, 0), Block((2, 4)), Block((3, 3), pad=True), Group((1,))], ids=str
)
def test_check_passes_what_holds(pattern: Pattern) -> None:
    mask = some(3, pattern)
    assert mask.check() is mask
    if pattern.fixed is None:
        for full in (torch.ones(4, 8).bool(), torch.zeros(4, 8).bool()):
            Mask(full, pattern).check()


# --- SoftMask


def test_soft_masks_harden_strictly_above_the_threshold() -> None:
    soft = SoftMask(torch.tensor([0.0, 0.5, 0.2, -0.0]))
    assert soft.harden().keep.tolist() == [False, True, True, False] and soft.shape == (4,)
    assert soft.harden(0.2).keep.tolist() == [False, True, False, False] or float(soft.values[2]) > 0.2


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_soft_masks_refuse_negative_and_non_finite_values(bad: float) -> None:
    with pytest.raises(BadInput, match=r"of shape \(2,\) holds a negative or non-finite"):
        SoftMask(torch.tensor([0.5, bad]))
    with pytest.raises(BadInput, match="real values"):
        SoftMask(torch.ones(2, dtype=torch.bool))
    with pytest.raises(BadInput, match="not divisible"):
        SoftMask(torch.ones(6), NM(2, 4))


# --- MaskSet


def pair() -> tuple[MaskSet, MaskSet]:
    a = MaskSet({"x": Mask(bools([1, 1, 0, 0])), "y": Mask(bools([1, 0]))}, {"method": "m", "seed": 1}, "base")
    b = MaskSet({"x": Mask(bools([1, 0, 1, 0])), "y": Mask(bools([1, 1]))}, {"method": "n"}, "base")
    return a, b


def test_totals_of_a_set() -> None:
    a, b = pair()
    assert (a.count, a.total, a.density, len(a), list(a)) == (3, 6, 0.5, 2, ["x", "y"])
    assert repr(a) == "MaskSet(2 sites, 3 of 6 kept, density 0.5)"
    assert MaskSet({}).density == 1.0 and MaskSet({}).count == 0 and MaskSet({}).equal(MaskSet({}))
    assert a.overlap(b) == (1 + 1) / (3 + 2) and a.overlap(a) == 1.0 and a.overlap(~a) == 0.0
    assert a.overlap(MaskSet({"x": b["x"]})) == 1 / 3  # over the sites both have


def test_set_algebra_goes_name_by_name_and_says_what_it_did() -> None:
    a, b = pair()
    assert {n: m.keep.flatten().tolist() for n, m in (a & b).items()} == {
        "x": [True, False, False, False],
        "y": [True, False],
    }
    assert ((a | b).count, (a - b).count, (~a).count) == (5, 1, 3)
    assert (a & b).made_by == {"method": "and", "of": [{"method": "m", "seed": 1}, {"method": "n"}]}
    assert (a | b).made_by["method"] == "or" and (a - b).made_by["method"] == "minus"
    assert (~a).made_by == {"method": "not", "of": [{"method": "m", "seed": 1}]}
    assert (a & b).base == (~a).base == "base" and (a & MaskSet(b.masks, base="other")).base == ""


def test_names_must_agree_unless_told() -> None:
    a, b = pair()
    only = MaskSet({"x": b["x"], "z": b["y"]})
    for call in (lambda: a & only, lambda: a | only, lambda: a - only):
        with pytest.raises(BadInput, match="different sites: y, z"):
            call()
    inner = a.combine(only, lambda p, q: p & q, align="inner")
    assert list(inner) == ["x"] and inner.count == 1
    assert a.combine(b, lambda p, q: p & q).equal(a & b)


def test_equal_sets() -> None:
    a, b = pair()
    assert a.equal(MaskSet(a.masks, {"method": "other"}, "")) and not a.equal(b)
    assert not a.equal(MaskSet({"x": a["x"]})) and not MaskSet({"x": a["x"]}).equal(a)


def test_fits_names_the_site_and_both_shapes() -> None:
    model = nn.Linear(4, 2, bias=False)
    masks = MaskSet({"weight": Mask(torch.ones(2, 4).bool())})
    masks.fits(model)
    masks.fits({"weight": torch.zeros(2, 4), "more": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"weight: the mask has shape \(2, 4\), the parameter \(4, 2\)"):
        masks.fits(nn.Linear(2, 4, bias=False))
    many = MaskSet({**masks, "a": masks["weight"], "b": masks["weight"], "c": masks["weight"], "d": masks["weight"]})
    with pytest.raises(BadInput, match=r"no parameter named a, b, c \(4 of 5 sites are missing\)"):
        many.fits(model)


def test_fits_sees_both_names_of_a_tied_parameter() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    MaskSet({"b.weight": Mask(torch.ones(3, 3).bool())}).fits(model)


# --- hashes


def test_base_hash_hears_values_and_names_and_nothing_else() -> None:
    a, b = torch.randn(3, 2, generator=generator(0)), torch.randn(4, generator=generator(1))
    base = base_hash({"a": a, "b": b})
    assert base == base_hash({"b": b, "a": a}) == base_hash({"a": tensor_hash(a), "b": tensor_hash(b)})
    assert base == base_hash({"a": a.T.contiguous().T, "b": nn.Parameter(b)})  # layout and autograd are not values
    assert len(base) == 64
    changed = a.clone()
    changed[2, 1] += 1e-6
    others = [{"a": changed, "b": b}, {"a": b, "b": a}, {"a": a}, {"a": a.reshape(2, 3), "b": b}, {"A": a, "b": b}]
    others += [{"a": a.double(), "b": b}, {"a": a, "b": b, "c": b}]
    assert len({base, *(base_hash(other) for other in others)}) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_its_widening_share_a_hash(dtype: torch.dtype) -> None:
    half = torch.randn(5, 3, generator=generator(0)).to(dtype)
    assert tensor_hash(half) == tensor_hash(half.float()) != tensor_hash(half.double())


@pytest.mark.parametrize("value", [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0)], ids=str)
def test_hash_of_little(value: Tensor) -> None:
    assert tensor_hash(value) == tensor_hash(value.clone()) != tensor_hash(torch.zeros(7))


def test_same_base() -> None:
    model = nn.Linear(4, 2)
    keep = Mask(torch.ones(2, 4).bool())
    masks = MaskSet({"weight": keep}, base=base_hash({"weight": model.weight}))
    assert masks.same_base(model) and masks.same_base({"weight": model.weight, "other": keep.keep})
    assert MaskSet({"weight": keep}).same_base(model)  # nothing stored, nothing to say
    with torch.no_grad():
        model.bias.add_(1)
        assert masks.same_base(model)  # the bias is not a site
        model.weight[0, 0] += 1
    assert not masks.same_base(model)
