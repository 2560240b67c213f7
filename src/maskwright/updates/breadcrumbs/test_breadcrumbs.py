"""Breadcrumbs on hand-written numbers (more in tests/test_updates_merging.py)."""

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.updates import merge
from maskwright.updates.breadcrumbs import Breadcrumbs


def run(delta, method):
    return merge({"w": torch.zeros(len(delta))}, [{"w": torch.tensor(delta)}], method).state["w"].tolist()


def test_outliers_and_small_entries_go():
    assert run([float(i) for i in range(1, 11)], Breadcrumbs(1.0, 0.5, 0.1)) == [0, 0, 0, 0, 5, 6, 7, 8, 9, 0]


def test_ties_fall_to_the_lower_index_on_both_sides():
    # the first of the 2s is the greater one: it is the outlier, the next two stay
    assert run([2.0, 1.0, 2.0, -2.0, 2.0], Breadcrumbs(1.0, 0.4, 0.2)) == [0, 0, 2, -2, 0]


def test_where_no_whole_outlier_fits_nothing_is_wiped():
    assert run([1.0, 2.0, 3.0], Breadcrumbs(1.0, 0.7, 0.1)) == [0, 2, 3]


def test_rows_of_a_convolution_are_its_outputs():
    base = {"w": torch.zeros(2, 1, 2, 2)}
    tuned = {"w": torch.tensor([[[[1.0, 2], [3, 4]]], [[[40.0, 30], [20, 10]]]])}
    out = merge(base, [tuned], Breadcrumbs(1.0, 0.5, 0.25, "row")).state["w"]
    assert out.flatten().tolist() == [0, 2, 3, 0, 0, 30, 20, 0]


def test_percentiles_and_contradictions():
    assert Breadcrumbs.between(0.85, 0.993).density == pytest.approx(0.143)
    with pytest.raises(BadInput, match="together exceed 1; drop_top is the share removed"):
        Breadcrumbs(density=0.85, drop_top=0.993)
