"""The lab's two diffusion models: their data, samplers, losses and recipes, on networks too small to learn much."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from maskwright.attention import use
from maskwright.attention.sparse_vdit import SparseVDiT
from maskwright.attention.sparsed import SparseD
from maskwright.lab import diffusion, images, text, video
from maskwright.lab.made import made, path_of, told_of


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def chars() -> text.Chars:
    return text.python_chars()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(chars: text.Chars, **more) -> diffusion.MaskedLM:
    return diffusion.MaskedLM(len(chars.vocabulary), layers=2, width=32, heads=4, **more).eval()


def said(chars: text.Chars, ids: torch.Tensor) -> str:
    return "".join(chars.vocabulary[i] for i in ids.tolist())


# --- the masked-diffusion language model --------------------------------------------------------------------------


def test_retrieval_prompts_hold_their_answers(chars):
    asked = diffusion.retrieval(chars, chars.val, 5, draw())
    assert asked.prompt.shape == (5, diffusion.PROMPT) and asked.answer.shape == (5, diffusion.ANSWER)
    for row, answer in zip(asked.prompt, asked.answer, strict=True):
        context, questions = said(chars, row[: diffusion.CONTEXT]), said(chars, row[diffusion.CONTEXT :])
        records = said(chars, answer).split(";")[:-1]
        assert len(records) == diffusion.QUERIES == len(set(records))  # every pair is asked for once
        assert questions == "".join(f"{record[:2]}?;" for record in records)
        assert all(f"{record};" in context for record in records)
    assert diffusion.right(asked, asked.answer) == 1.0
    wrong = asked.answer.clone()
    wrong[0, asked.values[0]] = asked.answer[0, 0]
    assert diffusion.right(asked, wrong) == 1 - 1 / (5 * diffusion.QUERIES)


def test_retrieval_text_is_one_passage_around_the_pairs(chars):
    asked = diffusion.retrieval(chars, chars.val, 1, draw(), pairs=3, slots=9)
    pieces = said(chars, asked.prompt[0, :36])
    records = set(said(chars, asked.answer[0]).split(";")[:-1])
    words = "".join(piece for piece in (pieces[i : i + 4] for i in range(0, 36, 4)) if piece[:3] not in records)
    assert words in said(chars, chars.val) and len(words) == 24


def test_hidden_rows_hide_exact_counts_behind_first(chars):
    rows = diffusion.text_rows(chars.val, 64, draw())
    x, y = diffusion.hidden_rows(rows, 192, 999, draw(1))
    hidden = x == 999
    assert torch.equal(hidden, y >= 0) and not hidden[:, :192].any()
    assert torch.equal(x[~hidden], rows[~hidden]) and torch.equal(y[hidden], rows[hidden])
    counts = hidden.sum(1)
    assert counts.min() >= 1 and counts.max() <= 64 and abs(float(counts.float().mean()) - 32) < 8
    assert (diffusion.hidden_rows(rows, 192, 999, draw(1), 0.25)[1] >= 0).sum(1).eq(16).all()


def test_the_loss_is_the_mean_over_hidden_characters_then_rows():
    logits = torch.zeros(2, 4, 3)
    logits[0, 0, 1] = 50.0
    target = torch.tensor([[1, -1, 0, -1], [-1, 2, -1, -1]])
    want = ((0.0 + torch.log(torch.tensor(3.0))) / 2 + torch.log(torch.tensor(3.0))) / 2
    assert torch.isclose(diffusion.denoising_loss(logits, target), want)


def test_the_model_sees_both_sides_and_distances(chars):
    model, ids = tiny(chars), diffusion.text_rows(chars.val, 1, draw())[:, :20]
    moved = ids.clone()
    moved[0, 19] = (moved[0, 19] + 1) % model.mask
    assert not torch.allclose(model(ids)[0, 0], model(moved)[0, 0])
    turned = model.blocks[0].attention.turn(torch.randn(1, 1, 1, 8, generator=draw()).expand(1, 1, 6, 8))
    product = (turned @ turned.mT)[0, 0]
    assert torch.allclose(product[1:, 1:], product[:-1, :-1], atol=1e-5) and not torch.allclose(product[0, 0], product[0, 3])
    with pytest.raises(ValueError, match="do not fit a length"):
        model(torch.zeros(1, 257, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads"):
        diffusion.MaskedLM(10, width=12, heads=2)


@pytest.mark.parametrize("new,steps", [(8, 8), (7, 3), (5, 1)])
def test_generate_fills_every_place_once(chars, new, steps):
    model, prompt, told = tiny(chars), diffusion.text_rows(chars.val, 2, draw())[:, :12], []
    out = diffusion.generate(model, prompt, new, steps, tell=lambda **what: told.append(what))
    assert out.shape == (2, new) and (out != model.mask).all()
    assert told == [{"step": i, "steps": steps, "new_tokens": new} for i in range(steps)]
    assert torch.equal(out, diffusion.generate(model, prompt, new, steps))
    with pytest.raises(ValueError, match="steps"):
        diffusion.generate(model, prompt, 4, 5)


def test_generate_takes_the_surest_places_first(chars):
    model, prompt = tiny(chars), diffusion.text_rows(chars.val, 1, draw())[:, :12]
    ids = torch.cat([prompt, torch.full((1, 6), model.mask)], 1)
    with torch.no_grad():
        for _ in range(6):
            chance, guess = model(ids)[0].softmax(-1).max(-1)
            chance[ids[0] != model.mask] = -1
            ids[0, chance.argmax()] = guess[chance.argmax()]
    assert torch.equal(diffusion.generate(model, prompt, 6, 6), ids[:, 12:])


def test_sparsed_runs_under_the_sampler(chars):
    model, prompt = tiny(chars), diffusion.text_rows(chars.val, 2, draw())[:, :40]
    dense = diffusion.generate(model, prompt, 8, 8)
    with use(model, SparseD(select=1.0, block=8), impl="reference") as run:
        assert torch.equal(diffusion.generate(model, prompt, 8, 8, tell=run.tell), dense)
    with use(model, SparseD(select=0.2, block=8), impl="reference", record=True) as run:
        diffusion.generate(model, prompt, 8, 8, tell=run.tell)
    shares = [float(r.kept.mean()) / (r.queries * r.keys) for r in run.records[::2]]
    assert shares[:3] == [1.0] * 3 and all(0 < share < 0.7 for share in shares[3:])


def test_lessons_are_short_at_first_and_hide_values(chars):
    lessons, lengths = diffusion.lessons(chars, 999, 24), []
    capitals = set(chars.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ").tolist())
    for _ in range(24):
        x, y = lessons(4, draw())
        assert x.shape == y.shape and torch.equal(x == 999, y >= 0) and (y >= 0).any(1).all()
        lengths.append(x.shape[1])
        if x.shape[1] < diffusion.LENGTH:
            assert set(y[y >= 0].tolist()) <= capitals
    assert lengths[:3] == [88, 88, 256] and lengths[6:9] == [136, 136, 256] and set(lengths[9:]) == {256}


# --- the video denoiser -------------------------------------------------------------------------------------------


def test_clips_move_in_straight_lines():
    clips = video.draw_clips(images.digits().train, 6, draw())
    assert clips.video.shape == (6, 8, 16, 16) and clips.words.shape == (6, 8)
    assert clips.video.min() == -1 and clips.video.max() <= 1
    for film, words in zip(clips.video, clips.words, strict=True):
        down, right = int(words[1]) - 10 - video.SPEED, int(words[2]) - 11 - 3 * video.SPEED
        assert max(abs(down), abs(right)) <= video.SPEED and 0 <= words[0] < 10
        for first, second in pairwise(film):
            assert torch.equal(first.roll((down, right), (0, 1)), second)


def test_patches_are_frame_by_frame_and_come_back():
    clip = torch.arange(2 * 8 * 16 * 16.0).view(2, 8, 16, 16)
    cut = video.patches(clip)
    assert cut.shape == (2, 512, 4) and torch.equal(video.unpatched(cut), clip)
    assert cut[0, 64 + 8 + 1].tolist() == clip[0, 1, 2:4, 2:4].flatten().tolist()


def test_the_denoiser_and_its_sampler():
    model = video.VideoDenoiser(layers=1, width=32, heads=2).eval()
    clips = video.draw_clips(images.digits().test, 2, draw())
    assert torch.equal(video.noised(clips.video, torch.zeros(2), draw()), clips.video)
    told = []
    one = video.sample(model, clips.words, 3, draw(), tell=lambda **what: told.append(what))
    assert one.shape == clips.video.shape and torch.equal(one, video.sample(model, clips.words, 3, draw()))
    assert [what["step"] for what in told] == [0, 1, 2] and told[0]["new_tokens"] == 512
    start = torch.randn(2, 8, 16, 16, generator=draw())
    with torch.no_grad():
        assert torch.allclose(video.sample(model, clips.words, 1, draw()), model(start, clips.words, torch.ones(2)))
    with pytest.raises(ValueError, match="grid"):
        model(clips.video[:, :4], clips.words, torch.ones(2))
    with pytest.raises(ValueError, match="step"):
        video.sample(model, clips.words, 0, draw())


def test_a_perfect_denoiser_samples_the_clip():
    clips = video.draw_clips(images.digits().test, 2, draw())
    model = video.VideoDenoiser(layers=1, width=32, heads=2)
    model.forward = lambda noisy, words, noise: clips.video  # type: ignore[method-assign]
    assert torch.allclose(video.sample(model, clips.words, 4, draw(1)), clips.video, atol=1e-6)


def test_skipping_every_head_reaches_every_layer():
    model = video.VideoDenoiser(layers=2, width=32, heads=2).eval()
    clips = video.draw_clips(images.digits().test, 1, draw())
    with use(model, SparseVDiT(pattern="skip"), impl="reference", record=True) as run, torch.no_grad():
        model(clips.video, clips.words, torch.ones(1))
    assert [int(record.kept.sum()) for record in run.records] == [0, 0]


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module,name", [(diffusion, "masked_lm"), (video, "video_denoiser")])
def test_recipes_name_their_own_code(module, name):
    recipe = module.RECIPES[name]
    assert module in recipe.modules
    assert path_of(name, 0, recipe) != path_of(name, 1, recipe)


def test_a_recipe_trains_saves_and_reads_back(own_cache, monkeypatch):
    recipe = video.RECIPES["video_denoiser"]
    monkeypatch.setattr(video, "held_out_loss", lambda model: 0.5)
    one = made("video_denoiser", 0, recipe, steps=1)
    again = made("video_denoiser", 0, recipe, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert told_of(path_of("video_denoiser", 0, recipe, steps=1))["figures"]["val_loss"] == 0.5
