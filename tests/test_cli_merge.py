"""`maskwright merge` on real folders: streamed, resumed after a kill to the bit, mergekit's recipes, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import good, run
from safetensors.torch import load_file, save_file
from tuned import refused, same, states, three, tuned

from maskwright.models.streams import FileTensors
from maskwright.updates import merge
from maskwright.updates.breadcrumbs import Breadcrumbs
from maskwright.updates.dare import Dare
from maskwright.updates.task_arithmetic import TaskArithmetic
from maskwright.updates.ties import Ties

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return three(tmp_path_factory.mktemp("merge"))


METHODS = {
    "task_arithmetic": (("--scale", 0.4), TaskArithmetic(0.4)),
    "ties": (("--density", 0.3), Ties(density=0.3)),
    "dare": (("--density", 0.3, "--seed", 3), Dare(density=0.3)),
    "breadcrumbs": (("--density", 0.3, "--drop-top", 0.1, "--group", "global"), Breadcrumbs(0.3, 0.3, 0.1, "global")),
    "breadcrumbs_ties": (("--density", 0.3), Breadcrumbs(0.3, 0.3, elect=True)),
}


@pytest.mark.parametrize("name", METHODS)
def test_files_are_what_state_dicts_give_and_inputs_stay(models, tmp_path, name):
    base, one, two = models
    before = {path: path.read_bytes() for folder in models for path in folder.iterdir()}
    words, method = METHODS[name]
    good("merge", "--base", base, "--model", one, "--model", two, "--method", name, *words, "--stats", tmp_path / "out")
    mine, *theirs = states(base, one, two)
    want = merge(mine, theirs, method, seed=3 if name == "dare" else 0)
    assert same(states(tmp_path / "out")[0], want.state)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = [sum(r.kept[i] for r in want.report.values()) for i in range(2)]
    assert [each["kept"] for each in told["models"]] == kept and told["parameters"] == sum(v.numel() for v in mine.values())
    assert all(path.read_bytes() == data for path, data in before.items())
    assert not list(tmp_path.glob("*.partial*"))


def test_the_folder_loads_with_transformers_and_has_its_card(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, one, two = models
    good("merge", "--base", two, "--model", one, "--method", "task_arithmetic", "--dtype", "float32", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"]
    close = states(tmp_path / "out")[0]
    assert all(torch.allclose(close[n], v.float(), atol=1e-6) for n, v in states(one)[0].items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "task_arithmetic" in card and str(one) in card and "## How it was made" in card
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = sum(v.numel() * 4 for v in close.values())
    assert index["metadata"]["total_size"] == size and set(index["weight_map"]) == set(close)


def test_mergekits_recipe(models, tmp_path):
    base, one, two = models
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n  - model: {base}\n  - model: {one}\n"
        f"    parameters: {{weight: 0.5, density: 0.4}}\n  - model: {two}\n    parameters: {{weight: 0.25}}\n"
        "parameters: {density: 0.2, normalize: false, int8_mask: true, lambda: 0.9}\ndtype: bfloat16\n"
        "tokenizer_source: base\n"
    )
    good("merge", recipe, tmp_path / "out")
    mine, *theirs = states(base, one, two)
    method = [Ties(0.9, density, normalise=False) for density in (0.4, 0.2)]
    assert same(states(tmp_path / "out")[0], merge(mine, theirs, method, weights=[0.5, 0.25]).state)
    text = recipe.read_text()
    for change, says in (
        (text.replace("lambda: 0.9", "lambda: [0, 1]"), "lambda: a list"),
        (text.replace("ties", "slerp"), "'slerp' is no merging method; known: breadcrumbs, dare"),
        (text + "slices: []\n", "slices is not read here"),
        (text.replace("source: base", "source: union"), "tokenizer_source 'union'"),
        (text.replace("weight: 0.25", "epsilon: 0.25"), "'epsilon' is not known here"),
        (text.replace("weight: 0.25", "density: 0.25"), f"{two} has no weight"),
        ("- 1\n", "a recipe is a mapping"),
        ("a: [\n", "not a YAML recipe"),
    ):
        recipe.write_text(change)
        refused(says, "merge", recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    refused("no such file", "merge", tmp_path / "none.yaml", tmp_path / "other")
    recipe.write_text(
        f"merge_method: breadcrumbs\nbase_model: {base}\nmodels:\n  - model: {one}\n    parameters: {{weight: 1.0}}\n"
    )
    good("merge", recipe, tmp_path / "all")  # mergekit's defaults: density 1, and gamma gives way
    assert same(states(tmp_path / "all")[0], merge(mine, theirs[:1], TaskArithmetic()).state)


def test_our_own_recipe_and_the_command_line_over_it(models, tmp_path):
    base, one, two = models
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"method: breadcrumbs\nbase: {base}\nmodels:\n- {{model: {one}, weight: 0.5}}\n"
        f"- {{model: {two}, settings: {{density: 0.3}}}}\n"
        "settings: {density: 0.2, drop_top: 0.0}\n"
    )
    good("merge", recipe, tmp_path / "out", "--scale", 0.7)
    mine, *theirs = states(base, one, two)
    method = [Breadcrumbs(0.7, density, 0.0) for density in (0.2, 0.3)]
    assert same(states(tmp_path / "out")[0], merge(mine, theirs, method, weights=[0.5, 1.0]).state)
    recipe.write_text("metod: ties\n")
    refused("metod: Extra inputs are not permitted; known: method, base", "merge", recipe, tmp_path / "x")


def test_dry_run_says_and_writes_nothing(models, tmp_path):
    base, one, two = models
    told = json.loads(good("merge", "--base", base, "--model", one, "--model", two, "--dry-run", "--json").splitlines()[-1])
    size = sum(path.stat().st_size for folder in models for path in folder.glob("*.safetensors"))
    assert told["read"] == size and told["seconds"] > 0 and told["memory"] > 0 and not list(tmp_path.iterdir())
    good("merge", "--base", base, "--model", one, tmp_path / "out")
    assert told["written"] == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("group", ["tensor", "global"])
def test_killed_at_any_tensor_it_resumes_to_the_same_bits(models, tmp_path, group):
    base, one, two = models
    words = [
        "merge",
        "--base",
        base,
        "--model",
        one,
        "--model",
        two,
        "--method",
        "ties",
        "--density",
        "0.3",
        "--group",
        group,
    ]
    good(*words, tmp_path / "whole")
    want = (tmp_path / "whole" / "model.safetensors").read_bytes()
    code = (
        "import os, signal, sys\nafter = int(sys.argv.pop(1))\nfrom maskwright.models import streams\n"
        "old = streams.Folder.whole\n"
        "def whole(self, name):\n    if len(self.done) == after: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    old(self, name)\nstreams.Folder.whole = whole\n"
        "from maskwright.cli.main import main\nmain()\n"
    )
    out = tmp_path / "out"
    for after in (0, 17) if group == "tensor" else (17,):
        done = subprocess.run([sys.executable, "-c", code, str(after), *map(str, words), "--resume", str(out)], check=False)
        assert done.returncode == -signal.SIGKILL and not out.exists() and (tmp_path / "out.partial").is_dir()
    refused("holds an unfinished run; --resume goes on", *words, out)
    refused("the unfinished run has another seed", *words, out, "--resume", "--seed", 9)
    assert "resuming after 17 tensors" in good(*words, out, "--resume")
    assert (out / "model.safetensors").read_bytes() == want and not (tmp_path / "out.partial").exists()
    assert not (out / "done.jsonl").exists() and not (out / "plan.json").exists()


def test_killed_in_the_middle_of_a_write(models, tmp_path):
    base, one, two = models
    words = ["merge", "--base", base, "--model", one, "--model", two, "--method", "dare", "--density", "0.3"]
    good(*words, tmp_path / "whole")
    command = [sys.executable, "-m", "maskwright.cli.main", *map(str, words), "--resume", str(tmp_path / "out")]
    for wait in (1.6, 1.9, 2.2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            break
    if not (tmp_path / "out").exists():
        good(*words, "--resume", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_inputs_that_changed_are_not_resumed(models, tmp_path):
    base, *_ = models
    again = tuned(base, tmp_path / "again", 1)
    out = tmp_path / "out"
    words = ("merge", "--base", base, "--model", again, out)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json").write_text(json.dumps({"inputs": {}}))
    refused("the unfinished run has another", *words, "--resume")
    good(*words, "--replace")
    refused(f"{out} exists; --replace overwrites it", *words)


def test_what_does_not_fit_is_refused_by_name(models, tmp_path):
    base, one, _two = models
    out = tmp_path / "out"

    def other(name, change):
        folder = tuned(base, tmp_path / name, 5)
        change(folder)
        return folder

    def weights(change):
        def apply(folder):
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file(state, folder / "model.safetensors")

        return apply

    norm = "model.norm.weight"
    wide = other("wide", weights(lambda s: s.__setitem__(norm, torch.ones(48).bfloat16())))
    refused(f"{norm} has shape (48,), in the base (32,)", "merge", "--base", base, "--model", wide, out)
    less = other("less", weights(lambda s: s.pop(norm)))
    refused(f"lacks {norm}", "merge", "--base", base, "--model", less, out)
    more = other("more", weights(lambda s: s.__setitem__("score.weight", torch.ones(2))))
    refused("adds score.weight", "merge", "--base", base, "--model", more, out)
    good("merge", "--base", base, "--model", more, "--base-only", "score.*", "--base-only", norm, tmp_path / "some")
    assert torch.equal(states(tmp_path / "some")[0][norm], states(base)[0][norm])
    broken = other("broken", weights(lambda s: s[norm].__setitem__(3, float("nan"))))
    refused(f"{norm}: 1 deltas are NaN or infinite", "merge", "--base", base, "--model", broken, "--method", "ties", out)

    def words(folder):
        told = json.loads((folder / "tokenizer.json").read_text())
        first, second = list(told["model"]["vocab"])[-2:]
        vocab = told["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (folder / "tokenizer.json").write_text(json.dumps(told))

    spoken = other("spoken", words)
    refused("its tokenizer.json differs from the base's", "merge", "--base", base, "--model", spoken, out)
    good("merge", "--base", base, "--model", spoken, "--any-tokenizer", tmp_path / "any")

    def pickle(folder):
        torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    pickled = other("pickled", pickle)
    refused(
        "a pickled checkpoint, which can run code when it is read; convert it",
        "merge",
        "--base",
        base,
        "--model",
        pickled,
        out,
    )
    refused("needs the base that the models were tuned from", "merge", "--model", one, out)
    refused("give at least one --model", "merge", "--base", base, out)
    refused("1 models but 2 values of --weight", "merge", "--base", base, "--model", one, "--weight", 1, "--weight", 2, out)
    refused("must be >= 0 and not all 0", "merge", "--base", base, "--model", one, "--method", "ties", "--weight", 0, out)
    refused("neither `default`, a model folder", "merge", "--base", tmp_path / "nowhere.safetensors", "--model", one, out)
    refused("dtype 'int8' cannot be written", "merge", "--base", base, "--model", one, "--dtype", "int8", out)
    refused(
        "ties has no setting 'drop_top'", "merge", "--base", base, "--model", one, "--method", "ties", "--drop-top", 0.1, out
    )
    refused("lies in", "merge", "--base", base, "--model", one, base / "out")
    assert run("merge", "--base", base, "--model", one).exit_code == 2
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused("a PEFT adapter", "merge", "--base", base, "--model", tmp_path / "adapter", out)
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_scores_of_inputs_and_merge(models, tmp_path):
    base, one, _ = models
    words = ("--evaluate", "topics", "--windows", 2, "--length", 32, "--json")
    told = json.loads(good("merge", "--base", base, "--model", one, *words, tmp_path / "out").splitlines()[-1])
    assert [each["model"] for each in told["quality"]] == ["base", str(one), "merged"]
    values = [each["value"] for each in told["quality"]]
    assert values[2] == pytest.approx(values[1], rel=0.02) and values[0] != values[1]
    assert "perplexity" in (tmp_path / "out" / "README.md").read_text()


def test_a_file_alone_is_a_model_too(models, tmp_path):
    base, one, _ = models
    good("merge", "--base", base / "model.safetensors", "--model", one / "model.safetensors", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors", "report.json"]
    files = FileTensors(tmp_path / "out")
    assert torch.equal(files.read("model.norm.weight", 3, 9), states(tmp_path / "out")[0]["model.norm.weight"][3:9])
    files.close()
