"""The main job on a tiny real-format model: output, exactness, resume after SIGKILL, error paths, exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from maskwright.cli import recipe as recipes
from maskwright.cli.job import Job
from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def small(model, out, **more):
    return {"model": str(model), "out": str(out), "samples": 6, "length": 32, "windows": 4, "sample_tokens": 4, **more}


def opened(model, out, **more):
    job = Job(recipes.make(small(model, out, **more)), lambda text: None)
    job.open()
    return job


def prune(model, out, **more):
    return opened(model, out, **more).run(lambda *progress: None)


def digest(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt", "dsnot", "random", "owl", "essential_sparsity"])
def test_every_method_writes_a_folder_that_plain_transformers_loads(model, tmp_path, method):
    from transformers import AutoModelForCausalLM

    before = digest(model)
    job = opened(model, tmp_path / "out", method=method, density=0.5)
    report = job.run(lambda *progress: None)
    assert job.plan.kept == report["kept"] and digest(model) == before
    masks = MaskSet.load(tmp_path / "out" / "masks.safetensors")
    assert report["kept"] == masks.count == masks.total // 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert report["model"]["parameters"] == loaded.num_parameters()
    layers = report["speed"]["layers"]  # one a kind and form; random weights at density 0.5 are sparse enough for all
    assert sum(layer["number"] for layer in layers) == len(masks) and all(layer["verdict"] for layer in layers)
    for name, mask in masks.items():
        assert (loaded.get_parameter(name)[~mask.keep] == 0).all()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "masks.safetensors", "report.html", "report.json"} <= names
    assert not list(tmp_path.glob("*.partial"))
    assert report["quality"]["before"]["value"] > 1 and len(report["sites"]) == 28


def test_killed_and_resumed_gives_the_same_bits(model, tmp_path):
    keys = {"method": "sparsegpt", "pattern": "2:4"}
    prune(model, tmp_path / "whole", **keys)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(small(model, tmp_path / "cut", **keys)))
    command = [sys.executable, "-m", "maskwright.cli.main", "prune", "--recipe", str(recipe)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith("block 2/"):
            os.kill(run.pid, signal.SIGKILL)
            break
    run.stderr.close()
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "cut").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 3 and "--resume" in again.stderr
    threads = 1 if torch.get_num_threads() > 1 else 2
    other = subprocess.run([*command, "--resume", "--threads", str(threads)], capture_output=True, text=True, check=False)
    assert other.returncode == 3 and "--any-machine" in other.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def forked(folder, kill_at, job):
    """Run `job` in a child that SIGKILLs itself at its `kill_at`-th file operation inside `folder`: (status, operations)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # a forked OpenMP pool would hang
            count = 0

            def hook(event, args):
                nonlocal count
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            job()
            os.write(write, str(count).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as pipe:
        return status, int(pipe.read() or 0)


@pytest.mark.parametrize("keys", [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "owl", "density": 0.5}], ids=str)
def test_killed_at_any_file_operation_and_resumed_gives_the_same_bits(model, tmp_path, keys):
    # The state on disk changes at file operations alone, so a kill at each kind of them stands for any moment.
    status, total = forked(tmp_path, 0, lambda: prune(model, tmp_path / "whole", **keys))
    assert status == 0 and total > 40
    whole = digest(tmp_path / "whole")
    for number, kill_at in enumerate(range(2, total + 1, max(1, total // 7))):
        out = tmp_path / f"cut{number}"
        status, _ = forked(out.name, kill_at, lambda out=out: prune(model, out, **keys))
        assert status == signal.SIGKILL
        assert not out.exists() or digest(out) == whole
        if not out.exists():
            status, _ = forked(tmp_path, 0, lambda out=out: prune(model, out, resume=True, **keys))
            assert status == 0 and digest(out) == whole and not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": "magic"}, "known: "),
        ({"method": "sr_ste"}, "training"),
        ({"pattern": "3-of-4"}, "known: unstructured"),
        ({"pattern": "2:4", "density": 0.3}, "contradicts"),
        ({"pattern": "2:7"}, "not divisible by 7"),
        ({"where": ["layers.9.*"]}, "matches no weight"),
        ({"settings": {"luck": 1}}, "has no setting"),
        ({"method": "dsnot", "settings": {"gamma": "high"}}, "dsnot: gamma: a number is needed, got 'high'"),
        ({"method": "dsnot", "settings": {"initial": "luck"}}, "initial: 'wanda' or .*got 'luck'"),
        ({"method": "dsnot", "settings": {"cycles": 1.5}}, "cycles: a whole number is needed, got 1.5"),
        ({"calibration": "/nowhere.txt"}, "no such file"),
        ({"samples": 10_000_000}, "tokens"),
        ({"rules": [{"where": "mlp"}, {"where": "layers.0.mlp"}]}, "shadowed"),
        ({"rules": [{"where": "convolution"}]}, "matches no site"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, more, said):
    with pytest.raises(BadInput, match=said) as error:
        prune(model, tmp_path / "out", **more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_unknown_model_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="neither"):
        prune("/nowhere/model", tmp_path / "out")


def test_text_that_is_not_utf8_existing_output_and_no_disk(model, tmp_path, monkeypatch):
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"caf\xe9 " * 4000)
    with pytest.raises(BadInput, match="not UTF-8"):
        prune(model, tmp_path / "out", calibration=str(odd))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="--replace"):
        prune(model, tmp_path / "out")
    monkeypatch.setattr("maskwright.cli.job.free_disk", lambda folder: 10)
    with pytest.raises(BadInput, match="MiB are free"):
        prune(model, tmp_path / "new")


def test_rules_and_settings_reach_the_method(model, tmp_path):
    rules = [{"where": "layers.*.mlp.*", "pattern": "2:4"}, {"where": "layers.0.*", "dense": True}]
    job = opened(model, tmp_path / "out", rules=rules, density=0.23)
    assert job.plan.kept == job.run(lambda *progress: None)["kept"]
    masks = MaskSet.load(tmp_path / "out" / "masks.safetensors")
    assert masks["model.layers.0.mlp.up_proj.weight"].pattern.spec() == "2:4"
    assert "model.layers.0.self_attn.q_proj.weight" not in masks
    assert masks["model.layers.1.self_attn.q_proj.weight"].count == 32 * round(0.23 * 32)
    made = recipes.build_method(
        recipes.make({"method": "dsnot", "settings": recipes.settings(["cycles=7", "stat=mean", "refine=[attn]"])})
    )
    assert (made.cycles, made.stat, made.refine) == (7, "mean", ("attn",))  # type: ignore[attr-defined]


def test_yaml_patterns_need_no_quotes(tmp_path):
    (tmp_path / "r.yaml").write_text("pattern: 2:4\ndensity: 0.5\nseed: 7\nrules: [{where: mlp, density: 1e-1}]\n")
    made = recipes.read(tmp_path / "r.yaml", {})
    assert (made.pattern, made.density, made.seed, made.rules[0].density) == ("2:4", 0.5, 7, 0.1)
    told = recipes.settings(["a=1:30", "b=.5", "c=-3", "d=1.", "e=x1", "f=+2e3", "g=true", "h=12a"])
    assert told == {"a": "1:30", "b": 0.5, "c": -3, "d": 1.0, "e": "x1", "f": 2000.0, "g": True, "h": "12a"}


def test_exit_codes_and_dry_run(model, tmp_path):
    def call(*args):
        full = [sys.executable, "-m", "maskwright.cli.main", *args]
        return subprocess.run(full, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})

    dry = call("prune", str(model), "--dry-run", "--json", "--samples", "4", "--length", "32", "--windows", "2")
    assert dry.returncode == 0 and json.loads(dry.stdout)["sites"] == 28
    bad = call("prune", str(model), "--method", "magic", "--out", str(tmp_path / "x"))
    assert bad.returncode == 3 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("maskwright: unknown method")
    assert call("prune", "--nonsense").returncode == 2


def test_a_sharded_folder_is_written_shard_by_shard_and_other_names_by_transformers(model, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "shards" / name).write_bytes((model / name).read_bytes())
    prune(tmp_path / "shards", tmp_path / "out", method="magnitude", density=0.5)
    files = sorted(p.name for p in (tmp_path / "out").glob("model*.safetensors"))
    assert len(files) > 1 and files == sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    masks = MaskSet.load(tmp_path / "out" / "masks.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in whole.named_parameters():
        want = torch.where(masks[name].keep, value, 0) if name in masks else value
        assert torch.equal(loaded.get_parameter(name), want.to(loaded.dtype))
    # A base model's file under another prefix does not name the sites: transformers writes it.
    prune(model, tmp_path / "plain", method="magnitude", density=0.5)
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    odd = tmp_path / "odd"
    whole.model.save_pretrained(odd)
    told = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**told, "architectures": ["LlamaForCausalLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (odd / name).write_bytes((model / name).read_bytes())
    prune(odd, tmp_path / "odd-out", method="magnitude", density=0.5)
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "odd-out").model.layers[0].mlp.up_proj.weight == 0).any()
