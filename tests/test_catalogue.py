"""list, show, cp and report: on card trees made here, and a few facts about the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from maskwright.cli import catalogue
from maskwright.cli.report import report
from maskwright.core.errors import BadInput
from maskwright.core.method import PLACES, read_card
from maskwright.report.copying import copy_room, rename
from maskwright.report.pages import between, facts_only, pages
from maskwright.report.search import search
from maskwright.report.table import Row, markdown, room_row, rooms_markdown, rows, settings

ROOT = Path(__file__).resolve().parents[1]
CARD = """title = "{title}"
year = 2021
arxiv = "{arxiv}"
repo = ""
place = "{place}"
also = [{also}]
pattern = "N:M"
when = "one-shot"
claim = "{claim}"
entry = "{entry}"
baseline = {baseline}
"""
METHOD = '''"""{slug}, one of a kind."""

from maskwright.{place}.base import Base


class {entry}(Base):
    """{entry} keeps what set(values) says."""

    decay: float = 2e-4

    def name(self):
        return "{slug}", set(), get("other")
'''
BASE = (
    'from typing import ClassVar\n\n\nclass Base:\n    n: int = 2\n    decay: float = 0.0\n    kind: ClassVar[str] = "x"\n'
)


def room(root, place, slug, entry, title, arxiv="2102.04010", claim="It holds.", also="", baseline="false", claimed=True):
    folder = root / place / slug
    folder.mkdir(parents=True)
    facts = {"place": place, "slug": slug, "entry": entry}
    told = {"title": title, "arxiv": arxiv, "claim": claim, "also": also, "baseline": baseline}
    (folder / "card.toml").write_text(CARD.format(**facts, **told))
    (folder / "README.md").write_text(
        f"# {title}\n\n## Use\n\n`maskwright.{place}.{slug}` at src/maskwright/{place}/{slug}/\n"
    )
    (folder / "method.py").write_text(METHOD.format(**facts))
    (folder / "__init__.py").write_text(f"from maskwright.{place}.{slug}.method import {entry} as {entry}\n")
    (folder / f"test_{slug}.py").write_text(f"from maskwright.{place}.{slug} import {entry}\n")
    if claimed:
        (folder / "claim.py").write_text(f'ARMS = {{"{slug}": {entry}}}\n')
    (root / place / "base.py").write_text(BASE)
    return folder


@pytest.fixture
def tree(tmp_path):
    """A package tree with three rooms; `random` has a slug that is also a common word."""
    root = tmp_path / "src" / "maskwright"
    for place in PLACES:
        (root / place).mkdir(parents=True)
    room(
        root,
        "weights",
        "sr_ste",
        "SrSte",
        "Learning N:M networks from scratch",
        also='"SR-STE"',
        claim="The pull settles it.",
    )
    room(root, "weights", "random", "Random", "Random pruning", arxiv="", baseline="true", claimed=False)
    room(
        root, "updates", "sparse_mezo", "SparseMezo", "Sparse MeZO", arxiv="2402.15751", claim="Better than random | masks."
    )
    return root


def cards(root):
    return [read_card(p) for place in PLACES for p in sorted((root / place).glob("*/card.toml"))]


def put_result(root, card, **result):
    path = root.parents[1] / "results" / card.place / f"{card.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return root.parents[1] / "results"


# -- the table


def test_a_room_without_a_result_and_with_a_broken_one(tree):
    card = cards(tree)[0]
    assert room_row(card, tree / "nowhere") == Row(card)
    for text in ("{", "[]", '"holds"'):
        results = put_result(tree, card)
        (results / card.place / f"{card.slug}.json").write_text(text)
        assert room_row(card, results) == Row(card)
    assert Row(card).verdict_text == ("baseline" if card.baseline else "not run")


def test_every_key_of_a_result_is_optional(tree):
    card = cards(tree)[1]
    row = room_row(card, put_result(tree, card, verdict=7, twin_fails="yes", seconds=True))
    assert (row.verdict, row.twin_fails, row.seconds) == (None, None, None)
    row = room_row(card, put_result(tree, card, verdict="holds", twin_fails=True, seconds=61))
    assert (row.verdict_text, row.twin_text, row.seconds_text) == ("holds", "yes", "1 min 01 s")
    clock = {"seconds": 61, "elapsed": 32.04, "jobs": 2}
    assert room_row(card, put_result(tree, card, **clock)).seconds_text == "32.0 s, 2 seeds at a time"
    assert room_row(card, put_result(tree, card, **{**clock, "jobs": 1})).seconds_text == "32.0 s"
    odd = {"seconds": 61, "elapsed": True, "jobs": "two"}
    assert room_row(card, put_result(tree, card, **odd)).seconds_text == "1 min 01 s"


def test_a_result_of_other_code_is_stale(tree):
    card = cards(tree)[1]
    results = put_result(tree, card, verdict="holds", code_hash="abc")
    assert room_row(card, results, lambda c: "abc").verdict == "holds"
    assert room_row(card, results, lambda c: "abd").verdict == "stale"


def test_rooms_table_groups_places_and_puts_baselines_last(tree):
    text = rooms_markdown([Row(card) for card in cards(tree)])
    assert text.index("**weights**") < text.index("sr_ste") < text.index("`random`") < text.index("**updates**")
    assert "[`sr_ste`](src/maskwright/weights/sr_ste/)" in text and "https://arxiv.org/abs/2402.15751" in text
    assert "**attention**" not in text
    assert rooms_markdown([]) == "No room yet."
    assert markdown(("a", "b"), [("x|y", "two\nlines")]).splitlines()[2] == "| x\\|y | two lines |"


def test_settings_come_from_the_source_with_bases_first(tree):
    found = settings(next(c for c in cards(tree) if c.slug == "sr_ste"))
    assert [(s.name, s.type, s.default) for s in found] == [("n", "int", "2"), ("decay", "float", "0.0002")]


# -- search


@pytest.mark.parametrize("asked", ["sr_ste", "SR-STE", "sr ste", "srste", "2102.04010"])
def test_a_name_in_any_spelling_is_exact(tree, asked):
    found, exact = search(asked, cards(tree))
    assert exact and found[0].slug == "sr_ste"


def test_search_wants_every_word_and_puts_the_best_first(tree):
    found, exact = search("random", cards(tree))
    assert exact and [c.slug for c in found] == ["random", "sparse_mezo"]
    assert [c.slug for c in search("sparse mezo", cards(tree))[0]] == ["sparse_mezo"]
    assert [c.slug for c in search("from SCRATCH settles", cards(tree))[0]] == ["sr_ste"]
    assert [c.slug for c in search("Which paper is from scratch?", cards(tree))[0]] == ["sr_ste"]
    assert search("random scratch", cards(tree)) == ([], False)
    assert search("", cards(tree)) == ([], False)


# -- the commands on the made tree


@pytest.fixture
def run(tree, monkeypatch):
    monkeypatch.setattr(catalogue, "methods", lambda place=None: [c for c in cards(tree) if place in (None, c.place)])
    # The made-up rooms must not find the real results of a room of the same name.
    monkeypatch.setattr("maskwright.report.table.results_root", lambda: tree / "results")
    app = typer.Typer(pretty_exceptions_enable=False)
    for name, function in (("list", catalogue.list_), ("show", catalogue.show), ("cp", catalogue.cp), ("report", report)):
        app.command(name)(function)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_list_as_json_has_the_promised_fields(run):
    found = json.loads(run("list", "--json").stdout)
    assert [item["slug"] for item in found] == ["random", "sr_ste", "sparse_mezo"]
    fields = "slug place title year arxiv baseline when path verdict twin_fails seconds"
    assert list(found[0]) == fields.split()
    assert [item["slug"] for item in json.loads(run("list", "--json", "--place", "updates").stdout)] == ["sparse_mezo"]


def test_list_for_people_is_one_line_a_room_without_colour_in_a_pipe(run):
    out = run("list").stdout
    assert "\x1b" not in out and len(out.splitlines()) == 4
    assert "weights/sr_ste" in out and "not run" in out and "baseline" in out


def test_list_with_an_unknown_place_is_a_usage_error(run):
    assert run("list", "--place", "heads").exit_code == 2


def test_show_prints_the_card_lists_many_and_refuses_none(run):
    out = run("show", "sr-ste").stdout
    for line in ("weights/sr_ste", "SrSte", "The pull settles it.", "decay: float = 0.0002", "not run"):
        assert line in out
    out = run("show", "random").stdout
    assert "Random pruning (2021)" in out and "also in: sparse_mezo" in out
    many = run("show", "2021").stdout
    assert "3 rooms" in many and "updates/sparse_mezo" in many
    none = run("show", "nothing", "like", "it")
    assert isinstance(none.exception, BadInput) and "\n" not in str(none.exception)


# -- cp


def test_cp_renames_all_that_names_the_room(tree):
    folder, edit = copy_room("sr-ste", "updates/new_name", tree)
    assert folder == tree / "updates" / "new_name"
    assert [name for name, _ in edit] == ["card.toml", "README.md", "method.py", "claim.py", "test_new_name.py"]
    assert all((folder / name).is_file() for name, _ in edit)
    card = read_card(folder / "card.toml")
    assert (card.slug, card.place, card.entry) == ("new_name", "updates", "NewName")
    assert (folder / "__init__.py").read_text() == "from maskwright.updates.new_name.method import NewName as NewName\n"
    method = (folder / "method.py").read_text()
    assert "class NewName(Base)" in method and 'return "new_name", set(), get("other")' in method
    assert '{"new_name": NewName}' in (folder / "claim.py").read_text()
    assert "src/maskwright/updates/new_name/" in (folder / "README.md").read_text()
    assert not [p for p in folder.iterdir() if "sr_ste" in p.name]
    assert sorted(p.name for p in (tree / "updates").iterdir()) == ["base.py", "new_name", "sparse_mezo"]


def test_cp_leaves_the_source_alone_and_says_what_a_baseline_lacks(tree):
    before = {p: p.read_text() for p in (tree / "weights").rglob("*.*") if p.is_file()}
    _, edit = copy_room("random", "weights/a2", tree)
    assert {p: p.read_text() for p in before} == before
    assert "to be written" in dict(edit)["claim.py"]
    assert 'return "a2", set(), get("other")' in (tree / "weights/a2/method.py").read_text()


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("nobody", "weights/new", "unknown room 'nobody'; known: random, sparse_mezo, sr_ste"),
        ("sr_ste", "heads/new", "unknown place 'heads'"),
        ("sr_ste", "new", "unknown place 'new'"),
        ("sr_ste", "weights/", "no room name"),
        ("sr_ste", "weights/New", "no room name"),
        ("sr_ste", "weights/2nd", "no room name"),
        ("sr_ste", "weights/../x", "no room name"),
        ("sr_ste", "weights/a/b", "no room name"),
        ("sr_ste", "weights/class", "no room name"),
        ("sr_ste", "weights/random", "weights/random exists"),
        ("sr_ste", "attention/sparse-mezo", "updates/sparse_mezo exists"),
        ("sr_ste", "attention/base", "weights/base exists"),
    ],
)
def test_cp_refuses_in_one_line_and_leaves_nothing(tree, source, target, says):
    before = sorted(tree.rglob("*"))
    with pytest.raises(BadInput, match=says) as caught:
        copy_room(source, target, tree)
    assert "\n" not in str(caught.value) and sorted(tree.rglob("*")) == before


def test_rename_touches_a_bare_slug_only_where_it_is_no_common_word():
    assert rename("sr_ste needs n; my_sr_ste_x", ("weights", "sr_ste", "SrSte"), ("weights", "new", "New")).startswith(
        "new needs n; my_sr_ste_x"
    )
    text = 'set(x); weights.set; weights.settle; "set"; test_set; Set; maskwright check set'
    said = rename(text, ("weights", "set", "Set"), ("inputs", "mae", "Mae"))
    assert said == 'set(x); inputs.mae; weights.settle; "mae"; test_mae; Mae; maskwright check mae'


# -- report


def test_report_refuses_a_wrong_folder_and_file_in_one_line(run, tmp_path):
    (tmp_path / "report.json").write_text('{"format": "else"}')
    for folder, says in (
        (tmp_path, "not a maskwright report"),
        (tmp_path / "no", "not a folder"),
        (tmp_path / "src", "No such"),
    ):
        failed = run("report", str(folder))
        assert isinstance(failed.exception, BadInput) and says in str(failed.exception)
        assert "\n" not in str(failed.exception) and not (tmp_path / "report.html").exists()


def test_report_draws_the_page_again(run, tmp_path):
    least = {"format": "maskwright.report", "version": 1, "kept": 1, "total": 2}
    least |= {"model": {"name": "tiny", "parameters": 3}, "method": {"slug": "wanda"}}
    (tmp_path / "report.json").write_text(json.dumps(least))
    done = run("report", str(tmp_path))
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "report.html")
    assert "tiny, masked by wanda" in (tmp_path / "report.html").read_text()


# -- generated pages


def test_pages_follow_from_cards_readmes_and_results(tree):
    root, mezo = tree.parents[1], cards(tree)[-1]
    (root / "README.md").write_text("head\n<!-- rooms:begin -->\nold\n<!-- rooms:end -->\ntail\n")
    effects = [{"name": "beats random", "difference": 0.12345, "verdict": "holds", "values": [1]}]
    results = put_result(tree, mezo, verdict="holds", twin_fails=True, seconds=12.5, effects=effects)
    found = pages(root, [room_row(card, results) for card in cards(tree)])
    assert found[root / "README.md"].startswith("head\n<!-- rooms:begin -->\n**weights**")
    assert found[root / "README.md"].endswith("<!-- rooms:end -->\ntail\n") and "\nold\n" not in found[root / "README.md"]
    page = found[root / "docs/rooms/sparse_mezo.md"]
    assert "# Sparse MeZO" in page and "| beats random | 0.1235 | holds |" in page and "random \\| masks" in page
    assert "(rooms/sr_ste.md)" in found[root / "docs/rooms.md"]
    assert set(found) == {root / "README.md", root / "docs/rooms.md"} | {
        root / f"docs/rooms/{slug}.md" for slug in ("random", "sr_ste", "sparse_mezo")
    }


def test_a_figure_that_was_not_finite_is_an_empty_cell(tree):
    root, mezo = tree.parents[1], cards(tree)[-1]
    (root / "README.md").write_text("<!-- rooms:begin --><!-- rooms:end -->")
    spread = {"dense": {"loss": {"mean": None, "sd": None}}, "random": {"loss": {"mean": 1.5, "sd": 0.25}}}
    results = put_result(tree, mezo, verdict="holds", effects=[{"name": "e", "figure": "loss"}], spread=spread)
    page = pages(root, [room_row(card, results) for card in cards(tree)])[root / "docs/rooms/sparse_mezo.md"]
    assert "| random | 1.5 ± 0.25 |" in page and "| dense |  |" in page


def test_markers_must_be_there_once():
    for text in ("", "<!-- rooms:end --><!-- rooms:begin -->", "<!-- rooms:begin -->" * 2 + "<!-- rooms:end -->"):
        with pytest.raises(ValueError, match="exactly one"):
            between(text, "x")


# -- the real tree


def test_the_readme_table_is_up_to_date_with_the_cards():
    readme = ROOT / "README.md"
    if not readme.exists() or not rows():
        pytest.skip("no README or no room here")
    text = readme.read_text(encoding="utf-8")
    shown = text.split("<!-- rooms:begin -->")[1].split("<!-- rooms:end -->")[0]
    assert facts_only(shown) == facts_only(rooms_markdown()), "run `make docs`"
    assert len(facts_only(shown)) == len(rows())


def test_list_does_not_import_torch_and_starts_at_once():
    code = (
        "import sys, typer; from maskwright.cli.catalogue import list_, show\n"
        "list_(place=None, as_json=False); list_(place='weights', as_json=True)\n"
        "from maskwright.core.method import methods\n"
        "methods() and show([methods()[0].slug])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    took = []
    for _ in range(3):
        began = time.perf_counter()
        env = os.environ | {"NO_COLOR": "1"}
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60, env=env)
        took.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
    # Loose, since other jobs may share the cores; torch alone would take longer than this.
    assert min(took) < 1.5
