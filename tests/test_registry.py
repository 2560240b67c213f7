"""Cards and the registry: complete cards are read without torch, incomplete ones name the file and the field."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maskwright.core import method
from maskwright.core.method import PLACES, Card, CardError, Contract, card, get, methods, read_card

FIELDS: dict[str, Any] = {
    "title": "Some Method",
    "year": 2021,
    "arxiv": "2102.04010",
    "repo": "",
    "place": "weights",
    "also": ["updates"],
    "pattern": "2:4",
    "when": "one-shot",
    "claim": "It works.",
    "entry": "Some",
}


def toml(fields: dict[str, Any], tail: str = "") -> str:
    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')

    return "".join(f"{key} = {text(value)}\n" for key, value in fields.items()) + tail


Room = Callable[..., Path]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """Write a room's card into a tree of its own."""

    def make(slug: str = "some", place: str = "weights", tail: str = "", **changes: Any) -> Path:
        folder = tmp_path / "maskwright" / place / slug
        folder.mkdir(parents=True)
        fields = {key: value for key, value in {**FIELDS, "place": place, **changes}.items() if value is not None}
        (folder / "card.toml").write_text(toml(fields, tail), encoding="utf-8")
        return folder / "card.toml"

    return make


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The registry looks into tmp_path/maskwright instead of the installed package."""
    root = tmp_path / "maskwright"
    (root / "core").mkdir(parents=True)
    monkeypatch.setattr(method, "__file__", str(root / "core" / "method.py"))
    method._cards.cache_clear()
    yield root
    method._cards.cache_clear()


# --- one card


def test_a_complete_card(room: Room) -> None:
    path = room(baseline=True, tail='[contract]\nselects = "random"\nempty_ok = true\n[contract.tiny]\nn = 1\n')
    read = read_card(path)
    assert read == Card(
        slug="some",
        path=path.parent,
        baseline=True,
        contract=Contract(selects="random", empty_ok=True, tiny={"n": 1}),
        **{**FIELDS, "also": ("updates",)},
    )
    assert read.module == "maskwright.weights.some" and not read.soft and read.data == "real"


def test_a_card_in_utf8(room: Room) -> None:
    assert read_card(room(title="Größere Masken für λ")).title == "Größere Masken für λ"


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(room: Room, field: str) -> None:
    if field == "place":
        path = room()
        path.write_text(path.read_text().replace('place = "weights"\n', ""))
    else:
        path = room(**{field: None})
    with pytest.raises(CardError, match=rf"card\.toml: missing {field}$"):
        read_card(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"year": "2021"}, "year is '2021', not a whole number"),
        ({"year": True}, "year is True, not a whole number"),
        ({"arxiv": 2102.0401}, r"arxiv is 2102\.0401, not a string"),  # the quotes forgotten
        ({"arxiv": "21020.4010"}, "is not of the form"),
        ({"arxiv": "https://arxiv.org/abs/2102.04010"}, "is not of the form"),
        ({"also": "updates"}, "also is 'updates', not a list"),  # would be read letter by letter
        ({"baseline": "yes"}, "baseline is 'yes', not a boolean"),
        ({"title": 3}, "title is 3, not a string"),
        ({"when": "always"}, "when is 'always', not one of one-shot, training, inference"),
        ({"colour": "red"}, "unknown field colour"),
        ({"tail": 'slug = "other"'}, "slug"),
        ({"tail": 'path = "other"'}, "path"),
        ({"contract": 3}, "contract is 3, not a table"),
        ({"tail": '[contract]\nkind = "magic"\n'}, r"contract\.kind is 'magic', not one of mask, merge"),
        ({"tail": '[contract]\ngradient = "all"\n'}, r"contract\.gradient is 'all', not one of hard, ste"),
        ({"tail": '[contract]\nselects = "luck"\n'}, r"contract\.selects is 'luck', not one of score"),
        ({"tail": "[contract]\nmood = 1\n"}, "mood"),
        ({"tail": "broken ="}, "not a TOML file"),
        ({"tail": 'title = "twice"'}, "not a TOML file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_fields_are_named(room: Room, changes: dict[str, Any], says: str) -> None:
    path = room(**changes)
    with pytest.raises(CardError, match=says) as caught:
        read_card(path)
    assert str(caught.value).startswith(str(path))


def test_an_arxiv_number_may_be_absent(room: Room) -> None:
    assert read_card(room(arxiv="")).arxiv == ""


def test_the_place_is_the_folders(room: Room) -> None:
    path = room(place="updates")
    path.write_text(path.read_text().replace('place = "updates"', 'place = "weights"'))
    with pytest.raises(CardError, match="place is 'weights' but the folder lies in 'updates'"):
        read_card(path)
    with pytest.raises(CardError, match="place is 'elsewhere'"):
        read_card(room(place="elsewhere"))


def test_a_card_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_bytes(b'title = "\xff\xfe"\n')
    with pytest.raises(CardError, match=r"card\.toml: not a TOML file"):
        read_card(path)


# --- the registry


def test_rooms_are_found_by_their_folders(tree: Path, room: Room) -> None:
    for slug, place in (("zeta", "weights"), ("alpha", "inputs"), ("alpha_two", "weights"), ("mid", "updates")):
        room(slug, place)
    (tree / "weights" / "no_card").mkdir()
    (tree / "lab" / "stray").mkdir(parents=True)
    (tree / "lab" / "stray" / "card.toml").write_text("not a room's")
    assert [each.slug for each in methods()] == ["alpha_two", "zeta", "mid", "alpha"]  # places, then names
    assert [each.slug for each in methods("weights")] == ["alpha_two", "zeta"]
    assert methods("attention") == []
    assert card("alpha-two") is card("alpha_two") and card("mid").place == "updates"


def test_unknown_names_list_the_known(tree: Path, room: Room) -> None:
    for slug in ("wanda", "magnitude"):
        room(slug)
    for call in (card, get):
        with pytest.raises(KeyError, match=r"unknown method 'wandb'; known: magnitude, wanda"):
            call("wandb")
    with pytest.raises(ValueError, match=r"unknown place 'weight'; places are weights, updates, attention, inputs"):
        methods("weight")


def test_a_slug_names_one_room(tree: Path, room: Room) -> None:
    room("twin", "weights")
    room("twin", "inputs")
    with pytest.raises(CardError, match=r"weights/twin has the same slug"):
        methods()


def test_a_broken_card_is_named_by_the_registry(tree: Path, room: Room) -> None:
    room("fine")
    path = room("broken", year=None)
    with pytest.raises(CardError, match=rf"{path}: missing year"):
        methods()


# --- the real one


def test_real_rooms_load_their_entries() -> None:
    cards = methods()
    assert cards and {each.place for each in cards} <= set(PLACES)
    for each in cards:
        entry = get(each.slug)
        assert entry is each.load() and entry.__name__ == each.entry
        assert entry.__module__.startswith(each.module)


def test_reading_every_card_imports_no_room_and_no_torch() -> None:
    code = (
        "import sys; from maskwright.core.method import methods\n"
        "mods = {c.module for c in methods()}\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'}\n"
        "print(sorted((mods | heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
