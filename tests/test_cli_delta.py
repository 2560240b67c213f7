"""`maskwright delta`: what it refuses, in one line and with code 3, and what it leaves on the disk when it does."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from commands import good, run
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from maskwright.cli.main import main
from maskwright.core.errors import BadInput
from maskwright.updates import Delta, Deltas

pytest.importorskip("transformers")
NORM = "model.norm.weight"


def copied(base, folder, change):
    """A copy of a model's folder with other weights."""
    shutil.copytree(base, folder)
    save_file(change(load_file(base / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a model of which every tensor moved."""
    root = tmp_path_factory.mktemp("delta")
    base = tiny_llama(root / "base", torch.float32)
    rng = torch.Generator().manual_seed(0)
    moved = {n: v + 0.02 * torch.randn(v.shape, generator=rng) for n, v in load_file(base / "model.safetensors").items()}
    return base, copied(base, root / "tuned", lambda state: moved)


@pytest.fixture(scope="module")
def file(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("file") / "d.safetensors"
    good("delta", "make", folders[1], folders[0], out, "--density", 0.02)
    return out


def refused(says, *args):
    """By the command as `main` runs it: BadInput and no other error."""
    result = run("delta", *args)
    assert isinstance(result.exception, BadInput), (result.output, result.exception)
    assert says in str(result.exception) and "\n" not in str(result.exception), str(result.exception)


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_exit_codes_and_one_line(folders, file, tmp_path, monkeypatch, capsys):
    base, tuned = folders
    for args, code, says in (
        (("add", base, f"{file}:nan", tmp_path / "x"), 3, "a scale is a finite number"),
        (("make", tuned, base, "/no/dir/x.safetensors"), 3, "no such folder"),
        (("make", tuned, base, base / "model.safetensors", "--replace"), 3, "choose another folder to write"),
        (("add", base, file, "/proc/x/y"), 3, "/proc/x/y: "),
        (("add", base, file), 2, "give delta files and then OUT"),
        (("info", file), 0, ""),
    ):
        monkeypatch.setattr(sys, "argv", ["maskwright", "delta", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code == code and says in " ".join(said.err.split()), said.err
        if code == 3:
            assert said.err.count("\n") == 1 and said.err.startswith("maskwright: ") and not said.out
    call = [sys.executable, "-m", "maskwright.cli.main", "delta", "info", str(tmp_path / "none")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, f"maskwright: {tmp_path / 'none'}: no such file\n")
    assert not list(tmp_path.iterdir())


def test_scales_and_sums_are_finite(folders, file, tmp_path):
    base, _ = folders
    for scale in ("nan", "inf", "-inf", "1e999"):
        refused(f"{file}:{scale}: a scale is a finite number", "add", base, f"{file}:{scale}", tmp_path / "x")
    refused("sums are NaN or infinite in float32", "add", base, f"{file}:1e300", tmp_path / "x")
    Deltas({}, {NORM: torch.full((32,), 1e39, dtype=torch.float64)}).save(tmp_path / "whole.safetensors")
    refused(f"{NORM}: 32 entries that replace the base's", "add", base, tmp_path / "whole.safetensors", tmp_path / "x")
    refused("cannot be scaled", "add", base, f"{tmp_path / 'whole.safetensors'}:0.5", tmp_path / "x")
    broken = copied(base, tmp_path / "broken", lambda state: state | {NORM: torch.full((32,), float("nan"))})
    refused(f"{NORM}: 32 entries of a tensor", "make", broken, base, tmp_path / "y.safetensors", "--full", NORM)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole.safetensors"]


def test_what_cannot_be_written_is_told_in_one_line(folders, file, tmp_path):
    base, tuned = folders
    (tmp_path / "dir").mkdir()
    refused("Is a directory", "make", tuned, base, tmp_path / "dir", "--replace")
    (tmp_path / "plain").write_text("")
    refused("Not a directory", "add", base, file, tmp_path / "plain" / "out")
    plain = Deltas({"a.weight": Delta((8, 8), torch.tensor([1]), torch.ones(1))})
    plain.save(tmp_path / "a.safetensors")
    refused("Not a directory", "export", tmp_path / "a.safetensors", tmp_path / "plain" / "out")
    refused("is a file; a folder is written", "add", base, file, tmp_path / "plain", "--replace")
    refused("is read; choose another name", "add", base, file, file)  # OUT forgotten
    assert (tmp_path / "plain").read_bytes() == b"" and not list(tmp_path.glob("*.partial"))


def test_inputs_are_never_written_to(folders, file, tmp_path):
    base, tuned = folders
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    shutil.copyfile(base / "model.safetensors", one)
    shutil.copyfile(tuned / "model.safetensors", other)
    (tmp_path / "kept").mkdir()
    shutil.copyfile(file, tmp_path / "kept" / "d.safetensors")
    before = files_of(base) | files_of(tuned) | files_of(tmp_path)
    for out in (base / "model.safetensors", tuned / "model.safetensors", base / "d.safetensors", base):
        refused("choose another", "make", tuned, base, out, "--replace")
    refused("choose another name", "make", other, one, one, "--replace")
    refused("choose another name", "make", other, one, other)
    for out in (base, base / "out", base.parent):
        refused("choose another", "add", base, file, out, "--replace")
    refused("choose another", "add", one, file, tmp_path, "--replace")
    refused("choose another", "add", base, tmp_path / "kept" / "d.safetensors", tmp_path / "kept", "--replace")
    assert files_of(base) | files_of(tuned) | files_of(tmp_path) == before
    good("delta", "make", other, one, tmp_path / "beside.safetensors")  # files may lie side by side
    good("delta", "add", one, tmp_path / "beside.safetensors", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(back[n], v, atol=1e-7) for n, v in load_file(other).items())


def test_another_tokenizer_is_refused(folders, tmp_path):
    base, tuned = folders
    shuffled = copied(tuned, tmp_path / "shuffled", lambda state: state)
    told = json.loads((shuffled / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    told["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    (shuffled / "tokenizer.json").write_text(json.dumps(told))
    refused("a token means another thing", "make", shuffled, base, tmp_path / "d.safetensors")
    good("delta", "make", shuffled, base, tmp_path / "d.safetensors", "--any-tokenizer")


def test_what_a_killed_run_left_is_no_reason_to_resume(folders, file, tmp_path):
    base, _ = folders
    (tmp_path / "out.partial").mkdir()
    refused("--replace starts anew", "add", base, file, tmp_path / "out")
    assert "--resume" not in str(run("delta", "add", base, file, tmp_path / "out").exception)
    good("delta", "add", base, file, tmp_path / "out", "--replace")
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out" / "config.json").is_file()


def test_the_same_delta_twice_is_refused(folders, file, tmp_path):
    base, _ = folders
    shutil.copyfile(file, tmp_path / "copy.safetensors")
    for second in (file, f"{file}:0.5", tmp_path / "copy.safetensors"):
        refused("the same delta as", "add", base, file, second, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_alone_goes_on_its_own_base(folders, tmp_path):
    base, tuned = folders
    headed = copied(base, tmp_path / "headed", lambda state: state | {NORM: torch.ones(32) * 2})
    good("delta", "make", headed, base, tmp_path / "h.safetensors", "--full", NORM)
    head = Deltas.load(tmp_path / "h.safetensors")
    assert list(head.full) == [NORM] and len(head.base) == 16 and NORM not in head.base
    refused("made for another base", "add", tuned, tmp_path / "h.safetensors", tmp_path / "out")
    good("delta", "add", tuned, tmp_path / "h.safetensors", tmp_path / "any", "--any-base")
    good("delta", "add", base, tmp_path / "h.safetensors", tmp_path / "out", "--verify")
    assert (load_file(tmp_path / "out" / "model.safetensors")[NORM] == 2).all()
    save_file({"w": torch.ones(32)}, tmp_path / "small.safetensors")
    Deltas({}, {"w": torch.zeros(32)}, head.base).save(tmp_path / "w.safetensors")
    refused("made for another base", "add", tmp_path / "small.safetensors", tmp_path / "w.safetensors", tmp_path / "x")


def test_tensors_are_chosen_and_peft_loads_the_export(folders, file, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, tuned = folders
    refused("is none", "export", file, tmp_path / "peft")  # norms, which SHiRA cannot hold
    words = ("--density", 0.1, "--where", "self_attn.*.weight", "--where", "re:mlp.up_proj")
    good("delta", "make", tuned, base, tmp_path / "d.safetensors", *words)
    d = Deltas.load(tmp_path / "d.safetensors")
    one, other = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert set(d) == {n for n in one if "self_attn" in n or "up_proj" in n} and len(d) == 4 * 5
    assert d.count == round(0.1 * sum(one[n].numel() for n in d)) and d.made_by["where"] == [
        "self_attn.*.weight",
        "re:mlp.up_proj",
    ]
    good("delta", "export", tmp_path / "d.safetensors", tmp_path / "peft", "--base", base)
    good("delta", "add", base, tmp_path / "d.safetensors", tmp_path / "out")
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT warns about what the config does not name
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.allclose(loaded(ids).logits, want, atol=1e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(ids).logits, want, atol=1e-3)
    grown = copied(tuned, tmp_path / "grown", lambda state: state | {NORM: torch.ones(40)})
    refused(f"{NORM} has shape (40,)", "make", grown, base, tmp_path / "g.safetensors")
    good("delta", "make", grown, base, tmp_path / "g.safetensors", "--where", "mlp")  # left out, it need not fit
    assert torch.equal(Deltas.load(tmp_path / "g.safetensors")["model.layers.0.mlp.up_proj.weight"].values, _gap(one, other))
    refused("where 'head' matches no weight", "make", tuned, base, tmp_path / "x", "--where", "mlp", "--where", "head")
    refused("full 'head.*' matches no tensor", "make", tuned, base, tmp_path / "x", "--full", "head.*")


def _gap(one, other, name="model.layers.0.mlp.up_proj.weight"):
    gap = (other[name] - one[name]).flatten()
    return gap[gap != 0]


def test_integers_take_no_delta(tmp_path):
    save_file({"w": torch.ones(3, dtype=torch.int64)}, tmp_path / "m.safetensors")
    Deltas({"w": Delta((3,), torch.tensor([1]), torch.ones(1))}).save(tmp_path / "d.safetensors")
    refused(
        "w: torch.int64 cannot take a delta", "add", tmp_path / "m.safetensors", tmp_path / "d.safetensors", tmp_path / "x"
    )
