"""Encoders on a part of their tokens: all tokens are the model's own forward, hidden ones have no part in it."""

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import Exact, visible
from maskwright.inputs.vit import Decoder, HfVit, SmallVit, TokenEncoder, encode, encoder_of, sincos


def hf(**settings):
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
            num_channels=3, **settings,
        )  # fmt: skip
        return ViTModel(told).eval()


def small(**settings):
    return SmallVit(16, 4, **{"width": 16, "layers": 2, "heads": 2, **settings})


X = torch.rand(3, 3, 16, 16, generator=generator(0))
models = pytest.mark.parametrize("made", [hf, small])


@models
@torch.no_grad()
def test_all_tokens_are_the_models_own_forward(made):
    model = made()
    encoder = encoder_of(model)
    assert isinstance(encoder, TokenEncoder) and (encoder.patch, encoder.width) == (4, 16)
    seen = encode(encoder, encoder.embed(X), Mask(torch.ones(3, 4, 4, dtype=torch.bool)))
    if made is hf:
        assert torch.allclose(seen.values, model(X).last_hidden_state[:, 1:], atol=1e-6)
    else:
        assert torch.equal(seen.values.mean(1), model(X))
    assert seen.values.shape == (3, 16, 16)


@models
@torch.no_grad()
def test_hidden_pixels_have_no_part_and_the_blocks_see_only_what_is_kept(made):
    encoder = encoder_of(made())
    mask = Exact(0.25)((3, 4, 4), rng=generator(1))
    other = torch.where(mask.keep.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None], X, X + 5)
    assert not torch.equal(X, other)
    first, second = (encode(encoder, encoder.embed(x), mask) for x in (X, other))
    assert torch.equal(first.values, second.values) and first.values.shape == (3, 4, 16)
    counted = []

    class Spy:
        patch, width, norm = 4, 16, staticmethod(encoder.norm)

        def blocks(self, tokens):
            counted.append(tokens.shape[1])
            return encoder.blocks(tokens)

    encode(Spy(), encoder.embed(X), mask)
    assert counted == [4]


def test_restoring_undoes_taking_out():
    tokens = torch.rand(3, 16, 5, generator=generator(2))
    mask = Exact(0.5)((3, 16), rng=generator(3))
    seen = visible(tokens, mask)
    back = seen.put_back(seen.values, float("nan"))
    assert torch.equal(back[mask.keep], tokens[mask.keep]) and back[~mask.keep].isnan().all()


def test_training_the_adapter_trains_the_model_it_holds():
    model = hf()
    encoder = encoder_of(model)
    mask = Exact(0.5)((3, 4, 4), rng=generator(1))
    encode(encoder, encoder.embed(X), mask).values.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["pooler.dense.weight", "pooler.dense.bias"]
    wrapped = nn.Module()
    wrapped.vit = model
    assert isinstance(encoder_of(wrapped), HfVit) and encoder_of(wrapped).model is model


def test_positions_by_hand():
    found = sincos((2, 3), 4)
    sines, cosines = torch.arange(3.0).sin(), torch.arange(3.0).cos()
    want = [[sines[r], cosines[r], sines[c], cosines[c]] for r in range(2) for c in range(3)]
    assert torch.allclose(found, torch.tensor(want))
    # eight features: rates 1 and 10000 ** -1/2
    assert torch.allclose(sincos((1, 2), 8)[1], torch.tensor([0, 0, 1, 1, 0.841471, 0.0099998, 0.540302, 0.99995]))


def decoder(**settings):
    told = {"width": 8, "layers": 1, "heads": 2, "rng": generator(5), **settings}
    return Decoder(16, 7, (4, 4), **told)


def test_the_decoder_fills_hidden_places_with_one_token_and_their_positions():
    net, seen = decoder(), visible(torch.rand(2, 16, 16, generator=generator(4)), Exact(0.5)((2, 16), rng=generator(6)))
    got = []
    net.layers.register_module("0", nn.Identity())
    net.last.register_forward_pre_hook(lambda _, given: got.append(given[0]))
    assert net(seen).shape == (2, 16, 7)
    keep = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, seen.index, True)
    bare = got[0] - net.positions
    assert torch.allclose(bare[~keep], net.mask_token.expand(16, 8), atol=1e-6)
    assert torch.allclose(bare[keep], net.inlet(seen.values).flatten(0, 1), atol=1e-6)


def test_seeds_and_the_global_generator():
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(small().parameters(), small().parameters(), strict=True))
    assert not torch.equal(small().inlet.weight, small(seed=1).inlet.weight)
    assert torch.equal(decoder().mask_token, decoder().mask_token)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="Conv2d cannot run on a part of its tokens"):
        encoder_of(nn.Conv2d(1, 1, 1))
    with pytest.raises(BadInput, match=r"patch of 5 x 5 does not divide images of 16 x 16"):
        SmallVit(16, 5)
    with pytest.raises(BadInput, match="heads dividing the width: 2, 3, 16"):
        small(heads=3)
    with pytest.raises(BadInput, match="width divisible by 4, got 6"):
        small(width=6)
    with pytest.raises(BadInput, match="the decoder needs layers and heads"):
        decoder(layers=0)
    for made in (hf, small):
        with pytest.raises(BadInput, match=r"takes images \(batch, 3, 16, 16\), got shape \(1, 1, 16, 16\)"):
            encoder_of(made()).embed(torch.zeros(1, 1, 16, 16))
    encoder, broken = small(), X.clone()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        encode(encoder, encoder.embed(broken), Mask(torch.ones(3, 16, dtype=torch.bool)))
    ragged = torch.ones(3, 16, dtype=torch.bool)
    ragged[0, 0] = False
    with pytest.raises(BadInput, match="keep 15 to 16 tokens"):
        encode(encoder, encoder.embed(X), Mask(ragged))
