"""Import direction: core <- models, places <- rooms <- lab's claims, report, cli. Nothing pickles; `list` is torch-free."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import maskwright
from maskwright.core.method import PLACES

ROOT = Path(maskwright.__file__).parent
FILES = [p for p in ROOT.rglob("*.py") if not p.name.startswith("test_")]


def imports(path):
    """Every module a file names, also inside functions, relative, or as `from maskwright.weights import sr_ste`."""
    package = ("maskwright", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *(node.module.split(".") if node.module else ())))
            if base == "maskwright":  # the top level only passes names on: what counts is where they live
                names = [alias.name for alias in node.names if not alias.name.startswith("__")]
                yield from (f"maskwright.{maskwright._WHERE.get(name, name)}" for name in names)
            else:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if base.startswith("maskwright."))


def inner(path):
    return {m for m in imports(path) if m.startswith("maskwright.")}


def offending(files, allowed):
    return [f"{p.relative_to(ROOT)}: {m}" for p in files for m in inner(p) if not re.match(allowed, m)]


def test_core_imports_only_core():
    assert offending(ROOT.glob("core/*.py"), r"maskwright\.core") == []


def test_models_import_only_core_and_kernels():
    assert offending(ROOT.glob("models/*.py"), r"maskwright\.(core|kernels|models)") == []


def test_a_place_imports_core_kernels_and_itself_and_none_of_its_rooms():
    for place in PLACES:
        rooms = "|".join(p.name for p in (ROOT / place).glob("*/") if (p / "card.toml").exists()) or "-"
        allowed = rf"maskwright\.(core|kernels|{place}(?!\.({rooms})\b))"
        assert offending(ROOT.glob(f"{place}/*.py"), allowed) == []


def test_kernels_import_only_core():
    assert offending(ROOT.glob("kernels/**/*.py"), r"maskwright\.(core|kernels)") == []


def test_the_lab_imports_no_command_and_no_report():
    assert offending(ROOT.glob("lab/*.py"), r"maskwright\.(?!cli\b|report\b)") == []


def test_rooms_import_no_other_room_and_only_claims_import_the_lab():
    rooms = [p.parent for p in ROOT.glob("*/*/card.toml")]
    assert rooms
    names = {p.name for p in rooms}
    for room in rooms:
        for path in room.rglob("*.py"):
            if path.name.startswith("test_"):  # a room's tests may compare it with another
                continue
            for module in inner(path):
                parts = module.split(".")
                other = len(parts) > 2 and parts[1] in PLACES and parts[2] in names - {room.name}
                assert not other, f"{path}: {module}"
                free = ("core", "kernels", *PLACES, *(("lab", "models") if path.name == "claim.py" else ()))
                assert parts[1] in free, f"{path}: {module}"


def test_the_walk_over_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "weights" / "here" / "method.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import maskwright.lab.train\n"
        "from maskwright import Mask, lab\n"
        "from maskwright.weights import there\n"
        "from ..other import method\n"
        "from . import mine\n"
        "def late():\n    from ...cli import main\n"
    )
    assert {"maskwright.lab.train", "maskwright.core.mask", "maskwright.lab", "maskwright.weights.there"} <= inner(path)
    assert {"maskwright.weights.other", "maskwright.weights.here.mine", "maskwright.cli.main"} <= inner(path)


def test_the_lab_imports_no_room():
    names = "|".join({p.parent.name for p in ROOT.glob("*/*/card.toml")})
    found = [
        m for p in ROOT.glob("lab/*.py") for m in inner(p) if re.match(rf"maskwright\.({'|'.join(PLACES)})\.({names})\b", m)
    ]
    assert found == []


def test_nothing_pickles():
    for path in FILES:
        assert not {m.split(".")[0] for m in imports(path)} & {"pickle", "dill", "joblib"}, path
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path


def test_listing_leaves_torch_unimported():
    code = "import sys, maskwright, maskwright.cli.main; from maskwright.core.method import methods; methods(); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
