"""`maskwright pretrain` on a folder of real digits: page, probe, backbone that loads, resume to the bit, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import good, run
from safetensors.torch import load_file

from maskwright.cli.main import main
from maskwright.cli.pretrain_models import backbone
from maskwright.core.errors import BadInput
from maskwright.core.method import get
from maskwright.inputs.pretraining import Pretrain
from maskwright.report.curve import curve
from maskwright.report.pretraining import read, render

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
FAST = ("--method", "mae", "--model", "small-vit", "--steps", 6, "--batch", 8, "--set", "decoder_layers=1")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Sixty real digits at 16 x 16, a subfolder a class."""
    from sklearn.datasets import load_digits

    raw, root = load_digits(n_class=4), tmp_path_factory.mktemp("digits")
    for number in range(60):
        folder = root / f"digit{raw.target[number]}"
        folder.mkdir(exist_ok=True)
        pixels = (raw.images[number] * 15.9).astype("uint8")
        Image.fromarray(pixels).resize((16, 16)).save(folder / f"{number:03}.png")
    return root


def refused(says, *args):
    result = run("pretrain", *args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)
    assert "\n" not in str(result.exception)


def test_a_run_writes_a_backbone_a_page_and_a_probe(digits, tmp_path):
    out = tmp_path / "out"
    told = good("pretrain", "--data", digits, "--out", out, *FAST, "--labelled", "--probe-every", 3)
    assert "linear probe" in told and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    report = read(out)
    assert len(report["losses"]) == 6 and [each["step"] for each in report["probe"]] == [0, 3, 6]
    assert report["data"]["images"] + report["data"]["held_out"] == 60 and report["data"]["shape"] == [1, 16, 16]
    assert len(report["pictures"]) == 3 and (out / "report.html").read_text() == render(report)
    (out / "report.html").unlink()
    good("report", out)
    assert (out / "report.html").read_text() == render(report)
    from transformers import ViTModel

    loaded = ViTModel.from_pretrained(out, add_pooling_layer=False)
    assert sum(p.numel() for p in loaded.parameters()) == report["model"]["parameters"]
    assert "Masked Autoencoders" in (out / "README.md").read_text()
    refused("exists; --replace overwrites it", "--data", digits, "--out", out, *FAST)


def test_labels_are_not_needed_and_then_there_is_no_probe(digits, tmp_path):
    shown = json.loads(good("pretrain", "--data", digits, "--out", tmp_path / "o", *FAST, "--json").splitlines()[-1])
    assert shown["probe"] == [] and shown["data"]["images"] == 60
    assert "no linear probe" in (tmp_path / "o" / "report.html").read_text()


