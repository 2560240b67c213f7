"""The recipe of a merge: from the command line, from our YAML, or from mergekit's, checked in one place."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from maskwright.cli.recipe import checked, read_keys, typed
from maskwright.core.errors import BadInput
from maskwright.core.method import Card, methods
from maskwright.core.method import card as card_of
from maskwright.models.checkpoint import plain

if TYPE_CHECKING:
    from maskwright.updates import MergeMethod

DTYPES = ("float32", "bfloat16", "float16")
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {  # mergekit's names for settings of a room
    "dare_linear": ("dare", {"elect": False}),
    "dare_ties": ("dare", {"elect": True}),
    "breadcrumbs_ties": ("breadcrumbs", {"elect": True}),
}
_THEIRS = {"density": "density", "gamma": "drop_top", "lambda": "scale", "normalize": "normalise"}
_SWITCHES = ("normalize", "rescale", "int8_mask")  # int8_mask only saves mergekit memory
_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "name",
)  # fmt: skip


class Member(BaseModel):
    """One tuned model: its weight, and settings that differ from the recipe's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    weight: float = 1.0
    settings: dict[str, Any] = {}


class MergeRecipe(BaseModel):
    """Everything a merge depends on. `settings` are fields of the method's own dataclass."""

    model_config = ConfigDict(extra="forbid", strict=True)
    method: str = "task_arithmetic"
    base: str = ""
    models: list[Member] = []
    settings: dict[str, Any] = {}
    dtype: str | None = None
    base_only: list[str] = []
    seed: int = 0
    out: str = ""
    evaluate: str | None = None
    windows: int = Field(10, ge=1)
    length: int = Field(512, ge=2)
    threads: int | None = Field(None, ge=1)
    stats: bool = False
    any_tokenizer: bool = False
    dry_run: bool = False
    resume: bool = False
    replace: bool = False
    command: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the result (not where it goes or how it was started)."""
        return self.model_dump(include={"method", "models", "settings", "dtype", "base_only", "seed"})


def read(path: Path, given: dict[str, Any]) -> MergeRecipe:
    """A YAML recipe, ours or mergekit's, with the command line's values over it. Raises BadInput naming a wrong key."""
    told = read_keys(path)
    if "merge_method" in told:
        told = _from_mergekit(told, path)
    settings = {**_mapping(told.get("settings"), "settings", path), **given.pop("settings", {})}
    return make({**told, **given, "settings": settings}, str(path))


def make(values: dict[str, Any], what: str = "merge") -> MergeRecipe:
    """A checked recipe. Raises BadInput naming the first wrong key."""
    try:
        return checked(MergeRecipe, values, what)
    except BadInput as error:
        raise BadInput(plain(str(error))) from None  # a key may hold a line break


def _from_mergekit(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """mergekit's keys as ours, with its own defaults. Raises BadInput for what these methods have no use for."""
    _only(_KEYS, told, path, "of mergekit's recipes")
    for key, bases in (("tokenizer_source", "base"), ("tokenizer", {"source": "base"})):
        if told.get(key) not in (None, bases):
            raise BadInput(f"{path}: {key} {_told(told[key])}: only the base's tokenizer is handed on")
    slug, fixed = ALIASES.get(str(told["merge_method"]), (str(told["merge_method"]), {}))
    fields = _card(slug).load().__dataclass_fields__
    common, weight = _parameters(told.get("parameters"), fields, path)
    members = told.get("models")
    if not isinstance(members, list | None):
        raise BadInput(f"{path}: models: a list is needed, got {_told(members)}")
    models = []
    for member in members or []:
        if not isinstance(member, dict) or not isinstance(member.get("model"), str):
            raise BadInput(f"{path}: models: each needs a `model`, got {_told(member)}")
        _only(("model", "parameters"), member, path, "of a model")
        if member["model"] == told.get("base_model"):
            continue  # mergekit lets the base stand among the models, where it adds nothing
        own, its_weight = _parameters(member.get("parameters"), fields, path)
        chosen = its_weight if its_weight is not None else weight
        if chosen is None:
            raise BadInput(f"{path}: {plain(member['model'])} has no weight")
        models.append({"model": member["model"], "weight": chosen, "settings": own})
    # Where a setting is left out, mergekit's default and not the room's.
    theirs = {"scale": 1.0, "density": 1.0, "drop_top": 0.01}
    settings = {key: value for key, value in theirs.items() if key in fields} | fixed | common
    for each in (settings, *(m["settings"] for m in models)):  # there, density wins over gamma
        density = each.get("density", settings.get("density", 1.0))
        if "drop_top" in fields and density + each.get("drop_top", settings["drop_top"]) > 1:
            each["drop_top"] = max(0.0, 1 - density)
    dtype = told.get("dtype") if told.get("out_dtype") is None else told["out_dtype"]
    out = {"method": slug, "base": told.get("base_model"), "models": models, "settings": settings, "dtype": dtype}
    return {key: value for key, value in out.items() if value is not None}


def _parameters(told: Any, fields: dict[str, Any], path: Path) -> tuple[dict[str, Any], float | None]:
    """(settings, weight) of one `parameters` mapping."""
    settings: dict[str, Any] = {}
    weight = None
    for key, value in _mapping(told, "parameters", path).items():
        if isinstance(value, list | dict):
            raise BadInput(
                f"{path}: {plain(str(key))}: a list (a gradient over layers, or filters) is not read here; give one number"
            )
        if key not in ("weight", *_THEIRS, *_SWITCHES):
            raise BadInput(f"{path}: parameter {key!r} is not known here; known: weight, {', '.join(_THEIRS)}, rescale")
        if key in _SWITCHES and value not in (0, 1):
            raise BadInput(f"{path}: {key}: true or false is needed, got {_told(value)}")
        if key not in _SWITCHES and not _number(value):
            raise BadInput(f"{path}: {key}: a finite number is needed, got {_told(value)}")
        if key == "weight":
            weight = value
        elif key == "rescale" and "rescale" in fields:
            settings["rescale"] = "density" if value else "none"
        elif key in _THEIRS and _THEIRS[key] in fields:
            settings[_THEIRS[key]] = bool(value) if key in _SWITCHES else value
    return settings, weight


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN, and for `yes`


def _mapping(told: Any, key: str, path: Path) -> dict[Any, Any]:
    """What stands under `key` of a recipe: a mapping, or nothing."""
    if not isinstance(told, dict | None):
        raise BadInput(f"{path}: {key}: a mapping is needed, got {_told(told)}")
    return told or {}


def _only(known: Sequence[str], told: Mapping[Any, Any], path: Path, what: str) -> None:
    odd = [plain(str(key)) for key in told if key not in known]
    if odd:
        raise BadInput(f"{path}: {odd[0]} is not read here; {what} these keys are: {', '.join(known)}")


def _told(value: Any) -> str:
    return f"{value!r:.80}"


def _card(slug: str) -> Card:
    known = [card.slug for card in methods("updates") if card.contract.kind == "merge"]
    try:
        card = card_of(slug)
    except KeyError:
        card = None
    if card is None or card.slug not in known:
        raise BadInput(f"{slug!r} is no merging method; known: {', '.join([*known, *ALIASES])}")
    return card


def build_methods(recipe: MergeRecipe) -> list[MergeMethod]:
    """One method a model, with its fields. Raises BadInput listing the known methods or fields."""
    slug, fixed = ALIASES.get(recipe.method, (recipe.method, {}))
    card = _card(slug)
    kind = card.load()
    return [kind(**typed(kind, card.slug, {**recipe.settings, **fixed, **member.settings})) for member in recipe.models]
