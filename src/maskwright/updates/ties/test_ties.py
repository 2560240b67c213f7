"""TIES on hand-written numbers (more in tests/test_updates_merging.py)."""

import torch

from maskwright.updates import merge
from maskwright.updates.ties import Ties


def run(deltas, method):
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge(base, [{"w": torch.tensor(d)} for d in deltas], method).state["w"].tolist()


def test_trim_elect_and_disjoint_mean():
    # trimmed to 2 of 4: (3, 0, -2, 0) and (-1, 4, 0, 0); signs +, +, -; means over those that agree
    assert run([[3.0, 0.5, -2.0, 0.1], [-1.0, 4.0, 0.5, 0.2]], Ties(density=0.5)) == [3, 4, -2, 0]


def test_exactly_the_count_stays_though_entries_tie():
    # the paper's code would keep all three
    assert run([[1.0, 1.0, 1.0, 0.0]], Ties(density=0.5)) == [1, 1, 0, 0]


def test_one_model_at_density_one_comes_back():
    assert run([[1.5, -2.0, 0.0]], Ties(density=1.0)) == [1.5, -2.0, 0.0]


def test_a_tie_of_signs():
    assert run([[2.0], [-2.0]], Ties(density=1.0)) == [2.0]
    assert run([[2.0, -3.0], [-2.0, -3.0]], Ties(density=1.0, zero="majority")) == [-2.0, -3.0]
