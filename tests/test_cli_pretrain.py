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

from maskwright.core.errors import BadInput
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
    refused("mae has no setting speed", *data, *FAST, "--set", "speed=3")
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
