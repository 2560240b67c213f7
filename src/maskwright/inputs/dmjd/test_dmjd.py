"""DMJD: coupled views with exact unions, a visible branch that stands alone, the paper's rate, refused settings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.dmjd import Dmjd
from maskwright.inputs.dmjd.distil import Distil
from maskwright.inputs.vit import SmallVit


def hidden(tokens, seed=0, **asked):
    return ~Dmjd(block=1, **asked).keep(torch.zeros(6, tokens), rng=generator(seed)).keep


@pytest.mark.parametrize(
    ("tokens", "rho", "cover", "gone", "union", "both"),
    [
        (10, 0.6, 1.0, 6, 10, 2),
        (100, 0.8, 1.0, 80, 100, 60),  # int(100 * 0.2) is 19 in the code's floats
        (10, 0.9, 1.0, 9, 10, 8),  # and int(10 * 0.1) is 0
        (196, 0.75, 1.0, 147, 196, 98),
        (64, 0.6, 0.75, 38, 48, 28),
        (64, 0.5, 1.0, 32, 64, 0),
    ],
)
def test_unions_and_intersections_are_exact_for_every_image(tokens, rho, cover, gone, union, both):
    first, second = hidden(tokens, density=round(1 - rho, 2), cover=cover)
    assert first.sum(1).tolist() == second.sum(1).tolist() == [gone] * 6
    assert (first | second).sum(1).tolist() == [union] * 6 and (first & second).sum(1).tolist() == [both] * 6
    assert not torch.equal(first[0], first[1])  # each image has a draw of its own


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(1, 19), st.integers(0, 20), st.integers(0, 99))
def test_any_settings_the_class_takes_cover_what_they_say(tokens, kept, more, seed):
    density, cover = kept / 20, min(20, 20 - kept + more) / 20
    try:
        views = hidden(tokens, seed, density=density, cover=cover)
    except BadInput:
        # rounding to whole tokens, or two views that cannot reach so far
        gone, union = tokens - whole(density, tokens), whole(cover, tokens)
        assert gone == tokens or not gone <= union <= 2 * gone or 2 * (20 - kept) < 20 - kept + more
        return
    assert (views.sum(2) == tokens - whole(density, tokens)).all()
    assert (views.any(0).sum(1) == whole(cover, tokens)).all()


def test_half_is_the_complement_and_a_cover_of_one_views_share_makes_them_coincide():
    first, second = hidden(64, density=0.5)
    assert torch.equal(first, ~second)
    first, second = hidden(10, density=0.4, cover=0.6)
    assert torch.equal(first, second)


def test_three_views_cover_what_two_cannot():
    views = hidden(12, density=0.75, views=3, cover=0.75)
    assert views.sum((0, 2)).tolist() == [9] * 6 and views.any(0).sum(1).tolist() == [9] * 6
    with pytest.raises(BadInput, match=r"2 views of density 0\.75 cannot cover 1\.0: it takes 4 views"):
        Dmjd(density=0.75)


def test_blocks_are_hidden_whole_with_the_papers_counts():
    keep = Dmjd().keep(torch.zeros(5, 8, 8), rng=generator(1)).keep
    cells = keep.view(2, 5, 4, 2, 4, 2)
    assert torch.equal(cells, cells[:, :, :, :1, :, :1].expand_as(cells))
    # 64 - 4 * int(16 * 0.4) = 40 hidden in each view, every token in some view
    assert (~keep).flatten(2).sum(2).unique().tolist() == [40] and (~keep).any(0).all()
    for shape, told in (((1, 7, 8), "7 x 8"), ((2, 64), "64")):  # a row of tokens has no 2 x 2 blocks
        with pytest.raises(BadInput, match=f"a grid of {told} tokens cannot be cut into blocks of 2 x 2; block=1"):
            Dmjd().keep(torch.zeros(shape))
    with pytest.raises(BadInput, match="a grid of 3 x 3 tokens"):
        Dmjd().learner(SmallVit(12, 4, channels=1, width=16, layers=1), torch.zeros(1, 1, 12, 12))


X = torch.rand(3, 1, 16, 16, generator=generator(0))


def made(**asked):
    model = SmallVit(16, 4, channels=1, width=16, layers=1, heads=2)
    return Dmjd(**{"block": 1, "decoder_heads": 2, **asked}).learner(model, X)


def test_both_losses_are_told_and_added():
    one = made(theta=0.5)
    parts = one.parts(X, generator(2))
    assert parts.mask.shape == (6, 4, 4) and parts.visible is not None and parts.visible > 0
    assert torch.allclose(one.loss(X, generator(2)), parts.masked + 0.5 * parts.visible)
    alone = made(theta=0.0)
    assert alone.aside is None and alone.parts(X, generator(2)).visible is None
    assert torch.equal(alone.loss(X, generator(2)), parts.masked)


def test_the_visible_branch_knows_nothing_of_the_decoder():
    one = made()
    before = one.parts(X, generator(2))
    with torch.no_grad():
        for weight in one.decoder.parameters():
            weight.add_(1.0)
    after = one.parts(X, generator(2))
    assert torch.equal(before.visible, after.visible) and not torch.equal(before.masked, after.masked)
    after.visible.backward()
    assert all(weight.grad is None for weight in one.decoder.parameters())
    assert one.backbone.inlet.weight.grad.abs().sum() > 0


def test_a_kept_token_is_told_from_itself_and_the_loss_is_smooth_l1():
    branch, kept = Distil(16, 9, 2.0, rng=generator(3)), torch.rand(2, 5, 16, generator=generator(4))
    told = branch.predict(kept)
    moved = kept.clone()
    moved[0, 3] += 1
    other = branch.predict(moved)
    assert torch.equal(other[0, :3], told[0, :3]) and torch.equal(other[1], told[1])
    assert not torch.equal(other[0, 3], told[0, 3])
    far, near = told + 3.0, told + 1.0  # beta 2: 3 - 1 = 2 and 1 / (2 * 2) = 0.25
    assert torch.allclose(branch(kept, far), torch.tensor(2.0)) and torch.allclose(branch(kept, near), torch.tensor(0.25))
    assert not list(branch.projector[-1].parameters())


def test_the_papers_rate_counts_new_tokens_not_views():
    assert Dmjd(density=0.4).rate(6e-4, 256) == pytest.approx(1e-3)  # 6e-4 * 256 * (1 / 0.6) / 256
    assert Dmjd(density=0.4, cover=0.6).rate(6e-4, 512) == pytest.approx(1.2e-3)


def test_settings_that_make_no_sense():
    bad = [{"density": 1.0}, {"views": 0}, {"cover": 0.5}, {"block": 0}, {"theta": -1.0}, {"theta": float("nan")}]
    bad += [{"beta": 0.0}, {"target": "image"}, {"decoder_layers": 0}]
    for one in bad:
        with pytest.raises(BadInput):
            Dmjd(**one)
    with pytest.raises(BadInput, match=r"cannot cover 0\.5: it takes a density of at least 0\.5"):
        Dmjd(density=0.4, cover=0.5)
