"""`maskwright cp`: a new room as a renamed copy of another."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from pathlib import Path

from maskwright.core.errors import BadInput
from maskwright.core.method import PLACES, CardError, read_card

_EDIT = {
    "card.toml": "title, year, arXiv id, claim in one sentence",
    "README.md": "what, equations, use, differences, our figure beside theirs",
    "method.py": "one frozen class",
    "claim.py": "arms, the broken twin, the stated effects",
    "test_{slug}.py": "the paper's exact small checks",
}


def copy_room(source: str, target: str, root: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Copy room `source` to `target` ("place/name") under package folder `root`; returns the folder and what to edit.

    Renames slug, class, test file and card entry. The room appears whole or not at all.
    Raises BadInput for an unknown room or place, a name that is no module name, and a target that exists.
    """
    place, _, name = target.strip("/").partition("/")
    name = name.replace("-", "_")
    if place not in PLACES:
        raise BadInput(f"{target!r}: unknown place {place!r}; a target is PLACE/NAME with place {', '.join(PLACES)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise BadInput(f"{target!r}: {name!r} is no room name; use lower case letters, digits and single underscores")
    old = _find(source, root)
    taken = [p for p in PLACES if (root / p / name).exists() or (root / p / f"{name}.py").exists()]
    if taken:
        raise BadInput(f"{target!r}: {taken[0]}/{name} exists; a room's name is its own in all places")
    if not (root / place).is_dir():
        raise BadInput(f"{target!r}: there is no folder {root / place} yet")
    card = read_card(old / "card.toml")
    entry = name if card.entry.islower() else "".join(part.capitalize() for part in name.split("_"))
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root / place) as work:
        new = Path(work) / name
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for path in sorted(p for p in new.rglob("*") if p.is_file()):
            if path.suffix in (".py", ".toml", ".md"):
                text = rename(path.read_text(encoding="utf-8"), (card.place, card.slug, card.entry), (place, name, entry))
                path.write_text(text, encoding="utf-8")
            if path.name == f"test_{card.slug}.py":
                path.rename(path.with_name(f"test_{name}.py"))
        # A place on the card is the one word that the general renaming must not touch elsewhere.
        toml = new / "card.toml"
        toml.write_text(
            re.sub(r'(?m)^place\s*=\s*"\w+"', f'place = "{place}"', toml.read_text(encoding="utf-8")), encoding="utf-8"
        )
        new.rename(root / place / name)
    folder = root / place / name
    edit = [(file.format(slug=name), what) for file, what in _EDIT.items()]
    # A baseline has no claim of its own, so a paper that starts from one must add it.
    missing = "to be written" + (", and `baseline = true` leaves the card: " if card.baseline else ": ")
    return folder, [(file, what if (folder / file).exists() else missing + what) for file, what in edit]


def rename(text: str, old: tuple[str, str, str], new: tuple[str, str, str]) -> str:
    """Text with (place, slug, class) replaced where they name the room: module path, folder, test file, string, class.

    A bare slug is left alone where it may be a common word: the room `set` must not turn every `set(...)` into
    the new name. With an underscore it can only be the room.
    """
    (place, slug, entry), (place_, slug_, entry_) = old, new
    for sep in (r"\.", "/"):
        plain = sep.strip("\\")
        text = re.sub(rf"\b{place}{sep}{slug}\b", f"{place_}{plain}{slug_}", text)
    text = re.sub(rf"\btest_{slug}\b", f"test_{slug_}", text)
    if "_" in slug:
        text = re.sub(rf"\b{slug}\b", slug_, text)
    for form, form_ in ((slug, slug_), (slug.replace("_", "-"), slug_.replace("_", "-"))):
        text = re.sub(rf"""(["'`]){re.escape(form)}\1""", rf"\g<1>{form_}\g<1>", text)
        text = re.sub(rf"(--method[ =]|ROOM=|maskwright (?:show|check|cp) ){re.escape(form)}\b", rf"\g<1>{form_}", text)
    return re.sub(rf"\b{entry}\b", entry_, text)


def _find(source: str, root: Path) -> Path:
    slug = source.strip("/").rpartition("/")[2].replace("-", "_")
    known = {p.parent.name: p.parent for place in PLACES for p in sorted((root / place).glob("*/card.toml"))}
    if slug not in known:
        raise BadInput(f"unknown room {source!r}; known: {', '.join(sorted(known)) or 'none'}")
    try:
        read_card(known[slug] / "card.toml")
    except CardError as error:
        raise BadInput(str(error)) from None
    return known[slug]
