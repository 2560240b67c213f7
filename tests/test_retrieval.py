"""lab/retrieval.py: pairs, candidates, BM25 by hand, and a pair reader that reads both sides. Nothing is fetched."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.cache import cache_dir
from maskwright.core.errors import BadInput
from maskwright.lab import guides, retrieval
from maskwright.lab.encoder import CLS, LENGTH, PAD, SEP, SPECIAL, Encoder
from maskwright.lab.train import train

HERE = (cache_dir() / "sources/debian" / guides.PACKAGE).is_dir()
TEXTS = ("the disk is full", "a disk a disk and a floppy", "no word of it", "the network is up")


def codes(texts):
    return [[len(SPECIAL) + ord(letter) for letter in text] for text in texts]


def read(row):
    return "".join(chr(i - len(SPECIAL)) for i in row if i >= len(SPECIAL))


def reader(seed=0):
    return retrieval.PairReader(Encoder(260, layers=1, width=16, heads=2, seed=seed), seed=seed)


@given(st.text("abc", max_size=40), st.text("xyz", max_size=90))
def test_a_document_never_cuts_its_query(query, document):
    (row,) = retrieval.pair_ids([query], [document], encode=codes).tolist()
    left, right = row[: retrieval.QUERY], row[retrieval.QUERY :]
    shown = query[: retrieval.QUERY - 2]
    assert len(row) == LENGTH and left[0] == CLS and read(left) == shown and left[1 + len(shown)] == SEP
    assert left[2 + len(shown) :] == [PAD] * (retrieval.QUERY - 2 - len(shown))
    seen = document[: LENGTH - retrieval.QUERY - 1]
    assert read(right) == seen and right[len(seen)] == SEP and set(right[len(seen) + 1 :]) <= {PAD}


def test_pairs_need_as_many_documents_as_queries():
    with pytest.raises(BadInput, match="2 queries and 1 documents"):
        retrieval.pair_ids(["a", "b"], ["c"], encode=codes)
    with pytest.raises(BadInput, match="1 pairs"):
        retrieval.pair_rows([("a", "b")])


@given(st.integers(2, 24), st.integers(1, 24))
def test_the_relevant_section_is_among_the_candidates_and_half_are_of_its_chapter(candidates, asked):
    documents = {f"{1 + n % 3}.{n}": f"text {n}" for n in range(24)}  # 8 in each of 3 chapters
    queries = dict.fromkeys(list(documents)[:asked], "")
    found = retrieval.judged(queries, documents, candidates)
    for number, listed in found.candidates.items():
        assert found.qrels[number] == {number} and number in listed and set(listed) <= set(documents)
        assert len(set(listed)) == len(listed) == candidates
        near = sum(name[0] == number[0] for name in listed) - 1
        assert near >= min(candidates // 2, 7, candidates - 1)
    assert retrieval.judged(queries, documents, candidates).candidates == found.candidates
    one = next(iter(queries))
    assert retrieval.judged({one: ""}, documents, candidates).candidates[one] == found.candidates[one]


def test_where_the_relevant_one_is_listed_tells_nothing():
    documents = {f"1.{n}": "" for n in range(400)}
    listed = retrieval.judged(documents, documents, 4).candidates
    places = [names.index(number) for number, names in listed.items()]
    assert all(60 < places.count(place) < 140 for place in range(4))


def test_too_few_documents_are_refused():
    for queries, candidates in (({"1.1": ""}, 1), ({"1.1": ""}, 3), ({"1.9": ""}, 2)):
        with pytest.raises(BadInput, match=f"{candidates} candidates from 2 documents"):
            retrieval.judged(queries, {"1.1": "", "1.2": ""}, candidates)


def test_bm25_by_hand():
    documents = dict(enumerate(TEXTS))
    score = retrieval.bm25(documents, k1=1.2, b=0.75)("Disk floppy", TEXTS)
    mean, expected = (4 + 7 + 4 + 4) / 4, []
    for words in (text.split() for text in TEXTS):
        total = 0.0
        for term, often in (("disk", 2), ("floppy", 1)):
            count = words.count(term)
            idf = math.log(1 + (4 - often + 0.5) / (often + 0.5))
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(words) / mean))
        expected.append(total)
    assert score.tolist() == pytest.approx(expected) and score[2] == score[3] == 0 and score.argmax() == 1


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=20)
def test_one_positive_then_its_negatives(batch, known_item, seed):
    pairs = [(f"q{n}", f"one{n} two{n} three{n}") for n in range(6)]
    draw = retrieval.pair_rows(pairs, known_item, codes)
    ids, labels = draw(batch, torch.Generator().manual_seed(seed))
    assert ids.shape == (batch, LENGTH) and labels.shape == (batch, 1) and labels.dtype == torch.float32
    assert all(
        torch.equal(a, b) for a, b in zip((ids, labels), draw(batch, torch.Generator().manual_seed(seed)), strict=True)
    )
    positive = ""
    for row, label in zip(ids.tolist(), labels.flatten().tolist(), strict=True):
        query, document = read(row[: retrieval.QUERY]), read(row[retrieval.QUERY :])
        assert document in dict(pairs).values()
        if label:
            positive = document
            assert query == f"q{document[3]}" or query[:3] in ("one", "two", "thr")
        else:
            assert document != positive


def test_known_items_are_words_of_the_document_and_one_in_five_is_relevant():
    pairs = [(f"Q{n}", " ".join(f"{n}{letter}" for letter in "abcde")) for n in range(10)]
    ids, labels = retrieval.pair_rows(pairs * 50, 1.0, codes)(1000, torch.Generator().manual_seed(0))
    for row in ids[labels[:, 0] == 1].tolist():
        query, document = read(row[: retrieval.QUERY]).split(), read(row[retrieval.QUERY :]).split()
        assert 3 <= len(query) <= 5 and set(query) <= set(document) and len(set(query)) == len(query)
    assert 0.19 < float(labels.mean()) < 0.24  # a little above: a negative that is the document itself is left out


def test_the_reader_sees_both_sides_and_no_padding():
    model = reader().eval()

    def score(query, document, length=LENGTH):
        return float(model(retrieval.pair_ids([query], [document], length, codes))[0, 0].detach())

    first = score("disk", "a full disk")
    assert score("disc", "a full disk") != first and score("disk", "a full desk") != first
    assert score("disk", "a full disk", 40) == pytest.approx(first, abs=1e-6)
    assert math.isfinite(score("", ""))


def test_gradients_reach_every_weight_that_a_pair_uses():
    model = reader()
    ids, labels = retrieval.pair_rows([(t, t) for t in TEXTS], 0.0, codes)(10, torch.Generator().manual_seed(0))
    F.binary_cross_entropy_with_logits(model(ids), labels).backward()
    for name, weight in model.named_parameters():
        if name == "encoder.bias":  # of the masked LM's output alone
            assert weight.grad is None
        elif not name.endswith("key.bias"):  # adds the same to all of a query's scores: no gradient
            assert weight.grad is not None and float(weight.grad.abs().max()) > 1e-6, name
    used = ids.unique()
    assert bool((model.encoder.inlet.weight.grad[used[used != PAD]].abs().sum(1) > 0).all())


def test_a_small_reader_learns_64_pairs_by_heart():
    letters = torch.randint(97, 123, (64, 2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [tuple("".join(map(chr, side)) for side in pair) for pair in letters]
    rows = retrieval.pair_rows(pairs, 0.0, codes)(64, torch.Generator().manual_seed(0))
    loss = train(reader(), rows, steps=60, batch=64, lr=1e-2, optimizer="adamw", loss_fn=F.binary_cross_entropy_with_logits)
    assert loss < 0.05  # 0.5 is all that a reader of neither side can have


def test_scores_of_texts_that_are_encoded_once():
    model, calls = reader().eval(), []

    def counted(texts):
        calls.extend(texts)
        return codes(texts)

    score = retrieval.pair_score(model, counted)
    for query in ("disk", "floppy"):
        with torch.no_grad():
            wanted = model(retrieval.pair_ids([query] * 4, TEXTS, encode=codes))[:, 0]
            assert torch.equal(score(query, TEXTS), wanted)
    assert sorted(calls) == sorted(["disk", "floppy", *TEXTS])


def test_topics_and_their_ciphers():
    found = retrieval.topic_languages(("xx", "yy"), 3)
    assert set(found.streams) == set(found.apart) == {"en", "xx", "yy"}
    asked = found.asked("en", "xx")
    assert len(asked.queries) == 2 and all(len(listed) == 3 for listed in asked.candidates.values())
    english = found.asked("en", "en")
    for number, text in english.documents.items():
        other = asked.documents[number]
        assert len(other) == len(text) and other != text
        assert all(a == b for a, b in zip(text, other, strict=True) if not a.islower())
    assert all(len(ids) > LENGTH and int(ids.min()) >= len(SPECIAL) for ids in found.streams.values())
    ids, labels = found.pairs(5, torch.Generator().manual_seed(0))
    assert ids.shape == (5, LENGTH) and labels[0] == 1


@pytest.mark.skipif(not HERE, reason="the package is not in the cache")
def test_the_guides_headings_ask_for_sections_that_no_pair_is_trained_on():
    trained = {document for _, document in retrieval.guide_pairs()}
    held = {document for _, document in retrieval.guide_pairs("val", "test")}
    assert len(trained) > 500 and len(held) > 200 and not trained & held
    found = retrieval.guide_retrieval("en", "da", 20)
    assert len(found.queries) > 40 and set(found.queries) <= set(found.documents)
    assert all(guides.sides()[number] in ("val", "test") for number in found.queries)
