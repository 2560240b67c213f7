"""The multilingual encoder: tokens, padding, masked rows, shares; the guides' own part where the package is in the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.cache import cache_dir
from maskwright.core.errors import BadInput
from maskwright.lab import encoder, guides, text
from maskwright.lab import train as loop
from maskwright.lab.encoder import CLS, HIDDEN, LENGTH, MASK, PAD, SEP, SPECIAL, VOCABULARY, Encoder, MaskedLM, Reader

HERE = (cache_dir() / "sources/debian" / guides.PACKAGE).is_dir()
guide = pytest.mark.skipif(not HERE, reason=f"{guides.NEEDS} is not in the cache")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**kinds):
    return Encoder(50, **{"layers": 2, "width": 16, "heads": 2, "length": 12, **kinds}).eval()


# Tokens


@pytest.fixture(scope="module")
def texts():
    return [body for _, body in text.python_topics()[:40]] + ["Håndbogen på dansk æøå", "português não é", "日本語の文章"]


def test_the_tokenizer_is_the_same_whenever_it_is_made(texts):
    one, two = (encoder.fit_tokenizer(texts, 600) for _ in range(2))
    assert one.to_str() == two.to_str() and one.get_vocab_size() == 600
    assert [one.token_to_id(name) for name in SPECIAL] == [PAD, CLS, SEP, MASK] == [0, 1, 2, 3]


def test_every_text_comes_back_lower_case_and_composed(texts):
    made = encoder.fit_tokenizer(texts[:5], 400)
    for told, wanted in (("Größe ÅÆ", "größe åæ"), ("cafe\u0301", "café"), ("日本語 🙂", "日本語 🙂"), ("a\n\tb", "a\n\tb")):
        ids = made.encode(told).ids
        assert made.decode(ids).removeprefix(" ") == wanted and min(ids) >= len(SPECIAL)  # bytes it never saw too
    assert made.encode("[MASK]").ids == [MASK]  # the special tokens' own names are the exception


def test_rows_of_tokens_are_cut_and_padded(texts, monkeypatch):
    made = encoder.fit_tokenizer(texts, 600)
    monkeypatch.setattr(encoder, "tokenizer", lambda: made)
    ids = encoder.token_ids(["", "one two", texts[0]], 10)
    assert ids.shape == (3, 10) and ids.dtype == torch.int64 and (ids[:, 0] == CLS).all()
    assert ids[0, 1:].tolist() == [PAD] * 9 and ids[2].tolist() == [CLS, *made.encode(texts[0]).ids[:9]]
    short = made.encode("one two").ids
    assert ids[1].tolist() == [CLS, *short, *[PAD] * (9 - len(short))]
    assert encoder.padded([[5, 6], [7]], 3).tolist() == [[5, 6, PAD], [7, PAD, PAD]]
    assert encoder.padded([], 3).shape == (0, 3)


# Padding


def test_padding_changes_nothing():
    model, ids = small(), torch.randint(4, 50, (3, 7), generator=rng())
    padded = torch.nn.functional.pad(ids, (0, 5), value=PAD)
    torch.testing.assert_close(model(padded)[:, :7], model(ids))
    mixed = torch.cat([padded, torch.randint(4, 50, (1, 12), generator=rng(1))])  # a full row beside short ones
    torch.testing.assert_close(model(mixed)[:3, :7], model(ids))
    reader = Reader(model, 3, seed=1)
    torch.testing.assert_close(reader(padded), reader(ids))
    torch.testing.assert_close(reader(ids), reader.head(model(ids).mean(1)))
    assert model.seen.mask is None  # the last rows had no padding


def test_a_reader_of_the_first_places_sees_all_and_averages_those():
    model = small()
    ids = torch.tensor([[1, 5, 6, 2, 9, 9, 9, 0], [1, 7, 0, 0, 8, 8, 0, 0]])
    reader = Reader(model, 2, first=4)
    hidden = model(ids)
    wanted = torch.stack([hidden[0, :4].mean(0), hidden[1, :2].mean(0)])
    torch.testing.assert_close(reader(ids), reader.head(wanted))
    other = ids.clone()
    other[0, 5] = 11
    assert not torch.allclose(reader(other)[0], reader(ids)[0]) and torch.allclose(reader(other)[1], reader(ids)[1])


def test_guesses_are_the_logits_at_the_places():
    model = small()
    ids, where = torch.randint(4, 50, (2, 12), generator=rng()), torch.tensor([[1, 5, 3], [11, 2, 2]])
    logits = model(ids) @ model.inlet.weight.T + model.bias
    found = MaskedLM(model)((ids, where))
    assert found.shape == (2, 3, 50)
    for row in range(2):
        torch.testing.assert_close(found[row], logits[row, where[row]])


def test_the_same_seed_is_the_same_encoder_and_too_long_is_refused():
    one, two, other = small(), small(), small(seed=1)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.inlet.weight, other.inlet.weight)
    with pytest.raises(BadInput, match="13 tokens do not fit a length of 12"):
        one(torch.ones(1, 13, dtype=torch.int64))


# Masked rows


@settings(max_examples=25, deadline=None)
@given(st.integers(8, LENGTH), st.integers(0, 99))
def test_masked_rows_hide_a_fifth_and_touch_nothing_else(length, seed):
    streams = {"a": torch.arange(4, 304), "b": torch.arange(1004, 1304)}
    (ids, where), target = encoder.masked_rows(streams, {"a": 0.5, "b": 0.5}, length)(9, rng(seed))
    hidden = max(1, round(length * HIDDEN / LENGTH))
    assert ids.shape == (9, length) and where.shape == target.shape == (9, hidden) and (ids[:, 0] == CLS).all()
    whole = ids.scatter(1, where, target)
    assert (whole[:, 2:] == whole[:, 1:-1] + 1).all()  # one piece of one stream, as it stands there
    assert all(len(set(row)) == hidden and min(row) >= 1 for row in where.tolist())
    shown = ids.gather(1, where)
    assert ((shown == MASK) | (shown >= len(SPECIAL))).all() and (shown < VOCABULARY).all()


def test_eight_in_ten_are_masked_one_is_by_chance_one_stays():
    (ids, where), target = encoder.masked_rows({"a": torch.arange(4, 4000)}, {"a": 1.0})(1000, rng())
    shown, number = ids.gather(1, where), target.numel()
    for share, wanted in ((shown == MASK, 0.8), (shown == target, 0.1), ((shown != MASK) & (shown != target), 0.1)):
        assert abs(float(share.float().mean()) - wanted) < 4 * (wanted * (1 - wanted) / number) ** 0.5 + 1 / VOCABULARY
    assert where.flatten().bincount(minlength=LENGTH)[1:].min() > 100  # every place in turn, but CLS


def test_rows_follow_the_shares_and_the_generator():
    streams = {name: torch.full((100,), 10 + i) for i, name in enumerate("abc")}
    share = {"c": 0.7, "a": 0.01, "b": 0.29}
    draw = encoder.masked_rows(streams, share, 16)
    (ids, where), target = draw(4000, rng(1))
    for i, name in enumerate("abc"):
        seen = float((target[:, 0] == 10 + i).float().mean())
        assert abs(seen - share[name]) < 4 * (share[name] * (1 - share[name]) / 4000) ** 0.5
    (again, places), same = draw(4000, rng(1))
    assert torch.equal(ids, again) and torch.equal(where, places) and torch.equal(target, same)
    (other, _), _ = draw(4000, rng(2))
    assert not torch.equal(ids, other)


def test_a_stream_as_long_as_a_row_has_one_place_for_it():
    (ids, where), target = encoder.masked_rows({"a": torch.arange(4, 19)}, {"a": 1.0}, 16)(5, rng())
    assert (ids.scatter(1, where, target)[:, 1:] == torch.arange(4, 19)).all()


def test_the_loss_is_told_on_the_same_rows_in_eval_mode(monkeypatch):
    monkeypatch.setattr(encoder, "stream", lambda language, side: torch.arange(4, 400))
    model = Encoder(layers=1, width=16, heads=2).train()
    one, two = (encoder.masked_loss(model, "da", rows=4) for _ in range(2))
    assert one == two and model.training and abs(one - torch.tensor(VOCABULARY).log()) < 2
    (ids, where), target = encoder.language_rows("da", "val")(4, rng())
    assert one == pytest.approx(float(loop.cross_entropy(model.eval().guess(ids, where), target).detach()), rel=1e-5)


def test_company_gives_tokens_their_first_vectors():
    """Tokens of one stream keep company with each other, those of another with others; a token never seen with none."""
    streams = [torch.randint(low, low + 10, (3000,), generator=rng(low)) for low in (0, 10)]
    vectors = encoder.word_vectors(streams, 40, 8)
    again = encoder.word_vectors(streams, 40, 8)
    assert vectors.shape == (40, 8) and torch.equal(vectors, again)
    near = torch.nn.functional.normalize(vectors, dim=1)
    near = near @ near.T
    assert near[:10, :10].mean() > near[:10, 10:20].mean() + 0.5
    seen = vectors[:20].norm(dim=1)
    assert vectors[20:].norm(dim=1).max() < seen.min() and vectors[20:].norm(dim=1).min() > 0


# Languages


def test_shares_of_the_languages_sum_to_one():
    share = encoder.shares()
    assert list(share) == list(guides.LANGUAGES) and sum(share.values()) == pytest.approx(1)
    assert {name for name, value in share.items() if value == 0.01} == {"da", "pt", "cs"} == set(encoder.RARE)
    usual = {value for name, value in share.items() if name not in encoder.RARE and name != "en"}
    assert share["en"] == encoder.ENGLISH and len(usual) == 1 and 0.01 < usual.pop() < share["en"]


@guide
def test_streams_hold_one_side_of_a_language(texts, monkeypatch):
    made = encoder.fit_tokenizer(texts, 600)  # the lab's own reads all 19 languages, which takes seconds
    monkeypatch.setattr(encoder, "tokenizer", lambda: made)
    train, held = (encoder.stream.__wrapped__("da", side) for side in ("train", "test"))
    pieces = sum(1 + len(s.paragraphs) for s in guides.side("da", "test"))
    assert int((held == SEP).sum()) == pieces and held[-1] == SEP and len(train) > 2 * len(held)
    first = guides.side("da", "test")[0]
    told = made.decode(held[: int((held == SEP).nonzero()[0])].tolist()).strip()
    assert told == " ".join(first.heading.lower().split())
