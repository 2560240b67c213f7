"""Task arithmetic on hand-written numbers."""

import torch

from maskwright.updates import merge
from maskwright.updates.task_arithmetic import TaskArithmetic


def test_sum_mean_and_negation():
    base = {"w": torch.tensor([1.0, 2.0])}
    tuned = [{"w": torch.tensor([3.0, 2.0])}, {"w": torch.tensor([1.0, 6.0])}]
    assert merge(base, tuned, TaskArithmetic(0.5)).state["w"].tolist() == [2, 4]
    assert merge(base, tuned, TaskArithmetic(normalise=True)).state["w"].tolist() == [2, 4]
    assert merge(base, tuned[:1], TaskArithmetic(-1.0)).state["w"].tolist() == [-1, 2]  # forgetting
    assert merge(base, tuned, TaskArithmetic(), weights=[1, 0.25]).state["w"].tolist() == [3, 3]
    assert merge(base, tuned, TaskArithmetic(normalise=True), weights=[3, 1]).state["w"].tolist() == [2.5, 3]
