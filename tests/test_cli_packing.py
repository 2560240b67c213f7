"""`maskwright pack` and `maskwright unpack` on a small folder: what they print, refuse and leave behind."""

import json
import subprocess
import sys

import pytest
import torch
from commands import good, run
from safetensors.torch import save_file

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import NM

KEEP = (torch.arange(128) % 4 < 2).reshape(4, 32)
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


def refused(says, *args):
    result = run(*args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {n: (torch.ones(4, 32) * KEEP).bfloat16() for n in NAMES} | {"norm": torch.ones(4)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")
    MaskSet({n: Mask(KEEP, NM(2, 4)) for n in NAMES}).save(folder / "masks.safetensors")
    return folder


def test_there_and_back(model, tmp_path):
    text = good("pack", model, tmp_path / "p")
    assert "mlp.up_proj" in text and "0.5000" in text and "byte for byte" not in text and "whole:" in text
    assert str(tmp_path / "u") in good("unpack", tmp_path / "p", tmp_path / "u")
    assert all(path.read_bytes() == (model / path.name).read_bytes() for path in (tmp_path / "u").iterdir())
    assert len(list((tmp_path / "u").iterdir())) == 3


def test_json_and_dry_run(model, tmp_path):
    told = json.loads(good("pack", model, tmp_path / "p", "--dry-run", "--json", "--values", "int8"))
    assert not (tmp_path / "p").exists() and told["out"] is None and told["mask"] == str(model / "masks.safetensors")
    again = json.loads(good("pack", model, tmp_path / "p", "--json", "--values", "int8"))
    assert again == told | {"out": str(tmp_path / "p")}
    assert (told["weights"], told["kept"], told["total"], told["density"]) == (2, 128, 256, 0.5)
    assert told["by_weight"][0]["name"] == NAMES[0] and told["by_weight"][0]["values"] == "int8"
    assert told["bytes_after"] == (tmp_path / "p" / "packed.safetensors").stat().st_size
    assert "nothing was written" in good("pack", model, tmp_path / "q", "--dry-run")
    done = json.loads(good("unpack", tmp_path / "p", tmp_path / "u", "--json"))
    assert list(done["files"]) == ["model.safetensors"]


def test_masks_files_and_refusals(model, tmp_path):
    file = model / "model.safetensors"
    assert json.loads(good("pack", file, tmp_path / "f", "--json"))["weights"] == 2  # by its zeros, with masks beside
    one = tmp_path / "one.safetensors"
    MaskSet({NAMES[0]: Mask(KEEP)}).save(one)
    assert json.loads(good("pack", model, tmp_path / "o", "--mask", one, "--json"))["weights"] == 1
    MaskSet({NAMES[0]: Mask(~KEEP)}).save(one)
    refused("64 weights outside the mask", "pack", model, tmp_path / "x", "--mask", one)
    refused("--replace", "pack", model, tmp_path / "o")
    good("pack", model, tmp_path / "o", "--replace")
    refused("--replace", "unpack", tmp_path / "o", tmp_path / "f")
    good("unpack", tmp_path / "o", tmp_path / "f", "--replace")
    refused("choose another", "pack", model, model, "--replace")
    refused("choose another", "pack", model, model / "inner")
    refused("cannot be stored", "pack", model, tmp_path / "x", "--values", "float8")
    refused("without config.json", "pack", tmp_path, tmp_path / "x")
    refused("no such file", "unpack", tmp_path / "none", tmp_path / "x")
    refused("not a packed checkpoint", "unpack", model, tmp_path / "x")
    refused("a packed checkpoint", "pack", tmp_path / "o", tmp_path / "x")
    refused("is a file", "pack", model, one)
    refused("one.safetensors", "pack", model, one / "x")
    assert not (tmp_path / "x").exists()


def test_minus_zeros_lost_to_a_mask_are_told(model, tmp_path):
    save_file({n: -torch.ones(4, 32) * KEEP for n in NAMES}, model / "model.safetensors")
    assert "128 dropped weights were -0.0" in good("pack", model, tmp_path / "p")


def test_the_command_starts_without_torch_and_exits_with_3(tmp_path):
    code = "import sys, maskwright.cli.packing; print({'torch', 'safetensors', 'rich.table'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    command = [sys.executable, "-m", "maskwright.cli.main", "unpack", str(tmp_path / "no"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