def test_dry_run_writes_nothing(digits, tmp_path):
    told = good("pretrain", "--data", digits, "--out", tmp_path / "o", *FAST, "--dry-run", "--json")
    plan = json.loads(told.splitlines()[-1])
    assert plan["images"] == 60 and plan["steps"] == 6 and plan["parameters"] > 10**6 and plan["seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_to_the_same_bits(digits, tmp_path):
    steps = ("--steps", "16", "--probe-every", "2", "--labelled", "--batch", "8", "--set", "decoder_layers=1")
    command = [sys.executable, "-m", "maskwright.cli.main", "pretrain", "--data", digits, "--method", "mae"]
    command = [str(word) for word in (*command, "--model", "small-vit", *steps)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    state = tmp_path / "cut.partial" / "state.safetensors"
    going = subprocess.Popen([*command, "--out", str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state.is_file() and going.poll() is None:
        time.sleep(0.02)
    os.kill(going.pid, signal.SIGKILL)
    going.wait()
    assert state.is_file() and not cut.exists()
    refused("holds an unfinished run", "--data", digits, "--out", cut, "--method", "mae", "--model", "small-vit")
    other = ("--data", digits, "--out", cut, "--method", "mae", "--model", "small-vit", "--resume")
    refused("the unfinished run has recipe", *other, "--set", "decoder_layers=1", "--labelled", "--probe-every", 2)
    subprocess.run([*command, "--out", str(cut), "--resume"], check=True, capture_output=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert read(whole)["losses"] == read(cut)["losses"] and read(whole)["probe"] == read(cut)["probe"]
    assert not (tmp_path / "cut.partial").exists()


def test_what_cannot_be_done_is_refused_in_one_line(digits, tmp_path):
    data = ("--data", digits, "--out", tmp_path / "o")
    refused("does not pre-train on images", *data, "--method", "wanda")
    refused("unknown method", *data, "--method", "none")
    refused("mae has no setting 'speed'", *data, *FAST, "--set", "speed=3")
    refused("not one of small-resnet", *data, "--method", "mae", "--model", "huge")
    refused("No module named 'nowhere'", *data, "--method", "mae", "--model", "nowhere:net")
    refused("density", *data, *FAST, "--density", "0.0")
    refused("keeps none of the", *data, *FAST, "--density", "0.001")
    refused("cannot run on a part of its tokens", *data, *FAST, "--model", "small-resnet")
    refused("no such folder", "--data", tmp_path / "none", "--out", tmp_path / "o", *FAST)
    (tmp_path / "empty").mkdir()
    refused("no image", "--data", tmp_path / "empty", "--out", tmp_path / "o", *FAST)
    refused("at least 1 step", *data, *FAST[:4], "--steps", 0)
    refused("choose another folder", "--data", digits, "--out", digits / "inside", *FAST)
    assert run("pretrain", "--data", digits).exit_code == 2
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


TINY = ("--steps", 4, "--batch", 4, "--set", "width=8")
NETS = """
import torch
from torch import nn

class Two(nn.Sequential):
    def __init__(self, channels=1):
        super().__init__(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())

def build(): return Two()
def of_one(channels): return Two(channels)
def broken(): raise OSError("weights.pt:\\n not here")
def number(): return 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "ournets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_default_method_and_model_run(digits, tmp_path):
    good("pretrain", "--data", digits, "--out", tmp_path / "o", *TINY)
    report = read(tmp_path / "o")
    assert report["method"]["slug"] == "spark" and report["model"]["name"] == "small-resnet" and len(report["losses"]) == 4
    from transformers import ResNetModel

    assert ResNetModel.from_pretrained(tmp_path / "o").config.num_channels == 1


def test_dmjd_runs_on_a_small_vit(digits, tmp_path):
    words = ("--method", "dmjd", "--model", "small-vit", "--steps", 3, "--batch", 4, "--set", "decoder_layers=1")
    good("pretrain", "--data", digits, "--out", tmp_path / "o", *words)
    report = read(tmp_path / "o")
    assert report["method"]["slug"] == "dmjd" and len(report["losses"]) == 3 and len(report["pictures"]) == 3


def test_an_own_net_is_trained_and_plain_torch_loads_it(digits, nets):
    good("pretrain", "--data", digits, "--out", nets / "o", *TINY, "--model", "ournets:build")
    assert sorted(p.name for p in (nets / "o").iterdir()) == [
        "README.md",
        "backbone.safetensors",
        "report.html",
        "report.json",
    ]
    import ournets

    torch.manual_seed(0)
    net = ournets.build()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(load_file(nets / "o" / "backbone.safetensors"))
    assert not torch.equal(net[0].weight, start["0.weight"]) and net(torch.rand(2, 1, 16, 16)).shape == (2, 8, 4, 4)


def test_a_stopped_spark_run_goes_on_to_the_same_bits(digits, nets, monkeypatch):
    words = ("--data", digits, *TINY, "--model", "ournets:build")
    good("pretrain", *words, "--out", nets / "whole")
    step = Pretrain._advance

    def stopping(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Pretrain, "_advance", stopping)
    assert run("pretrain", *words, "--out", nets / "cut").exit_code == 130 and (nets / "cut.partial").is_dir()
    monkeypatch.setattr(Pretrain, "_advance", step)
    assert "after step 2" in good("pretrain", *words, "--out", nets / "cut", "--resume")
    one, two = (load_file(nets / name / "backbone.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read(nets / "whole")["losses"] == read(nets / "cut")["losses"]


def test_what_an_own_function_or_net_does_wrong_is_one_line_that_names_it(digits, nets):
    words = ("--data", digits, "--out", nets / "o", *TINY, "--model")
    refused("model 'ournets:of_one', called as of_one(), raises TypeError", *words, "ournets:of_one")
    refused("called as broken(), raises OSError: weights.pt: not here", *words, "ournets:broken")
    refused("called as number(), gives a int, not a torch module", *words, "ournets:number")
    refused("has no attribute 'missing'", *words, "ournets:missing")
    for more in ((), ("--dry-run",)):
        told = "spark around model 'ournets:build' on images of shape (2, 3, 16, 16)"
        refused(told, *words, "ournets:build", "--colour", *more)
    assert sorted(p.name for p in nets.iterdir() if "__" not in p.name) == ["ournets.py"]
    good("pretrain", *words, "ournets:build")
    assert "called as function()" in " ".join(run("pretrain", "--help").output.replace("│", " ").split())


def test_settings_of_another_type_are_refused_naming_field_and_type(digits, tmp_path):
    words = ("--data", digits, "--out", tmp_path / "o", "--set")
    refused("spark: width: a whole number is needed, got 1000000000.0", *words, "width=1e9")
    refused("spark: hierarchy: true or false is needed, got 'maybe'", *words, "hierarchy=maybe")
    refused("spark: patch: a whole number is needed, got 'abc'", *words, "patch=abc")
    refused("spark: density: a number is needed, got True", *words, "density=yes")
    refused("dmjd: views: a whole number is needed, got 2.5", *words, "views=2.5", "--method", "dmjd")
    refused("dmjd: target: a word or a function is needed, got 3", *words, "target=3", "--method", "dmjd")
    with pytest.raises(BadInput, match=r"Dmjd: views: a whole number is needed, got 2\.5"):
        get("dmjd")(views=2.5)


def test_sizes_that_no_patch_divides_are_refused_and_those_that_work_named(digits, tmp_path):
    words = ("--data", digits, "--out", tmp_path / "o", *FAST)
    refused("do not divide 33: give --size 30 or 32", *words, "--size", 33)
    refused("do not divide 2: give --size 4", *words, "--size", 2)
    refused("one value a patch, which cannot be normalised", *words, "--size", 8, "--set", "target=normalised")


def test_a_rate_that_blows_the_weights_up_is_blamed_on_the_rate(digits, tmp_path):
    refused("a smaller lr may help", "--data", digits, "--out", tmp_path / "o", *FAST, "--lr", "1e30")


def test_a_transformers_folder_is_loaded_without_a_word(digits, tmp_path, capfd):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")  # its pooler is left over: something to report
    capfd.readouterr()
    backbone(str(tmp_path / "vit"), 1, (16, 16), 0)
    assert capfd.readouterr() == ("", "")


def test_the_process_ends_with_3_and_one_line(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["maskwright", "pretrain", "--data", str(digits), "--dry-run", "--set", "width=a"])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 3 and told == "maskwright: spark: width: a whole number is needed, got 'a'"


def test_an_unreadable_image_is_named_and_left_out_only_when_asked(digits, tmp_path):
    root = tmp_path / "some"
    root.mkdir()
    for path in sorted(digits.rglob("*.png"))[:8]:
        (root / path.name).write_bytes(path.read_bytes())
    (root / "bad.png").write_bytes(b"not an image")
    refused("bad.png", "--data", root, "--out", tmp_path / "o", *FAST)
    good("pretrain", "--data", root, "--out", tmp_path / "o", *FAST, "--skip-unreadable")
    assert read(tmp_path / "o")["data"]["skipped"] == ["bad.png"]


def test_a_curve_escapes_its_words_and_leaves_out_what_is_not_finite():
    drawn = curve({"<b>": [(0, 1.0), (1, float("nan")), (2, 0.5)]}, wide=True, title="<i>")
    assert "<b>" not in drawn and "<i>" not in drawn and drawn.count("<circle") == 2 and "nan" not in drawn
    assert curve({"a": [(0, float("inf"))]}, wide=False, title="t") == ""
