"""`maskwright attend`: what it measures, prints, refuses and leaves behind, on a small Llama."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import good, run
from tiny import tiny_llama

from maskwright.cli.attend_job import Job, Request
from maskwright.cli.attended import Way, counted, needles, prefill, prose, stored_bytes
from maskwright.core.errors import BadInput
from maskwright.core.method import get
from maskwright.lab.ask import retrieved
from maskwright.lab.haystack import Haystack
from maskwright.lab.text import topics_split
from maskwright.models.evaluate import loss
from maskwright.models.load import find, load
from maskwright.report.attention import read, render

SMALL = ("--length", 160, "--questions", 3, "--contexts", 2, "--windows", 2, "--decoded", 5)
WINDOW = ("--method", "sliding_window", "--set", "window=16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama whose tokenizer knows line breaks and digits, as real ones do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", torch.float32, max_position_embeddings=256)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[0-9]|[^\W0-9]+|[^\w\s]"), "isolated")
    words.train_from_iterator(
        [topics_split()[0], "0123456789"], trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    return load(find(str(model)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(topics_split()[1][:20000])
    return path


def refused(says, *args):
    result = run(*args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)
    assert "\n" not in str(result.exception)


def test_report_table_and_twin(model, text, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "out"
    said = good("attend", model, *WINDOW, "--text", text, *SMALL, "--out", out)
    assert "dense" in said and "sliding_window:" in said and str(out) in said
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    told = json.loads((out / "report.json").read_text())
    (method,) = told["methods"]
    assert method["settings"] == {"sink": 4, "window": 16} and told["seed"] == 0 and told["machine"]["threads"] >= 1
    prefilled = told["prefilled"]
    rows = torch.arange(prefilled)
    kept = int((rows + 1).clamp(max=16).sum() + (rows - 15).clamp(0, 4).sum())
    assert method["pairs"]["kept"] == kept * 16 and method["pairs"]["causal"] == prefilled * (prefilled + 1) // 2 * 16
    assert method["pairs"]["kept"] <= method["pairs"]["computed"] <= 64 * 64 * 9 * 16
    assert len(method["pictures"]) == 16 and method["what"] == "prefill"
    assert method["stored"] == told["dense"]["stored"] == prefilled * 2 * 2 * 8 * 4 * 4
    assert method["retrieval"]["of"] == 6 and method["verdict"]["text"]
    page = (out / "report.html").read_text()
    assert page == render(read(out)) and method["verdict"]["text"].split(",")[0] in page.replace("&#39;", "'")
    assert "http-equiv" in page and not re.search(r'(src|href)="(?!data:|https://arxiv)', page)


def test_json_dry_run_and_replace(model, tmp_path):
    out = tmp_path / "out"
    plan = json.loads(good("attend", model, *WINDOW, *SMALL, "--out", out, "--dry-run", "--json").splitlines()[-1])
    assert not out.exists() and plan["prefills"] == 2 * 4 + 1 and plan["methods"][0]["settings"]["window"] == 16
    told = json.loads(good("attend", model, *WINDOW, *SMALL, "--out", out, "--json").splitlines()[-1])
    assert told["length"] == plan["length"] == 160 and told["prefilled"] == plan["prefilled"]
    refused("--replace", "attend", model, *WINDOW, *SMALL, "--out", out)
    good("attend", model, *WINDOW, *SMALL, "--out", out, "--replace", "--contexts", 0)
    again = json.loads((out / "report.json").read_text())
    assert again["contexts"] == 0 and "retrieval" not in again["methods"][0] and again["prefilled"] == 155
    (out / "report.json").write_text('{"format": "maskwright.report"}')
    refused("holds something else", "attend", model, *WINDOW, *SMALL, "--out", out, "--replace")
    refused("holds something else", "attend", model, *WINDOW, *SMALL, "--out", model, "--replace")


def test_bad_input_is_refused_before_any_work(model, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few\nwords\n")
    out = ("--out", tmp_path / "x")
    refused("known: ", "attend", model, "--method", "nothing", *out)
    refused("sliding_window", "attend", model, "--method", "nothing", *out)
    refused("of the place weights", "attend", model, "--method", "wanda", *out)
    refused("no setting 'size'", "attend", model, "--method", "sliding_window", "--set", "size=3", *out)
    refused("window", "attend", model, "--method", "sliding_window", "--set", "window=many", *out)
    refused("window >= 1", "attend", model, "--method", "sliding_window", "--set", "window=0", *out)
    refused("not among the methods", "attend", model, "--method", "sliding_window", "--set", "quest.page=3", *out)
    refused("beyond the 256 positions", "attend", model, *WINDOW, "--length", 512, *out)
    refused("tokens", "attend", model, *WINDOW, *SMALL, "--text", short, *out)
    refused("no such file", "attend", model, *WINDOW, *SMALL, "--text", tmp_path / "none", *out)
    refused("500 windows", "attend", model, *WINDOW, *SMALL, "--windows", 500, "--text", text, *out)
    refused("unknown implementation", "attend", model, *WINDOW, *SMALL, "--impl", "fast", *out)
    refused("neither", "attend", tmp_path / "none", *WINDOW, *SMALL, *out)
    refused("masks bidirectional attention", "attend", model, "--method", "sparsed", *SMALL, *out)
    assert not (tmp_path / "x").exists()
    for usage in (("--method", ","), ("--dtype", "int8", *WINDOW), (*WINDOW, "--contexts", 0, "--windows", 0)):
        assert run("attend", model, *usage, *out).exit_code == 2
    done = subprocess.run(
        [sys.executable, "-m", "maskwright.cli.main", "attend", str(model), "--method", "nothing"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and done.stderr.startswith("maskwright: unknown method")


def test_a_stopped_run_leaves_nothing(model, text, tmp_path):
    # A shell's background jobs ignore SIGINT and their children inherit that: tests started with `&` would wait in vain.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heeding += "runpy.run_module('maskwright.cli.main', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", heeding, "attend", str(model), *WINDOW, "--out", str(tmp_path / "x")]
    command += ["--text", str(text)]
    command += ["--length", "160", "--questions", "3", "--contexts", "2", "--windows", "40", "--decoded", "5"]
    going = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert going.stderr is not None
    for line in going.stderr:
        if line.startswith("needles 1/"):
            os.kill(going.pid, signal.SIGINT)
            break
    rest = going.stderr.read()
    going.stderr.close()
    assert going.wait() == 130 and "nothing was written" in rest and not list(tmp_path.iterdir())


def hay_of(model, tokenizer, seed=0):
    job = Job(Request("x", ("sliding_window",), length=160, questions=4, contexts=1, decoded=5), None, dry_run=True)
    job.tokenizer, job.text = tokenizer, topics_split()[1]
    return job._hay(120, seed)


@pytest.mark.parametrize("stepwise", [False, True])
def test_answers_are_counted_as_greedy_decoding_gives_them(loaded, stepwise):
    net, tokenizer = loaded
    hay = hay_of(net, tokenizer)
    answers = []
    for i, question in enumerate(hay.questions):
        ids = torch.cat([hay.context, question[None]], 1)
        out = net.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)[0, -3:]
        answers.append(out if i % 2 else torch.tensor([*out[:2], (out[2] + 1) % 300]))
    right = Haystack(hay.context, hay.questions, tuple(answers), hay.spans)
    told = needles(net, Way("dense"), right, stepwise)
    assert told["right"] == [False, True, False, True] and told["right"] == retrieved(net, right).tolist()
    assert len(told["first"]) == 4 and min(told["first"]) > 0
    wide = Way("wide", get("sliding_window")(window=256))
    assert needles(net, wide, right, stepwise)["right"] == told["right"]


def test_losses_are_the_models_own_and_a_window_that_holds_all_changes_nothing(loaded, text):
    net, tokenizer = loaded
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[None, :150]
    whole = prose(net, Way("dense"), ids, 10)
    assert whole["loss"] == pytest.approx(loss(net, [ids[:, :-10]]).mean, rel=1e-5)
    logits = net(ids).logits[0, -11:-1].detach()
    assert whole["tail_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[0, -10:])), rel=1e-5)
    assert len(whole["steps"]) == 9
    same = prose(net, Way("wide", get("sliding_window")(window=256)), ids, 10)
    assert same["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert same["tail_loss"] == pytest.approx(whole["tail_loss"], rel=1e-5)
    narrow = prose(net, Way("narrow", get("sliding_window")(window=2, sink=0)), ids, 10)
    assert abs(narrow["loss"] - whole["loss"]) > 1e-6 and narrow["stored"] == whole["stored"]
    assert not net.config._attn_implementation.startswith("maskwright")


def test_a_model_that_scales_its_logits_takes_the_plain_forward(loaded, text, monkeypatch):
    net, tokenizer = loaded
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[None, :60]
    dense = prose(net, Way("dense"), ids, 4)
    monkeypatch.setattr("maskwright.cli.attended._body", lambda model: None)
    assert prose(net, Way("dense"), ids, 4)["loss"] == pytest.approx(dense["loss"], rel=1e-5)


def test_counts_and_pictures_of_every_lifetime(loaded, text):
    net, tokenizer = loaded
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[None, :205]
    window = counted(net, Way("w", get("sliding_window")(window=16, sink=4)), ids, 5)
    assert window.what == "prefill" and sorted(window.pictures) == [0, 1, 2, 3]
    assert window.dense_read == 4 * 2 * 2 * 8 * 4 * (200 + 2.5) and 0 < window.read < window.dense_read
    quest = counted(net, Way("q", get("quest")(token_budget=32)), ids, 5)
    assert quest.what == "decode" and quest.kept == quest.causal and quest.read < quest.dense_read
    assert quest.pictures[0].shape[:2] == (4, 4)
    with Way("s", made := get("snapkv")(capacity=40, window=8, local=8)).on(net):
        cache, _, _ = prefill(net, ids)
        assert stored_bytes(cache) == 4 * 2 * 2 * 8 * 4 * 40
    snap = counted(net, Way("s", made), ids, 5)
    assert snap.what == "cache" and all(keep.sum(1).tolist() == [40, 40] for keep in snap.pictures.values())
    assert snap.read == pytest.approx(4 * 2 * 2 * 8 * 4 * 42.5) and snap.dense_read == window.dense_read


def test_several_methods_share_one_dense_run(model, tmp_path):
    began = time.perf_counter()
    sets = [x for s in ("window=16", "quest.token_budget=32", "snapkv.capacity=40", "local=8") for x in ("--set", s)]
    said = good("attend", model, "--method", "sliding-window,quest,snapkv", *SMALL, "--out", tmp_path / "x", *sets)
    told = json.loads((tmp_path / "x" / "report.json").read_text())
    assert [m["slug"] for m in told["methods"]] == ["sliding_window", "quest", "snapkv"]
    assert [m["settings"]["window"] for m in (told["methods"][0], told["methods"][2])] == [16, 16]
    assert [m["what"] for m in told["methods"]] == ["prefill", "decode", "cache"]
    assert told["methods"][2]["stored"] < told["dense"]["stored"] and said.count("gain") + said.count("Gain") >= 3
    assert time.perf_counter() - began < 60


def test_a_plan_is_made_saved_shown_and_attended_with(model, tmp_path):
    out = tmp_path / "plans" / "plan.json"
    small = ("--method", "moa", "--lengths", "96,160", "--samples", 2, "--answer", 3, "--set", "block=8", "--set", "step=32",
             "--set", "points=2", "--out", out)  # fmt: skip
    assert "nothing was written" in good("plan", model, *small, "--dry-run") and not out.exists()
    said = good("plan", model, *small)
    assert "affine" in said and "mean density" in said and "--set plan=" in said
    plan = json.loads(out.read_text())
    assert (
        plan["method"] == "moa" and plan["model"] == {"layers": 4, "heads": 4, "kv_heads": 2} and plan["grid"]["block"] == 8
    )
    assert all(0.45 <= round(share, 9) <= 0.5 for share in plan["table"]["densities"])
    refused("--replace", "plan", model, *small)
    told = json.loads(good("plan", model, *small, "--replace", "--json").splitlines()[-1])
    assert {k: told[k] for k in plan if k != "table"} == {k: plan[k] for k in plan if k != "table"}
    run_out = tmp_path / "x"
    good("attend", model, "--method", "moa", "--set", f"plan={out}", *SMALL, "--out", run_out)
    (moa,) = json.loads((run_out / "report.json").read_text())["methods"]
    assert moa["settings"]["heads"] == str(out) and moa["pairs"]["kept"] < moa["pairs"]["causal"]
    other = plan | {"model": {"layers": 3, "heads": 4, "kv_heads": 2}, "rules": plan["rules"][:3]}
    out.write_text(json.dumps(other))
    refused(
        "plan is for 3 layers", "attend", model, "--method", "moa", "--set", f"plan={out}", *SMALL, "--out", tmp_path / "y"
    )
    refused("not a plan of heads", "attend", model, "--method", "moa", "--set", "plan=none.json", "--out", tmp_path / "y")


def test_a_plan_is_refused_before_any_work(model, tmp_path):
    out = ("--out", tmp_path / "p.json")
    moa = ("--method", "moa", *out)
    refused("known: moa, sparse_vdit", "plan", model, "--method", "quest", *out)
    refused("density lies in", "plan", model, *moa, "--density", 1.5)
    refused("must rise", "plan", model, *moa, "--lengths", "128,64")
    refused("whole numbers", "plan", model, *moa, "--lengths", "128,x")
    refused("beyond the 256 positions", "plan", model, *moa)
    refused("no setting 'blocks'", "plan", model, *moa, "--set", "blocks=3")
    refused("block=", "plan", model, *moa, "--set", "block=x")
    refused("lab:video_denoiser", "plan", model, "--method", "sparse_vdit", *out)
    refused("takes no --density", "plan", "lab:video_denoiser", "--method", "sparse_vdit", "--density", 0.5, *out)
    refused("is a folder", "plan", model, "--method", "moa", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def untrained(net, seed, steps, progress):
    return {}


def test_a_video_model_is_planned(tmp_path, monkeypatch):
    from maskwright.lab import video

    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "cache"))
    recipe = dataclasses.replace(video.RECIPES["video_denoiser"], fit=untrained)
    monkeypatch.setattr(video, "RECIPES", {"video_denoiser": recipe})
    out = tmp_path / "plan.json"
    said = good("plan", "lab:video_denoiser", "--method", "sparse-vdit", "--samples", 1, "--out", out)
    plan = json.loads(out.read_text())
    assert plan["method"] == "sparse_vdit" and plan["model"] == {"layers": 4, "heads": 8, "kv_heads": 8}
    names = {rule["name"] for layer in plan["rules"] for rule in layer}
    assert names <= {"full", "diagonal", "multi", "stripe", "skip"} and any(name in said for name in names)


def test_a_page_is_drawn_again_and_escapes_what_strangers_wrote(model, tmp_path):
    out = tmp_path / "x"
    good("attend", model, *WINDOW, *SMALL, "--contexts", 0, "--out", out)
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert str(out) in good("report", out) and (out / "report.html").read_text() == page
    told = json.loads((out / "report.json").read_text())
    bad = "<script>alert(1)</script>"
    told["model"]["name"] = told["notes"] = told["command"] = bad
    told["notes"] = [bad]
    for key in ("slug", "title", "why", "impl"):
        told["methods"][0][key] = bad
    told["methods"][0]["settings"] = {bad: bad}
    (out / "report.json").write_text(json.dumps(told))
    good("report", out)
    assert "<script" not in (out / "report.html").read_text()
    del told["dense"]["stored"]
    (out / "report.json").write_text(json.dumps(told))
    refused("dense.stored", "report", out)
