"""A merge that was stopped goes on to the same bits: every way of merging, torn journals, plans that cannot be read."""

import json
import time

import pytest
from commands import good, run
from tuned import refused, states, three

from maskwright.models import streams
from maskwright.models.streams import FileTensors, Folder
from maskwright.updates import Merging

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return three(tmp_path_factory.mktemp("merge"))


def stopped(after, *words):
    """Run a command until so many tensors in all are whole, then interrupt it."""
    whole = Folder.whole

    def stop(self, name):
        if len(self.done) == after:
            raise KeyboardInterrupt
        whole(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Folder, "whole", stop)
        result = run(*words)
    assert result.exit_code == 130 and "go on with --resume" in result.output, (result.output, result.exception)


def files(folder):
    """What must be the same to the bit: all but figures of the run itself."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("report.json", "README.md")}


WAYS = {
    "a base in shards": ("--method", "ties", "--density", 0.3),
    "breadcrumbs": ("--method", "breadcrumbs", "--density", 0.3, "--drop-top", 0.1),
    "global breadcrumbs": ("--method", "breadcrumbs", "--density", 0.3, "--drop-top", 0.1, "--group", "global"),
    "the paper's ties": ("--method", "ties", "--group", "global", "--set", "zero=majority"),
    "random masks": ("--method", "dare_ties", "--density", 0.3, "--seed", 3),
    "another dtype": ("--dtype", "float32"),
    "tensors of the base": ("--base-only", "*norm*", "--base-only", "*.q_proj.*", "--dtype", "float16"),
}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_anywhere_it_goes_on_to_the_same_bits(models, tmp_path, way):
    small, one, shards = models
    base, other = (shards, small) if way != "breadcrumbs" else (small, shards)
    words = ("merge", "--base", base, "--model", one, "--model", other, *WAYS[way])
    good(*words, tmp_path / "whole")
    want, number = files(tmp_path / "whole"), len(states(base)[0])
    for after in (0, 9, 20, number - 1):
        stopped(after, *words, tmp_path / "out", "--resume")
        assert not (tmp_path / "out").exists()
    assert f"resuming after {number - 1} tensors" in good(*words, tmp_path / "out", "--resume")
    assert files(tmp_path / "out") == want
    stopped(9, *words, tmp_path / "again")
    changed = (("dtype", ("--dtype", "bfloat16")), ("base_only", ("--base-only", "lm_head*", "--base-only", "model.embed*")))
    for key, word in changed:
        refused(f"the unfinished run has another {key}", *words, *word[-2:], tmp_path / "again", "--resume")


@pytest.mark.parametrize(
    "torn", ['"model.lay', '"', '"model.norm.weight"', "\x00\x00", '[1]\n{"a": 1}\n3\n"no such"\n"mod\n']
)
def test_a_torn_journal_is_mended_before_it_grows(models, tmp_path, torn):
    base, one, two = models
    words = ("merge", "--base", base, "--model", one, "--model", two, "--method", "ties")
    good(*words, tmp_path / "whole")
    journal, out = tmp_path / "out.partial" / "done.jsonl", tmp_path / "out"
    stopped(5, *words, out)
    with journal.open("a") as handle:
        handle.write(torn)
    stopped(8, *words, out, "--resume")
    names = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(names) == len(set(names)) == 8 and set(names) <= set(states(base)[0])
    stopped(12, *words, out, "--resume")
    assert "resuming after 12 tensors" in good(*words, out, "--resume")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("plan", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_plan_that_cannot_be_read_is_one_line(models, tmp_path, plan):
    base, one, _ = models
    words = ("merge", "--base", base, "--model", one, tmp_path / "out")
    stopped(5, *words)
    (tmp_path / "out.partial" / "plan.json").write_bytes(plan)
    refused("plan.json: not a JSON object, so the run cannot go on; --replace starts anew", *words, "--resume")
    good(*words, "--replace")
    assert sorted(files(tmp_path / "out")) == sorted(files(base)) and not (tmp_path / "out.partial").exists()


def test_a_folder_takes_up_only_what_it_knows(models, tmp_path):
    source = FileTensors(models[0])
    first = Folder(tmp_path / "out", source, {}, {"a": 1})
    first.begin(False, False)
    with first.opened():
        first.whole("model.norm.weight")
    (first.work / "done.new").write_text("left by a kill")
    again = Folder(tmp_path / "out", source, {}, {"a": 1})
    again.begin(True, False)
    with again.opened():
        assert again.done == {"model.norm.weight"}
    assert sorted(path.name for path in again.work.iterdir()) == ["done.jsonl", "model.safetensors", "plan.json"]
    source.close()


def test_an_interrupt_waits_for_the_threads_before_it_closes_the_files(models, tmp_path, monkeypatch):
    base, one, _ = models
    work, late = Merging.tensor, []

    def slow(self, name, place, *rest, **more):
        def checked(start, stop):
            time.sleep(0.02)
            try:
                return place(start, stop)
            except KeyError as error:  # the folder has no such file open any more
                late.append(error)
                raise

        return work(self, name, checked, *rest, **more)

    monkeypatch.setattr(Merging, "tensor", slow)
    stopped(2, "merge", "--base", base, "--model", one, "--threads", 2, tmp_path / "out")
    time.sleep(0.1)
    assert not late
