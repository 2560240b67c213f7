"""The recall tasks: exact lengths, one place for every record, answers that a text search finds; asking on a cache."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.lab import ask, haystack, lessons, made, recall
from maskwright.lab.decoder import llama
from maskwright.lab.text import python_chars

LETTERS = python_chars().vocabulary


def read(ids):
    return "".join(LETTERS[i] for i in ids.tolist())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(recall.FAMILIES)), st.integers(200, 520), st.integers(0, 2**31))
def test_every_prompt_has_its_length_and_one_answer(family, length, seed):
    found = recall.FAMILIES[family](length, 3, seed=seed)
    assert found.prompt.shape == (3, length) and len(found) == 3
    again = recall.FAMILIES[family](length, 3, seed=seed)
    assert torch.equal(found.prompt, again.prompt) and torch.equal(found.answer, again.answer)
    for prompt, answer, facts in zip(found.prompt, found.answer, found.facts, strict=True):
        text, told = read(prompt), read(answer)
        question = text[-found.question :]
        records = [text[a:b] for a, b in facts.tolist()]
        if family == "tracking":
            name, chain = question[1:-1], []
            for _ in range(len(records)):
                (record,) = [r for r in records if r.startswith(f"%{name}>")]
                assert text.count(record) == 1
                name = record[4:-1]
                chain.append(name)
            assert told == ">".join(chain)
        else:
            assert records == [question + told + text[facts[0, 1] - 1]]
            assert text.count(question) == 2  # the record and the question at the end
        assert text.endswith(question) and max(b for _, b in facts.tolist()) <= length - found.question


def test_filler_is_the_text_itself():
    found = recall.needle(300, 4, seed=3)
    val = read(python_chars().val)
    for prompt, facts in zip(found.prompt, found.facts, strict=True):
        (a, b), text = facts[0].tolist(), read(prompt)
        assert text[:a] + text[b : -found.question] in val


def test_the_number_of_records_is_exact():
    assert all(read(p).count("@") >= 6 for p in recall.key_value(200, 4, pairs=5).prompt)
    found = recall.tracking(300, 4, chains=3, hops=1)
    assert found.facts.shape == (4, 2, 2)
    assert recall.needle(300, 2, needles=3).answer.shape == (2, 3)


def test_bad_tasks_are_refused():
    with pytest.raises(BadInput, match="the length is 60"):
        recall.key_value(60, 1, pairs=8)
    with pytest.raises(BadInput, match="names"):
        recall.key_value(500, 1, pairs=27)
    with pytest.raises(BadInput, match="of text"):
        recall.key_value(500, 1, text=torch.zeros(100, dtype=torch.int64))


def test_lessons_mark_the_answers_and_nothing_else():
    draw = lessons.curriculum(python_chars().train, 20, 0)
    shapes = set()
    for _ in range(20):
        x, y = draw(1, torch.Generator())
        shapes.add(tuple(x.shape))
        assert y.shape == (*x.shape, 2) and torch.equal(x[:, 1:], y[:, :-1, 0])
        assert set(y[..., 1].unique().tolist()) <= {0, 1}
    assert shapes == {(rows, length) for length, rows, *_ in lessons.STAGES}
    first = lessons.lessons(64, 3, np.random.default_rng(5), python_chars().train, copies=1.0)
    for row, mark in zip(first[0], first[1][..., 1], strict=True):
        text = read(row)
        for at in (mark[:-1] == 1).nonzero().flatten().tolist():  # what is marked stood before, after the same two
            assert text.index(text[at - 1 : at + 2]) < at - 1
    x, y = lessons.lessons(256, 40, np.random.default_rng(0), python_chars().train)
    said = [read(row[:, 0][row[:, 1] == 1]) for row in y]
    assert any(said) and all(set(s) <= set(">abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for s in said)


def test_the_three_ways_agree_where_attention_is_dense():
    model = llama(len(LETTERS), layers=2, width=32, heads=2, kv_heads=1, hidden=32, seed=1)
    found = recall.key_value(120, 6, pairs=3, seed=2)
    said = {way: ask._said(model, found, way) for way in ("prefill", "decode", "late")}
    assert torch.equal(said["prefill"], said["decode"]) and torch.equal(said["prefill"], said["late"])
    # Told its own greedy answer, the model is always right: teacher forcing equals greedy decoding.
    greedy = model.generate(found.prompt, max_new_tokens=3, do_sample=False)[:, -3:]
    own = recall.Recall("own", found.prompt, greedy, found.question, found.facts)
    for way in said:
        assert ask.correct(model, own, way, batch=4).all()
    with pytest.raises(BadInput, match="not one of"):
        ask.correct(model, found, "sideways")


def test_llama_looks_back_at_first_and_is_a_function_of_its_seed():
    one, two = (llama(40, layers=2, width=64, heads=4, kv_heads=2, hidden=32, seed=s) for s in (0, 0))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    one.set_attn_implementation("eager")
    ids = torch.randint(40, (32, 30), generator=torch.Generator().manual_seed(0))
    weights = one(ids, output_attentions=True).attentions[0].mean(0)  # over samples: what each token adds by itself is noise
    for head in range(4):
        assert int(weights[head, -1].argmax()) == 29 - (head + 1)
    with pytest.raises(ValueError, match="do not divide"):
        llama(40, width=64, heads=3)


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 128 for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_haystack_has_exactly_its_length_and_its_needles_stand_between_lines():
    tokenizer = Words()
    hay = haystack.haystack(tokenizer, 2048, needles=5, seed=1)
    text = tokenizer.decode(hay.context[0].tolist())
    assert hay.context.shape == (1, 2048) and len(hay.questions) == len(hay.answers) == 5
    for question, answer, (a, b) in zip(hay.questions, hay.answers, hay.spans, strict=True):
        word = tokenizer.decode(question.tolist()).split()[-2]
        assert text[a:b] == f"The special magic number for {word} is {tokenizer.decode(answer.tolist())}.\n"
        assert a == 0 or text[a - 1] == "\n"
    assert torch.equal(hay.context, haystack.haystack(tokenizer, 2048, needles=5, seed=1).context)
    for bad in ({"length": 100}, {"length": 2048, "needles": 0}, {"length": 10**7}):
        with pytest.raises(BadInput):
            haystack.haystack(tokenizer, **bad)


def test_questions_are_asked_on_copies_of_one_cache():
    model = llama(128, layers=2, width=32, heads=2, kv_heads=1, hidden=32, seed=1)
    hay = haystack.haystack(Words(), 300, needles=2, seed=1)
    told = []
    for question in hay.questions:
        ids = torch.cat([hay.context, question[None]], 1)
        told.append(model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:])
    right = haystack.Haystack(hay.context, hay.questions, tuple(told), hay.spans)
    wrong = haystack.Haystack(hay.context, hay.questions, tuple((t + 1) % 128 for t in told), hay.spans)
    for stepwise in (False, True):
        assert ask.retrieved(model, right, stepwise=stepwise).all()
        assert not ask.retrieved(model, wrong, stepwise=stepwise).any()
    assert len(ask.retrieved(model, right, limit=1)) == 1


def test_older_lab_models_keep_their_names_and_new_ones_hash_their_modules():
    recipe = made.recipe_of("recall_lm")
    assert recall in recipe.modules and made.recipe_of("char_lm_gelu").modules == made.recipe_of("vit_mnist5k").modules
    path = made.path_of("recall_lm", 0)
    less = copy.copy(recipe)
    object.__setattr__(less, "modules", recipe.modules[:-1])
    assert made.path_of("recall_lm", 0, less) != path
