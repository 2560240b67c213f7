"""`maskwright merge` says what is wrong in one line, with exit code 3, before any long work, and leaves nothing behind."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import good, run
from safetensors.torch import load_file, save_file
from tuned import refused, states, three, tuned

from maskwright.cli.main import main
from maskwright.core.errors import BadInput
from maskwright.models.load import load as really_load

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return three(tmp_path_factory.mktemp("merge"))


def weights(folder, change):
    """Change the tensors of a folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def test_a_process_ends_with_3_and_one_line(tmp_path):
    command = [sys.executable, "-m", "maskwright.cli.main", "merge", "--base", str(tmp_path / "none"), "--model", "x"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stderr.startswith("maskwright: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


CASES = {
    "a base that is none": ("--base", "NONE", "--model", "ONE"),
    "an unknown method": ("--base", "BASE", "--model", "ONE", "--method", "slerp"),
    "a setting that it lacks": ("--base", "BASE", "--model", "ONE", "--density", "0.5"),
    "a value out of range": ("--base", "BASE", "--model", "ONE", "--method", "ties", "--density", "2"),
    "weights that do not go together": ("--base", "BASE", "--model", "ONE", "--method", "ties", "--weight", "-1"),
    "a pattern that matches nothing": ("--base", "BASE", "--model", "ONE", "--base-only", "lm_haed*"),
    "a text that is not there": ("--base", "BASE", "--model", "ONE", "--evaluate", "NONE"),
    "a model with another shape": ("--base", "BASE", "--model", "WIDE"),
    "a NaN in a model": ("--base", "BASE", "--model", "BROKEN"),
    "a recipe that is none": ("RECIPE",),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_ends_with_3_and_one_line(models, tmp_path, capsys, monkeypatch, case):
    base, one, _ = models
    names = {"BASE": base, "ONE": one, "NONE": tmp_path / "none", "RECIPE": tmp_path / "r.yaml"}
    (tmp_path / "r.yaml").write_text("a: [\nb")
    norm = "model.norm.weight"
    if "WIDE" in CASES[case]:
        names["WIDE"] = weights(tuned(base, tmp_path / "wide", 5), lambda s: s.update({norm: torch.ones(48).bfloat16()}))
    if "BROKEN" in CASES[case]:  # found only once the merge has begun
        names["BROKEN"] = weights(tuned(base, tmp_path / "broken", 5), lambda s: s[norm].fill_(float("nan")))
    words = [str(names.get(word, word)) for word in CASES[case]]
    monkeypatch.setattr(sys, "argv", ["maskwright", "merge", *words, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert stop.value.code == 3 and told.out == ""
    assert told.err.startswith("maskwright: ") and told.err.count("\n") == 1 and len(told.err) > 30
    assert not list(tmp_path.glob("out*"))


def test_names_with_line_breaks_give_one_line(models, tmp_path):
    base, *_ = models
    own, more = (shutil.copytree(base, tmp_path / name) for name in ("own", "more"))
    for folder, value in ((own, 0.0), (more, float("nan"))):
        weights(folder, lambda s, value=value: s.update({"a\nb": torch.full((2,), value)}))
    for says, *words in (
        ("adds a b; the base is", "--base", base, "--model", more),
        ("lacks a b; the base is", "--base", more, "--model", base),
        ("a b: 2 deltas are NaN or infinite", "--base", own, "--model", more),
        ("a b: 2 deltas are NaN or infinite", "--base", own, "--model", more, "--method", "ties"),
        ("a b: 2 deltas are NaN or infinite", "--base", own, "--model", more, "--method", "ties", "--group", "row"),
    ):
        result = run("merge", *words, tmp_path / "out")
        assert isinstance(result.exception, BadInput) and says in str(result.exception)
        assert "\n" not in str(result.exception)
    weights(more, lambda s: s.update({"a\nb": torch.zeros(3)}))
    refused("more: a b has shape (3,), in the base (2,) (1 of", "merge", "--base", own, "--model", more, tmp_path / "out")


def test_three_shapes_that_differ_are_named_and_all_are_counted(models, tmp_path):
    base, *_ = models
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(4)]
    wide = weights(tuned(base, tmp_path / "wide", 5), lambda s: s.update({name: torch.ones(9).bfloat16() for name in names}))
    number = len(states(base)[0])
    told = "; ".join(f"{name} has shape (9,), in the base (32,)" for name in names[:3])
    refused(f"{wide}: {told} (4 of {number} tensors differ)", "merge", "--base", base, "--model", wide, tmp_path / "out")


def test_a_pattern_must_match_a_tensor_of_some_model(models, tmp_path):
    base, one, _ = models
    more = weights(tuned(base, tmp_path / "more", 5), lambda s: s.update({"score.weight": torch.ones(2)}))
    words = ("merge", "--base", base, "--model", one, "--model", more, "--base-only", "score.*", "--base-only")
    refused("--base-only '*.norn.*' matches no tensor of the base or of a model", *words, "*.norn.*", tmp_path / "out")
    refused("'*.norn.*' matches no tensor", *words, "*.norn.*", "--dry-run")
    good(*words, "*.norm.*", tmp_path / "out")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_cannot_be_scored_is_refused_before_the_merge(models, tmp_path, monkeypatch, dry):
    base, one, _ = models
    monkeypatch.setattr("maskwright.updates.Merging.tensor", None)  # a merge that began would end otherwise
    out, text = tmp_path / "out", tmp_path / "text"
    words = ("merge", "--base", base, "--model", one, out, *dry, "--evaluate")
    refused(f"{tmp_path / 'none'}: no such file", *words, tmp_path / "none")
    text.write_bytes(b"\xff\xfe")
    refused("text: not UTF-8 text", *words, text)
    text.write_text("three short words")
    refused("but 10 windows of 512 need 5120", *words, text)
    refused("windows of 4096 tokens are beyond the model's 2048 positions", *words, "topics", "--length", 4096)
    for bare in ((base, one / "model.safetensors"), (base / "model.safetensors", one)):
        told = ("merge", "--base", bare[0], "--model", bare[1], out, *dry, "--evaluate", "topics")
        refused("model.safetensors: only a model folder with a config can be scored", *told)
    for name, change in (("mute", {"architectures": ["LlamaModel"]}), ("odd", {"architectures": None})):
        folder = tuned(base, tmp_path / name, 5)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        told = ("merge", "--base", base, "--model", folder, out, *dry, "--evaluate", "topics")
        refused(f"{folder}: --evaluate measures perplexity, which needs a language model", *told)
    (folder / "config.json").write_text("{}")
    refused(f"{folder}: cannot be read", *told)
    dumb = tuned(base, tmp_path / "dumb", 5)
    for path in dumb.glob("tokenizer*"):
        path.unlink()
    refused(f"{dumb}: --evaluate measures", "merge", "--base", base, "--model", dumb, out, *dry, "--evaluate", "topics")
    assert not list(tmp_path.glob("out*"))


def test_a_merge_whose_score_fails_is_kept_by_resume(models, tmp_path, monkeypatch):
    base, one, _ = models
    words = ("merge", "--base", base, "--model", one, tmp_path / "out")

    def load(source):
        if source.name == "merged":
            raise BadInput("not finite")
        return really_load(source)

    monkeypatch.setattr("maskwright.cli.merge_scores.load", load)
    told = ("--evaluate", "topics", "--windows", 2, "--length", 32)
    refused("merged: not finite; --resume without --evaluate keeps the merge", *words, *told)
    assert "resuming after" in good(*words, "--resume")
    assert torch.equal(states(tmp_path / "out")[0]["model.norm.weight"], states(one)[0]["model.norm.weight"])


def test_tokenizers_that_share_no_file_are_refused(models, tmp_path):
    base, *_ = models
    out, other, plain = tmp_path / "out", tuned(base, tmp_path / "other", 5), tuned(base, tmp_path / "plain", 5)
    for folder in (other, plain):
        (folder / "tokenizer.json").unlink()
    (other / "vocab.json").write_text('{"a": 0}')
    says = (
        f"{other} has vocab.json, the base {base} has tokenizer.json: whether their tokens agree cannot be told; --any-tok"
    )
    refused(says, "merge", "--base", base, "--model", other, out)
    refused("has tokenizer.json, the base", "merge", "--base", other, "--model", base, out)
    good("merge", "--base", base, "--model", other, "--any-tokenizer", out)
    good("merge", "--base", base, "--model", plain, tmp_path / "plain base")  # it has none: nothing to compare
    (other / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    good("merge", "--base", base, "--model", other, tmp_path / "shared")  # one file that both have is enough
    (other / "vocab.txt").write_text("a")
    vocabulary = shutil.copytree(other, tmp_path / "vocabulary")
    (vocabulary / "vocab.txt").write_text("b")
    refused("its vocab.txt differs from the base's", "merge", "--base", vocabulary, "--model", other, tmp_path / "not")


def test_merges_in_the_old_and_the_new_form_are_the_same(models, tmp_path):
    base, *_ = models
    old, new = (shutil.copytree(base, tmp_path / name) for name in ("old", "new"))
    for folder, merges in ((old, ["a b", "c d"]), (new, [["a", "b"], ["c", "d"]])):
        told = json.loads((folder / "tokenizer.json").read_text())
        told["model"]["merges"] = merges
        (folder / "tokenizer.json").write_text(json.dumps(told))
    good("merge", "--base", old, "--model", new, tmp_path / "out")
    told["model"]["merges"] = [["a", "b"], ["d", "c"]]
    (new / "tokenizer.json").write_text(json.dumps(told))
    refused("its tokenizer.json differs from the base's", "merge", "--base", old, "--model", new, tmp_path / "not")
