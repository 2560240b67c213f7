"""Seeds of a check side by side: the same figures as one after the other, and nothing left running after a failure."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.core.method import card
from maskwright.lab import measure, record
from maskwright.lab.parallel import seeds_apart

ROOM = "dmjd"


def test_side_by_side_gives_the_same_figures_and_resumes(tmp_path):
    room = card(ROOM)
    claim = measure.load_claim(room)
    alone = measure.run(room, claim, "smoke", seeds=[3, 4])
    said: list[str] = []
    both = measure.run(room, claim, "smoke", seeds=[3, 4], store=tmp_path, jobs=2, progress=said.append)
    assert both.figures == alone.figures
    assert list(both.figures["dmjd"]) == [3, 4]
    assert both.effects == alone.effects
    assert both.twin == alone.twin
    assert len(said) == 2 * len(claim.arms)
    assert said[-1].startswith(f"{ROOM}: {len(said)}/{len(said)} ")
    told = both.as_dict()
    assert (told["jobs"], alone.as_dict()["jobs"]) == (2, 1)
    assert told["elapsed"] > 0
    assert told["machine"]["threads"] == max(1, torch.get_num_threads() // 2)
    again = measure.run(room, claim, "smoke", seeds=[3, 4], store=tmp_path)
    assert again.figures == alone.figures
    assert again.elapsed is None  # nothing of it was run now: the clock would tell too little
    assert again.seconds == both.seconds


def test_a_failure_in_a_process_ends_the_check_and_the_others(tmp_path):
    room = card("mae")  # a baseline: no claim to load, which is seen in the process only
    before = multiprocessing.active_children()
    with pytest.raises(LookupError, match="mae has no claim"):
        seeds_apart(room, (0, 1, 2), "smoke", tmp_path, 2, lambda line: None)
    assert multiprocessing.active_children() == before


def test_a_process_that_the_system_ends_is_one_line(tmp_path):
    before = multiprocessing.active_children()

    def kill(line: str) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(BadInput, match="^dmjd: the system ended one of 2 processes, often for want of memory: try"):
        seeds_apart(card(ROOM), (3, 4), "smoke", tmp_path, 2, kill)
    assert multiprocessing.active_children() == before


def test_one_seed_takes_no_process_and_no_jobs_are_refused():
    room = card(ROOM)
    claim = measure.load_claim(room)
    assert measure.run(room, claim, "smoke", seeds=[3], jobs=2).jobs == 1
    with pytest.raises(ValueError, match="jobs must be at least 1, not 0"):
        measure.run(room, claim, "smoke", jobs=0)


def test_each_process_takes_its_share_of_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert [record.threads(jobs) for jobs in (1, 2, 5, 9)] == [5, 2, 1, 1]
