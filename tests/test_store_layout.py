"""The mask file to the last bit: every pattern, empty and soft masks, failed saves, files kept from version 1.

`golden/masks_v1_patterns.safetensors` and `golden/soft_v1.safetensors` were made once, by maskwright 0.1.0, with

    import torch
    from pathlib import Path
    from maskwright.core.mask import Mask, SoftMask
    from maskwright.core.maskset import MaskSet, SoftMaskSet
    from maskwright.core.pattern import NM, Block, Group, Unstructured
    from maskwright.core.store import save

    def bits(text, *shape):
        return torch.tensor([c == "1" for c in text], dtype=torch.bool).reshape(shape or (len(text),))

    made = {"method": "by hand", "settings": {"density": 0.5, "where": ["a", "b"]}, "seed": 7, "version": "0.1.0"}
    masks = {
        "rows": Mask(bits("110001", 2, 3), Unstructured((0,))),
        "one of four, down": Mask(bits("01000010", 4, 2), NM(1, 4, 0)),
        "blocks": Mask(bits("1100110000110011", 4, 4), Block((2, 2))),
        "padded": Mask(bits("001001110", 3, 3), Block((2, 2), (0,), pad=True)),
        "columns": Mask(bits("101101", 2, 3), Group((1,))),
        "empty": Mask(bits("", 0, 4)),
        "scalar": Mask(bits("1")),
        "größe\\n.weight": Mask(bits("111111111")),
    }
    save(MaskSet(masks, made, "f00d"), Path("tests/golden/masks_v1_patterns.safetensors"))
    soft = {"a": SoftMask(torch.tensor([[0.0, 0.5], [2.0, 1e-30]])), "b": SoftMask(torch.ones(2), Unstructured((0,)))}
    save(SoftMaskSet(soft, made, "f00d"), Path("tests/golden/soft_v1.safetensors"))

They are never made again: what they hold must load for as long as version 1 is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from maskwright.core import store
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet
from maskwright.core.pattern import NM, Block, Group, Pattern, Unstructured
from maskwright.core.select import draw, generator
from maskwright.core.store import load, save

GOLDEN = Path(__file__).parent / "golden"
MADE = {"method": "by hand", "settings": {"density": 0.5, "where": ["a", "b"]}, "seed": 7, "version": "0.1.0"}


def bits(text: str, *shape: int) -> Tensor:
    return torch.tensor([c == "1" for c in text], dtype=torch.bool).reshape(shape or (len(text),))


def read_by_hand(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The file without safetensors and without maskwright: manifest, and one flat array of 0/1 a site."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    manifest = json.loads(header.pop("__metadata__")["maskwright"])
    out = {}
    for site in manifest["sites"]:
        first, last = header[site["name"]]["data_offsets"]
        flat = [data[end + first + i // 8] >> i % 8 & 1 for i in range(8 * (last - first))]
        out[site["name"]] = np.array(flat[: int(np.prod(site["shape"]))]).reshape(site["shape"])
    return manifest, out


# --- round trips


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=4, max_size=4, unique=True),
    seed=st.integers(0, 999),
)
def test_any_mask_comes_back(tmp_path: Path, shapes: list[list[int]], names: list[str], seed: int) -> None:
    rng = generator(seed)
    keeps = {n: torch.rand(s, generator=rng) > 0.5 for n, s in zip(names, shapes, strict=False)}
    masks = MaskSet({name: Mask(keep) for name, keep in keeps.items()}, {"seed": seed}, "b")
    path = tmp_path / "m.safetensors"
    masks.save(path)
    back = MaskSet.load(path)
    assert back.equal(masks) and list(back) == list(masks) and (back.made_by, back.base) == (masks.made_by, "b")
    manifest, arrays = read_by_hand(path)
    assert [site["kept"] for site in manifest["sites"]] == [mask.count for mask in masks.values()]
    assert all(np.array_equal(arrays[name], mask.keep.numpy()) for name, mask in masks.items())
    first = path.read_bytes()
    back.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(),
        Unstructured((0,)),
        Unstructured((-1, 0)),
        NM(1, 4),
        NM(3, 4, 0),
        NM(8, 8),
        Block((2, 4)),
        Block((3,), (0,), pad=True),
        Block((99, 99), pad=True),
        Group((1,)),
        Group((-1,)),
        Group(()),
    ],
    ids=str,
)
def test_every_pattern_comes_back(pattern: Pattern, tmp_path: Path) -> None:
    mask = draw(pattern, (4, 8), None if pattern.fixed else pattern.grid((4, 8))[1] // 2, rng=generator(0))
    MaskSet({"w": mask}).save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m")["w"].check().equal(mask)


def test_one_bit_an_entry_and_little_else(tmp_path: Path) -> None:
    MaskSet({"w": Mask(torch.rand(1000, 800) > 0.5)}).save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 100_000 + 600


def test_masks_of_any_layout_are_stored_row_major(tmp_path: Path) -> None:
    keep = torch.rand(5, 7, generator=generator(0)) > 0.5
    expanded = torch.tensor([True, False]).expand(3, 2)
    MaskSet({"t": Mask(keep.T), "s": Mask(keep[::2, 1:]), "x": Mask(expanded)}).save(tmp_path / "m")
    back = MaskSet.load(tmp_path / "m")
    assert torch.equal(back["t"].keep, keep.T) and torch.equal(back["s"].keep, keep[::2, 1:])
    assert torch.equal(back["x"].keep, expanded)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    masks = MaskSet({"a": Mask(bits("1011000011")), "b": Mask(bits("", 0, 3))}, MADE)
    masks.save(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="np") as handle:
        assert set(handle.keys()) == {"a", "b"} and set(handle.metadata()) == {"maskwright", "digest"}
        assert handle.get_tensor("a").tolist() == [0b00001101, 0b11] and handle.get_tensor("b").shape == (0,)
        assert json.loads(handle.metadata()["maskwright"])["made_by"] == MADE


# --- soft masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_soft_masks_come_back_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.rand(6, 4, generator=generator(0)).to(dtype).T  # not contiguous
    soft = SoftMaskSet({"w": SoftMask(values), "none": SoftMask(values[:0]), "one": SoftMask(values[0, 0])}, MADE, "b")
    save(soft, tmp_path / "s")
    back = load(tmp_path / "s")
    assert isinstance(back, SoftMaskSet) and list(back) == ["w", "none", "one"]
    assert all(torch.equal(back[name].values, mask.values.float()) for name, mask in soft.items())
    assert (back.made_by, back.base) == (MADE, "b") and back["one"].shape == ()
    with pytest.raises(BadInput, match=r"holds soft masks; use maskwright\.core\.store\.load"):
        MaskSet.load(tmp_path / "s")


def test_soft_values_beyond_float32(tmp_path: Path) -> None:
    tiny = SoftMask(torch.tensor([1e-60, 1.0], dtype=torch.float64))  # becomes 0, and the kept count with it
    save(SoftMaskSet({"w": tiny}), tmp_path / "s")
    assert load(tmp_path / "s")["w"].values.tolist() == [0.0, 1.0]
    with pytest.raises(BadInput, match="non-finite"):
        save(SoftMaskSet({"w": SoftMask(torch.tensor([1e300], dtype=torch.float64))}), tmp_path / "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


# --- what cannot be saved, and saves that fail


@pytest.mark.parametrize(
    "made", [{"x": float("nan")}, {"x": torch.ones(1)}, {"x": Path("a")}, {"x": {1, 2}}, {"x": 1, 2: 3}], ids=str
)
def test_settings_that_are_not_json_are_refused(made: dict, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="made_by cannot be stored as JSON"):
        MaskSet({}, made).save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="w: 2:4 does not hold"):
        MaskSet({"w": Mask(torch.ones(4).bool(), NM(2, 4))}).save(tmp_path / "m")
    with pytest.raises(BadInput, match="cannot be named __metadata__"):
        MaskSet({"__metadata__": Mask(bits("1"))}).save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failed_save_leaves_the_old_file_and_no_other(
    error: BaseException, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, path = MaskSet({"w": Mask(bits("10"))}), tmp_path / "m.safetensors"

    def fail(*_: object) -> None:
        raise error

    def half(partial: Path, *_: object) -> None:
        partial.write_bytes(b"half")
        raise error

    targets = {"write": (store, "_write", half), "fsync": (os, "fsync", fail), "rename": (Path, "replace", fail)}
    for before in (False, True):
        if before:
            old.save(path)
        with monkeypatch.context() as patch:
            patch.setattr(*targets[step])
            with pytest.raises(type(error)):
                MaskSet({"w": Mask(bits("01"))}).save(path)
        assert [p.name for p in tmp_path.iterdir()] == (["m.safetensors"] if before else [])
    assert MaskSet.load(path).equal(old)


def test_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("masks, all of them\n" * 9)
    for name, says in (("none", "no such file"), ("empty", "not a mask file"), ("text", "not a mask file")):
        with pytest.raises(BadInput, match=rf"{name}: {says}"):
            MaskSet.load(tmp_path / name)
    with pytest.raises(BadInput, match="IsADirectoryError"):
        MaskSet.load(tmp_path)


def test_other_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model")
    with pytest.raises(BadInput, match=r"not a mask file \(no manifest\)"):
        load(tmp_path / "model")
    save_file({"w": torch.ones(2)}, tmp_path / "other", metadata={"maskwright": '{"format": "maskwright.deltas"}'})
    with pytest.raises(BadInput, match="another format"):
        load(tmp_path / "other")
    save_file(
        {"w": torch.ones(2)}, tmp_path / "new", metadata={"maskwright": '{"format": "maskwright.masks", "version": 2}'}
    )
    with pytest.raises(BadInput, match="version 2; this maskwright reads version 1"):
        load(tmp_path / "new")


# --- files kept from version 1


def test_golden_patterns() -> None:
    masks = MaskSet.load(GOLDEN / "masks_v1_patterns.safetensors").check()
    stated: dict[str, tuple[Tensor, Pattern]] = {
        "rows": (bits("110001", 2, 3), Unstructured((0,))),
        "one of four, down": (bits("01000010", 4, 2), NM(1, 4, 0)),
        "blocks": (bits("1100110000110011", 4, 4), Block((2, 2))),
        "padded": (bits("001001110", 3, 3), Block((2, 2), (0,), pad=True)),
        "columns": (bits("101101", 2, 3), Group((1,))),
        "empty": (bits("", 0, 4), Unstructured()),
        "scalar": (bits("1"), Unstructured()),
        "größe\n.weight": (bits("111111111"), Unstructured()),
    }
    assert masks.equal(MaskSet({name: Mask(*each) for name, each in stated.items()}))
    assert (dict(masks.made_by), masks.base) == (MADE, "f00d")


def test_golden_soft() -> None:
    soft = load(GOLDEN / "soft_v1.safetensors")
    assert isinstance(soft, SoftMaskSet) and list(soft) == ["a", "b"]
    assert torch.equal(soft["a"].values, torch.tensor([[0.0, 0.5], [2.0, 1e-30]])) and soft["a"].pattern == Unstructured()
    assert soft["b"].values.tolist() == [1.0, 1.0] and soft["b"].pattern == Unstructured((0,))
    assert (dict(soft.made_by), soft.base) == (MADE, "f00d")
