"""The sheet's exact checks of the second stage; a name's number is the line: 3 MAP, 4 rerank, 5 binary cross entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.lab.encoder import Encoder
from maskwright.lab.retrieval import PairReader
from maskwright.updates.sftm_clir import mean_average_precision, rerank

DOCUMENTS = {name: f"text {name}" for name in "abcdef"}


def test_3_average_precision_by_hand():
    assert mean_average_precision({"q": "axb"}, {"q": {"a", "b"}}) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision({"q": "ax"}, {"q": {"a", "b"}}) == 0.5  # b was not found, and counts
    assert mean_average_precision({"q": "a", "r": "a"}, {"q": {"a"}, "r": set()}) == 1.0  # r is skipped
    assert mean_average_precision({"q": "a"}, {"q": {"a"}, "s": {"b"}}) == 0.5  # s was not run
    with pytest.raises(BadInput, match="no query has relevant"):
        mean_average_precision({"q": "a"}, {"q": ()})
    with pytest.raises(BadInput, match="'q' ranks a document twice"):
        mean_average_precision({"q": "aa"}, {"q": "a"})


@given(st.permutations(range(8)), st.sets(st.integers(0, 11), min_size=1))
def test_3_average_precision_is_its_definition(ranking, relevant):
    precision = [sum(d in relevant for d in ranking[: i + 1]) / (i + 1) for i in range(8)]
    expected = sum(p for p, d in zip(precision, ranking, strict=True) if d in relevant) / len(relevant)
    assert mean_average_precision({"q": ranking}, {"q": relevant}) == pytest.approx(expected)


# --- 4: reranking -------------------------------------------------------------------------------------------------


def constant(query, texts):
    return torch.zeros(len(texts))


def by_letter(query, texts):
    return torch.tensor([float(ord(text[-1])) for text in texts])


@given(st.permutations("abcdef"), st.integers(1, 8))
def test_4_equal_scores_keep_the_first_stages_order(order, depth):
    assert rerank(constant, {"q": ""}, {"q": order}, DOCUMENTS, depth) == {"q": tuple(order)}


@given(st.permutations("abcdef"), st.integers(1, 8))
def test_4_what_lies_below_the_depth_stays(order, depth):
    (found,) = rerank(by_letter, {"q": ""}, {"q": order}, DOCUMENTS, depth).values()
    assert found == (*sorted(order[:depth], reverse=True), *order[depth:])


def test_rerank_refuses():
    told = {"q": "a query"}
    for candidates, message in (
        ({"q": ()}, "'q' has no candidates"), ({}, "'q' has no candidates"), ({"q": ("a", "z")}, "unknown document 'z'"),
        ({"q": ("a", "a")}, "a document twice"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            rerank(constant, told, candidates, DOCUMENTS)
    with pytest.raises(BadInput, match="depth >= 1"):
        rerank(constant, told, {"q": "ab"}, DOCUMENTS, 0)
    for scores in (torch.tensor([0.0, math.nan]), torch.zeros(3), torch.zeros(2, 1)):
        with pytest.raises(BadInput, match="2 documents need that many scores"):
            rerank(lambda q, t, s=scores: s, told, {"q": "ab"}, DOCUMENTS)


# --- 5: the loss --------------------------------------------------------------------------------------------------


def test_5_binary_cross_entropy_of_score_0_is_ln_2():
    """Of the lab's pair reader, as the claim trains it: one logit, float labels."""
    model = PairReader(Encoder(40, layers=1, width=8, heads=2))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    score = model(torch.randint(4, 40, (3, 64), generator=torch.Generator().manual_seed(0)))
    assert score.shape == (3, 1)
    for label in (1.0, 0.0):
        loss = F.binary_cross_entropy_with_logits(score, torch.full((3, 1), label))
        assert float(loss.detach()) == pytest.approx(0.6931, abs=5e-5)
