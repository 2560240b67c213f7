"""The recipe of `maskwright merge`: what is refused by its key, what a recipe alone decides, and any YAML at any key."""

import copy
import json

import pytest
import yaml
from commands import good, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned import refused, same, states, three

from maskwright.cli.merge_recipe import build_methods, make, read
from maskwright.core.errors import BadInput
from maskwright.updates import MergeMethod

pytest.importorskip("transformers")

THEIRS = {
    "merge_method": "breadcrumbs", "base_model": "B", "dtype": "bfloat16", "tokenizer_source": "base",
    "parameters": {"density": 0.2, "gamma": 0.1, "lambda": 0.9, "normalize": False, "int8_mask": True},
    "models": [{"model": "M1", "parameters": {"weight": 0.5, "density": 0.4}}, {"model": "M2", "parameters": {"weight": 1}}],
}  # fmt: skip
OURS = {
    "method": "ties", "base": "B", "models": [{"model": "M1", "weight": 0.5}, {"model": "M2", "settings": {"density": 0.3}}],
    "settings": {"density": 0.2, "group": "row", "normalise": True}, "dtype": "float16", "base_only": ["a*"], "seed": 3,
    "out": "O", "evaluate": "topics", "windows": 2, "length": 32, "threads": 1, "stats": True, "any_tokenizer": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return three(tmp_path_factory.mktemp("merge"))


def places(told, at=()):
    """Every key of a nested recipe."""
    inner = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def put(told, place, value):
    told = copy.deepcopy(told)
    inner = told
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return told


def methods_of(path, told):
    path.write_text(yaml.safe_dump(told))
    return build_methods(read(path, {}))


def wrong(path, told):
    with pytest.raises(BadInput) as caught:
        methods_of(path, told)
    assert str(caught.value).isprintable()
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_recipes_of_this_file_are_good(tmp_path):
    first, second = methods_of(tmp_path / "r.yaml", THEIRS)
    assert (first.density, second.density, first.drop_top, first.scale, first.normalise) == (0.4, 0.2, 0.1, 0.9, False)
    first, second = methods_of(tmp_path / "r.yaml", OURS)
    assert (first.density, second.density, first.group) == (0.2, 0.3, "row")


@pytest.mark.parametrize(("told", "place", "value", "says"), [
    (THEIRS, ("parameters",), 3, "parameters: a mapping is needed, got 3"),
    (THEIRS, ("parameters",), False, "parameters: a mapping is needed, got False"),
    (THEIRS, ("models", 0, "parameters"), 3, "parameters: a mapping is needed, got 3"),
    (THEIRS, ("models",), 3, "models: a list is needed, got 3"),
    (THEIRS, ("models", 0), "M1", "models: each needs a `model`, got 'M1'"),
    (THEIRS, ("models", 0, "paramaters"), {}, "paramaters is not read here; of a model these keys are: model, parameters"),
    (THEIRS, ("models", 1, "filters"), [], "filters is not read here; of a model these keys are: model, parameters"),
    (THEIRS, ("sli\nces",), [], "sli ces is not read here"),
    (THEIRS, ("parameters", "density"), "x", "density: a finite number is needed, got 'x'"),
    (THEIRS, ("parameters", "density"), True, "density: a finite number is needed, got True"),
    (THEIRS, ("parameters", "gamma"), float("nan"), "gamma: a finite number is needed, got '.nan'"),
    (THEIRS, ("parameters", "lambda"), 10**400, "lambda: a finite number is needed, got 1000"),
    (THEIRS, ("parameters", "normalize"), "no", "normalize: true or false is needed, got 'no'"),
    (THEIRS, ("models", 0, "parameters", "weight"), True, "weight: a finite number is needed, got True"),
    (THEIRS, ("tokenizer",), {"source": "union"}, "tokenizer {'source': 'union'}: only the base's tokenizer is handed on"),
    (THEIRS, ("tokenizer",), {"source": "base", "tokens": {}}, "tokenizer {'source': 'base', 'tokens': {}}: only"),
    (THEIRS, ("base_model",), 0, "base: Input should be a valid string"),
    (THEIRS, ("dtype",), [], "dtype: Input should be a valid string"),
    (OURS, ("settings",), 3, "settings: a mapping is needed, got 3"),
    (OURS, ("models",), 3, "models: Input should be a valid list"),
    (OURS, ("models", 0, "weight"), True, "models.0.weight: Input should be a valid number"),
    (OURS, ("models", 0, "wait"), 1.0, "models.0.wait: Extra inputs are not permitted"),
    (OURS, ("models", 1, "settings", "density"), True, "ties: density: a number is needed, got True"),
    (OURS, ("settings", "density"), False, "ties: density: a number is needed, got False"),
    (OURS, ("seed",), True, "seed: Input should be a valid integer"),
    (OURS, ("a\nb",), 1, "a b: Extra inputs are not permitted"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line_by_its_key(tmp_path, told, place, value, says):
    assert wrong(tmp_path / "r.yaml", put(told, place, value)).startswith(says)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates(), st.just(10**400))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([THEIRS, OURS]), st.data(), VALUES, st.none() | st.text(max_size=4) | st.integers())
def test_any_value_at_any_key_gives_a_recipe_or_bad_input(tmp_path_factory, told, data, value, added):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    place = data.draw(st.sampled_from(list(places(told))))
    if added is not None and isinstance(place[-1], str):  # a new key instead of another value
        place = (*place[:-1], added)
    try:
        assert all(isinstance(made, MergeMethod) for made in methods_of(path, put(told, place, value)))
    except BadInput as error:
        assert str(error).isprintable()


def test_mergekits_tokenizer_of_the_base_means_what_its_older_key_means(tmp_path):
    newer = {key: value for key, value in THEIRS.items() if key != "tokenizer_source"} | {"tokenizer": {"source": "base"}}
    assert methods_of(tmp_path / "r.yaml", newer) == methods_of(tmp_path / "r.yaml", THEIRS)


def test_a_switch_of_mergekit_may_be_yes_or_one(tmp_path):
    for on in (True, 1, 1.0):
        assert methods_of(tmp_path / "r.yaml", put(THEIRS, ("parameters", "normalize"), on))[0].normalise is True


def test_bools_are_no_numbers_on_the_command_line_either(models, tmp_path):
    base, one, _ = models
    words = ("merge", "--base", base, "--model", one, "--method", "ties", "--set", "density=yes", tmp_path / "out")
    refused("ties: density: a number is needed, got True", *words)


def test_a_recipe_alone_decides_where_and_how(models, tmp_path):
    base, one, _ = models
    recipe = tmp_path / "r.yaml"
    told = {"base": str(base), "models": [{"model": str(one)}], "out": str(tmp_path / "made"), "stats": True}
    recipe.write_text(yaml.safe_dump(told))
    good("merge", recipe)
    assert same(states(tmp_path / "made")[0], states(one)[0])
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["models"][0]["kept"] == report["models"][0]["total"]  # its `stats` counts though no option says so
    refused("made exists; --replace overwrites it", "merge", recipe)
    good("merge", recipe, tmp_path / "other")  # the command line over the recipe
    assert (tmp_path / "other").is_dir()
    recipe.write_text(yaml.safe_dump(told | {"dry_run": True, "out": str(tmp_path / "not")}))
    assert "writes" in good("merge", recipe)
    assert not list(tmp_path.glob("not*"))
    recipe.write_text(yaml.safe_dump({key: value for key, value in told.items() if key != "out"}))
    assert run("merge", recipe).exit_code == 2
    assert make({"out": "here"}).out == "here"


@pytest.mark.parametrize(
    "value", ["2001-99-99", "!!int x", "9" * 5000, "[" * 3000], ids=["date", "tag", "digits", "brackets"]
)
def test_what_the_yaml_loader_itself_cannot_make_is_no_recipe(tmp_path, value):
    (tmp_path / "r.yaml").write_text(f"method: {value}\n")
    with pytest.raises(BadInput, match="not a YAML recipe") as caught:
        read(tmp_path / "r.yaml", {})
    assert "\n" not in str(caught.value)
