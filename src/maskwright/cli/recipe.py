"""The recipe of a prune run: the same keys from the command line and from a YAML file, validated in one place,
and the method it names."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from maskwright.core.errors import BadInput
from maskwright.core.method import Card
from maskwright.core.method import card as card_of

if TYPE_CHECKING:
    from maskwright.weights import OneShot

Model = TypeVar("Model", bound=BaseModel)


class _Yaml(yaml.SafeLoader):
    """YAML whose numbers are decimal: YAML 1.1 reads a bare 2:4 as 124, in base sixty."""


_Yaml.yaml_implicit_resolvers = {
    start: [(tag, form) for tag, form in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_START = list("-+.0123456789")
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?$", re.I), _START
)
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), _START)


def from_yaml(text: str) -> Any:
    """Plain values from YAML text, as `safe_load` gives them but for base sixty. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Yaml)
    except (ValueError, RecursionError) as error:  # a date that is none, a number of 5,000 digits, 3,000 brackets
        raise yaml.YAMLError(str(error)) from error


class RuleSpec(BaseModel):
    """One rule: the sites `where` matches get this pattern or density, or stay dense. First rule wins."""

    model_config = ConfigDict(extra="forbid")
    where: str
    pattern: str | None = None
    density: float | None = None
    dense: bool = False


class Recipe(BaseModel):
    """Everything a run depends on. `settings` are fields of the method's own dataclass."""

    model_config = ConfigDict(extra="forbid")
    model: str = "default"
    method: str = "wanda"
    pattern: str = "unstructured"
    density: float | None = Field(None, ge=0, le=1)
    within: Literal["tensor", "row", "global"] | None = None
    budget: str | None = None
    where: list[str] = []
    rules: list[RuleSpec] = []
    settings: dict[str, Any] = {}
    seed: int = 0
    out: str = ""
    calibration: str | None = None
    evaluate: str | None = None
    samples: int = Field(32, ge=1)
    length: int = Field(512, ge=2)
    windows: int = Field(20, ge=0)
    sample_tokens: int = Field(40, ge=0)
    threads: int | None = Field(None, ge=1)
    dry_run: bool = False
    resume: bool = False
    replace: bool = False
    any_machine: bool = False
    command: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the result (not where it goes or how it was started)."""
        return self.model_dump(exclude={"out", "dry_run", "resume", "replace", "any_machine", "command", "threads"})


def read(path: Path, given: dict[str, Any]) -> Recipe:
    """A YAML recipe with the command line's values over it. Raises BadInput naming the first wrong key."""
    told = read_keys(path)
    if isinstance(told.get("where"), str):
        told["where"] = [told["where"]]
    return make({**told, **given}, str(path))


def read_keys(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe. Raises BadInput for a file that is none."""
    try:
        told = from_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError, IsADirectoryError) as error:
        raise BadInput(f"{path}: not a YAML recipe: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(told, dict):
        raise BadInput(f"{path}: a recipe is a mapping of keys")
    return told


def make(values: dict[str, Any], what: str = "recipe") -> Recipe:
    """A checked recipe. Raises BadInput naming the first wrong key."""
    return checked(Recipe, values, what)


def checked(kind: type[Model], values: dict[str, Any], what: str) -> Model:
    """`values` as a recipe of `kind`. Raises BadInput naming the first wrong key, and the known ones."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        known = f"; known: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise BadInput(f"{what}: {key}: {first['msg']}{known}") from None


def command_line() -> str:
    """The command as it is kept with a result: what only says how it was started is left out."""
    return "maskwright " + shlex.join(word for word in sys.argv[1:] if word not in ("--replace", "--resume"))


def settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs, values read as YAML. Raises BadInput for a pair without `=`."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not key:
            raise BadInput(f"--set takes key=value, got {pair!r}")
        try:
            out[key] = from_yaml(value)
        except yaml.YAMLError:
            out[key] = value
    return out


def build_method(recipe: Recipe) -> OneShot:
    """The method with its fields. Raises BadInput listing the known methods or fields."""
    from maskwright.core.budget import BUDGETS
    from maskwright.core.pattern import parse
    from maskwright.weights import OneShot

    card = found(recipe.method)
    kind = card.load()
    if not (isinstance(kind, type) and issubclass(kind, OneShot)):
        raise BadInput(f"{card.slug} is a method for {card.when}, not for one-shot pruning")
    given: dict[str, Any] = {"pattern": recipe.pattern, "where": tuple(recipe.where)}
    pattern = parse(recipe.pattern)
    if recipe.density is not None:
        given["density"] = recipe.density
    if pattern.fixed is not None:
        share = pattern.fixed / int(recipe.pattern.split(":")[1].split("@")[0])
        if recipe.density is not None and recipe.density != share:
            raise BadInput(f"pattern {recipe.pattern} keeps {share:g} by itself; density {recipe.density:g} contradicts it")
        if recipe.within is not None:
            raise BadInput(f"pattern {recipe.pattern} competes inside its own groups; --within has no meaning for it")
        given["density"] = share
    if recipe.within is not None:
        given["within"] = recipe.within
    if recipe.budget is not None:
        if recipe.budget not in BUDGETS:
            raise BadInput(f"unknown budget {recipe.budget!r}; known: {', '.join(BUDGETS)}")
        given["budget"] = recipe.budget
    given |= typed(kind, card.slug, recipe.settings)
    return built(card, kind, given)  # type: ignore[no-any-return]


def found(slug: str) -> Card:
    """The card of a method. Raises BadInput listing the known ones."""
    try:
        return card_of(slug)
    except KeyError as error:
        raise BadInput(str(error.args[0])) from None


def built(card: Card, kind: type, settings: Mapping[str, Any]) -> Any:
    """The method with its settings, see `typed`. Raises BadInput for those it lacks and what it cannot take."""
    try:
        return kind(**typed(kind, card.slug, settings))
    except TypeError as error:
        raise BadInput(f"{card.slug}: {error}") from None


def typed(kind: type, slug: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method as its fields' types: a list as a tuple, a whole number where any is asked, nothing else changed.

    Raises BadInput for one it does not have, and naming the field and the type where a value has another.
    """
    fields, hints = kind.__dataclass_fields__, get_type_hints(kind)  # type: ignore[attr-defined]
    out = {}
    for key, said in settings.items():
        if key not in fields:
            raise BadInput(f"{slug} has no setting {key!r}; it has {', '.join(fields)}")
        value, hint = tuple(said) if isinstance(said, list) else said, hints[key]
        # pydantic takes a config for what is no dataclass alone.
        adapter = TypeAdapter(hint, config=None if is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True))
        try:
            # Not strict where a mapping makes a dataclass, and 1 and 0 are a switch's true and false.
            lax = isinstance(value, dict) or (hint is bool and type(value) is int)
            out[key] = adapter.validate_python(value, strict=not lax)
        except ValidationError:
            raise BadInput(f"{slug}: {key}: {_wanted(hint)} is needed, got {said!r:.80}") from None
    return out


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "null"}


def _wanted(hint: Any) -> str:
    """A field's type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _wanted(part) for part in parts)}]"
    if origin in (Union, UnionType):
        return " or ".join(map(_wanted, parts))
    return "a function" if origin is Callable else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
