"""The guide is true: its Python runs from top to bottom, and every command and file it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", ["masks.md", "training.md", "updates.md", "inputs.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if not (DOCS / page).exists():
        pytest.skip("no docs here")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    space: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), space)


def test_links_between_pages_lead_somewhere():
    pages = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")) if p.exists()]
    made = {DOCS / "rooms.md", DOCS / "report.png"}  # written by `make docs` and from a real run
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            path = (page.parent / target).resolve()
            assert path.exists() or path in made or page == DOCS / "rooms.md", f"{page.name}: {target}"


def test_options_that_the_prune_page_names_exist():
    typer = pytest.importorskip("typer")
    from maskwright.cli.main import app

    known = {o for c in typer.main.get_command(app).commands.values() for p in c.params for o in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCS / "prune.md").read_text(encoding="utf-8")))
    assert named <= known | {"--out"}, named - known
