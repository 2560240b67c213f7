"""The methods that `attend` and `plan` name: found, set, and asked whether they fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from maskwright.attention import AttentionMethod, ModelShape
from maskwright.attention.huggingface import hosts, shape_of
from maskwright.cli.recipe import settings as pairs_of
from maskwright.cli.recipe import typed
from maskwright.core.errors import BadInput
from maskwright.core.method import Card, card, methods


def card_of(slug: str) -> Card:
    """The card of a method of this place. Raises BadInput listing the known ones."""
    known = [c.slug for c in methods("attention") if c.contract.kind == "mask"]
    if slug in known:
        return card(slug)
    try:
        other = card(slug)
    except KeyError:
        raise BadInput(f"unknown method {slug!r}; known: {', '.join(known)}") from None
    raise BadInput(f"{slug} is of the place {other.place} and cannot attend; known: {', '.join(known)}")


def build(slugs: Sequence[str], pairs: Sequence[str]) -> list[tuple[str, AttentionMethod]]:
    """The methods with their settings: `name=value` for every method that has it, `method.name=value` for one.

    Raises BadInput for a setting that no method, or not that one, has.
    """
    kinds = {slug: _kind(slug) for slug in slugs}
    given: dict[str, dict[str, Any]] = {slug: {} for slug in slugs}
    for key, value in pairs_of(list(pairs)).items():
        slug, dot, name = key.partition(".")
        slug, name = (slug.replace("-", "_"), name) if dot else ("", key)
        if dot and slug not in kinds:
            raise BadInput(f"--set {key}: {slug} is not among the methods {', '.join(slugs)}")
        asked = [slug] if dot else slugs
        if name == "plan" and not any("plan" in kinds[s].__dataclass_fields__ for s in asked):
            name = "heads"  # where methods take what `maskwright plan` wrote
        owners = [s for s in asked if name in kinds[s].__dataclass_fields__]
        if not owners:
            has = "; ".join(f"{s} has {', '.join(kinds[s].__dataclass_fields__) or 'none'}" for s in slugs)
            raise BadInput(f"no setting {key!r}: {has}")
        for owner in owners:
            given[owner] |= typed(kinds[owner], owner, {name: value})
    return [(slug, kinds[slug](**given[slug])) for slug in slugs]


def _kind(slug: str) -> Any:
    kind = card_of(slug).load()
    if not (isinstance(kind, type) and issubclass(kind, AttentionMethod)):
        raise BadInput(f"{slug} is no method that `attend` can run")
    return kind


def told_settings(method: AttentionMethod) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    found = {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in found.items()}


def fitting(model: Any, name: str, made: Sequence[AttentionMethod]) -> ModelShape:
    """The model's shape, once every method has agreed to it. Raises BadInput otherwise."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise BadInput(f"{name} is no causal language model ({type(model).__name__})")
    found = hosts(model)
    if not found:
        raise BadInput(f"{name}: {type(model).__name__} has no attention layer that asks AttentionInterface")
    shape = shape_of(found[0][1])
    for method in made:
        method.fits(shape)
    return shape
