"""The installation guides: parsing by hand-written text, the split, and the package itself where it is in the cache."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskwright.core.cache import cache_dir
from maskwright.core.errors import BadInput
from maskwright.lab import guides

HERE = (cache_dir() / "sources/debian" / guides.PACKAGE).is_dir()
TEXT = """Guide

Table of Contents

1. Welcome
    1.1. What is it?
    1.2. A name that
        wraps
2. Disks

Chapter 1. Welcome

Table of Contents

1.1. What is it?
1.2. A name that wraps

A preface that is in no section but is long enough to be a paragraph of one.

1.1. What is it?

It is a system for your computer, made of many small programs that work together^[1].

┌────────┬───────┐
│A table │of two │
└────────┴───────┘

  • One item of a list, which is long enough to stay here as a
    paragraph.

    # mount /dev/sda1 /mnt && some words that are a command of the shell

Too short.

1.2.\u00a0A name that wraps

This paragraph belongs to the second section, and to no other one at all.

━━━━━━━━━━━━━━━━━━━━━━━━━━

[1] A note that would be long enough to be a paragraph, if it were not a note.

Chapter 2. Disks

Table of Contents

2.1. One
2.2. Two

2.1. One

1. A step of a list that goes on until it is as long as a paragraph must be.
"""


def test_sections_of_a_small_guide():
    first, second, third = guides.parse(TEXT)
    assert [s.number for s in (first, second, third)] == ["1.1.", "1.2.", "2.1."]
    assert (first.chapter, third.chapter, second.heading) == ("1", "2", "A name that wraps")
    assert first.paragraphs == (
        "It is a system for your computer, made of many small programs that work together.",
        "One item of a list, which is long enough to stay here as a paragraph.",
    )
    assert second.paragraphs == ("This paragraph belongs to the second section, and to no other one at all.",)
    assert third.text == "A step of a list that goes on until it is as long as a paragraph must be."


def test_lines_are_joined_as_the_language_writes():
    text = "1.1. 見出し\n\nインストールに必要なファイルをインストール中に取得\nできます。システムは HTTP\nFTP もサポート。\n"
    (only,) = guides.parse(text, "ja")
    assert only.paragraphs == (
        "インストールに必要なファイルをインストール中に取得できます。システムは HTTP FTP もサポート。",
    )


@given(st.lists(st.tuples(st.sampled_from("12AB"), st.integers(1, 40)), unique=True), st.randoms())
def test_the_split_hangs_on_numbers_alone_and_fills_every_side(pairs, random):
    numbers = [f"{chapter}.{n}." for chapter, n in pairs]
    found = guides.split(numbers)
    random.shuffle(numbers)
    assert guides.split(numbers) == found and set(found.values()) <= set(guides.SIDES)
    for chapter in "12AB":
        mine = [found[n] for n in numbers if n.startswith(chapter)]
        if len(mine) >= 10:
            assert set(mine) == set(guides.SIDES) and 0.6 <= mine.count("train") / len(mine) <= 0.8


def test_unknown_language_and_side():
    with pytest.raises(BadInput, match="no guide in 'tlh'"):
        guides.raw("tlh")
    with pytest.raises(BadInput, match="no side 'dev'"):
        guides.side("en", "dev")


@pytest.mark.skipif(not HERE, reason="the package is not in the cache")
def test_sections_align_and_no_english_is_left():
    known = {s.number for s in guides.parse(guides.raw("en"))}
    english = guides.sections("en")
    assert len(english) > 200 and {s.number for s in english} <= known
    for language in ("ru", "vi"):  # KOI8-R; the one with the most left in English
        found = guides.sections(language)
        assert 100 < len(found) < len(english) and {s.number for s in found if s.chapter != "F"} <= known
        own = {p for s in found for p in s.paragraphs}
        assert not own & {p for s in english for p in s.paragraphs}
        seen = [{p for s in guides.side(language, name) for p in s.paragraphs} for name in guides.SIDES]
        assert all(seen) and not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
        assert len({s.heading for s in guides.titled(language, "test")}) == len(guides.titled(language, "test")) > 10
    texts, chapters = guides.chapter_rows("ru", "test")
    assert len(texts) == len(chapters) > 100 and set(chapters) <= set(range(len(guides.CHAPTERS)))
    assert "Linux" in guides.raw("ru") and "Установка" in guides.raw("ru")
