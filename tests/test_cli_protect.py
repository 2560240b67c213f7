"""`maskwright protect` on real folders: the bound in every file, input untouched, resumed to the bit, refusals by name."""

import json

import numpy as np
import pytest
import torch
from commands import good, run
from PIL import Image

from maskwright.cli.main import main
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.salm.noise import Noise

QUICK = ("--set", "rounds=2", "--set", "noise_steps=3", "--set", "model_steps=2", "--set", "batch=4", "--set", "stop=0")


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Six grey images of 8 x 10 in two classes, half of each black; one is a JPEG."""
    rng = generator(0, "images")
    for at, name in enumerate(("cat/a.png", "cat/b.jpg", "cat/deep/c.png", "dog/a.png", "dog/d.bmp", "dog/e.png")):
        pixels = torch.randint(40, 215, (8, 10), generator=rng)
        pixels[:, 5:] = 0 if at % 2 else 255
        put(tmp_path / "in" / name, pixels)
    return tmp_path / "in"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def refused(says, *args):
    result = run("protect", *args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)
    assert "\n" not in str(result.exception)


def test_every_file_comes_out_within_the_bound_and_the_input_stays(folder, tmp_path):
    before, out = contents(folder), tmp_path / "out"
    printed = good("protect", folder, "--out", out, "--eps", "8/255", "--density", "0.05", *QUICK, "--json")
    report = json.loads(printed[printed.index("{") :])
    assert contents(folder) == before and not (tmp_path / "out.partial").exists()
    made = contents(out)
    # b.jpg becomes b.png; report and card lie beside the classes
    names = ["cat/a.png", "cat/b.png", "cat/deep/c.png", "dog/a.png", "dog/d.png", "dog/e.png"]
    assert sorted(made) == sorted([*names, "README.md", "report.json"])
    assert json.loads(made["report.json"]) == report
    total = 0
    for old, new in zip(sorted(before), names, strict=True):
        step = pixels(out / new) - pixels(folder / old)
        assert np.abs(step).max() <= 8 and (step != 0).sum() <= 4  # 5% of 80 pixels
        total += int((step != 0).sum())
    assert total > 0 and report["figures"]["changed"] == total / 480
    assert report["levels"] == 8 and report["pixels"] == 4 and report["data"]["classes"] == {"cat": 3, "dog": 3}
    card = made["README.md"].decode()
    assert "at most 4 of 80 pixels" in card and "## Intended use" in card and "## Limits" in card


def test_the_same_seed_gives_the_same_files_and_a_stopped_run_goes_on_to_the_bit(folder, tmp_path, monkeypatch):
    args = (folder, "--density", "0.1", *QUICK)
    good("protect", *args, "--out", tmp_path / "one")
    whole, counted = Noise.round, []

    def stopping(self):
        if len(counted) == 1:
            raise KeyboardInterrupt
        counted.append(1)
        return whole(self)

    monkeypatch.setattr(Noise, "round", stopping)
    result = run("protect", *args, "--out", tmp_path / "two")
    assert result.exit_code == 130 and "--resume" in result.output and (tmp_path / "two.partial").is_dir()
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(Noise, "round", whole)
    refused("unfinished run", *args, "--out", tmp_path / "two")
    refused("seed", *args, "--out", tmp_path / "two", "--resume", "--seed", 5)
    assert "after round 1" in good("protect", *args, "--out", tmp_path / "two", "--resume")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {n: b for n, b in one.items() if n.endswith(".png")} == {n: b for n, b in two.items() if n.endswith(".png")}
    other = tmp_path / "three"
    good("protect", *args, "--out", other, "--seed", 1)
    assert any(one[name] != data for name, data in contents(other).items() if name.endswith(".png"))


def test_a_changed_image_stops_a_resumed_run(folder, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", Noise.save

    def stopping(self, path):
        whole(self, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Noise, "save", stopping)
    assert run("protect", folder, "--out", out, *QUICK).exit_code == 130
    put(folder / "dog" / "e.png", np.full((8, 10), 9))
    refused("other images", folder, "--out", out, *QUICK, "--resume")


def test_dry_run_says_sizes_and_writes_nothing(folder, tmp_path):
    printed = good("protect", folder, "--dry-run", "--json", "--density", "0.05", *QUICK)
    plan = json.loads(printed[printed.index("{") :])
    assert plan["images"] == 6 and plan["shape"] == [1, 8, 10] and plan["pixels"] == 4 and plan["levels"] == 8
    assert plan["seconds"] > 0 and plan["memory"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert run("protect", folder).exit_code == 2  # no --out


def test_unreadable_images_are_named_and_left_out_only_if_asked(folder, tmp_path):
    (folder / "cat" / "broken.png").write_bytes(b"x")
    refused("broken.png", folder, "--out", tmp_path / "out", *QUICK)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    good("protect", folder, "--out", tmp_path / "out", *QUICK, "--skip-unreadable")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["skipped"] == ["cat/broken.png"] and not (tmp_path / "out" / "cat" / "broken.png").exists()


def test_colour_size_and_an_own_surrogate(folder, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "import torch\n"
        "def build(channels, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 36, classes))\n"
        "def wrong(channels, classes):\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ("--size", 6, "--colour", "--surrogate", "mynet:build", *QUICK)
    good("protect", folder, "--out", tmp_path / "out", *own)
    assert pixels(tmp_path / "out" / "cat" / "a.png").shape == (6, 6, 3)
    for says, name in (("not a torch module", "mynet:wrong"), ("no_net", "no_net:x"), ("mynet", "mynet:missing")):
        refused(says, folder, "--out", tmp_path / "no", "--surrogate", name, *QUICK)


NETS = """
import torch
def build(channels, classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 80, classes))
def wide(channels, classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(81, classes))
def few(channels, classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(80, 1))
def of_one(channels): return 3
def raising(channels, classes): raise KeyError("weights")
class Late(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(80, 2)
    def forward(self, x):
        if self.training: raise RuntimeError("only for use")
        return self.line(x.flatten(1))
def late(channels, classes): return Late()
"""


def test_what_an_own_surrogate_does_wrong_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "surrogates.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    words = (folder, "--out", tmp_path / "out", *QUICK, "--surrogate")
    wide = "the network of surrogate 'surrogates:wide', called with (1, 2), on images of shape (1, 1, 8, 10) raises Runtime"
    for more in ((), ("--dry-run",)):
        refused(wide, *words, "surrogates:wide", *more)
    refused("surrogate 'surrogates:of_one', called as of_one(1, 2), raises TypeError", *words, "surrogates:of_one")
    refused("called as raising(1, 2), raises KeyError: 'weights'", *words, "surrogates:raising")
    refused("gives (1, 1) for 1 images, labels go up to 1", *words, "surrogates:few")
    refused("raises RuntimeError: only for use", *words, "surrogates:late")  # found in the first round
    assert not (tmp_path / "out.partial").exists()
    good("protect", *words, "surrogates:build")


def test_a_window_that_does_not_divide_names_those_that_do(folder, tmp_path):
    out = ("--out", tmp_path / "out", *QUICK)
    refused("window 5 does not divide images of 8 x 10: --set window is one of 1, 2", folder, *out, "--set", "window=5")
    refused("salm: window: a whole number is needed, got 2.5", folder, *out, "--set", "window=2.5")
    refused("at least 1", folder, *out, "--set", "window=0")
    good("protect", folder, *out, "--set", "window=2")


def test_the_process_ends_with_3_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["maskwright", "protect", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 3 and told == f"maskwright: {tmp_path / 'none'}: no such folder"


def test_bad_input_is_refused_in_one_line(folder, tmp_path):
    out = ("--out", tmp_path / "out", *QUICK)
    refused("no such folder", tmp_path / "nowhere", *out)
    refused("1/255", folder, *out, "--eps", "0.001")
    refused("8/255", folder, *out, "--eps", "a/b")
    refused("eps", folder, *out, "--eps", "0")
    refused("keeps none", folder, *out, "--density", "0.001")
    refused("density", folder, *out, "--density", "1.5")
    refused("no setting 'speed'", folder, *out, "--set", "speed=1")
    refused("does not protect", folder, *out, "--method", "mae")
    refused("unknown method", folder, *out, "--method", "nothing")
    refused("lies in", folder, "--out", folder / "out", *QUICK)
    put(folder / "cat" / "a.jpg", np.zeros((8, 10)))
    refused("would both become cat/a.png", folder, *out)
    (folder / "cat" / "a.jpg").unlink()
    put(folder / "cat" / "wide.png", np.zeros((8, 11)))
    refused("wide.png", folder, *out)
    (folder / "cat" / "wide.png").unlink()
    (tmp_path / "out").mkdir()
    refused("exists", folder, *out)
    good("protect", folder, *out, "--replace")
    (tmp_path / "single").mkdir()
    put(tmp_path / "single" / "only" / "a.png", np.zeros((8, 10)))
    refused("one class", tmp_path / "single", "--out", tmp_path / "x", *QUICK)
