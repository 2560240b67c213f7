"""The contract of the attention place: generated from the cards, every room passes it without a line of its own."""

import copy

import pytest
import torch

from maskwright.attention import AttentionMethod, State, use
from maskwright.attention.huggingface import hosts
from maskwright.core.errors import BadInput
from maskwright.core.method import methods
from maskwright.lab.decoder import llama
from maskwright.lab.models import Vit

transformers = pytest.importorskip("transformers")

CARDS = [c for c in methods("attention") if c.contract.kind == "mask"]
CAUSAL = [c for c in CARDS if c.load().direction != "bidirectional"]
AROUND = [c for c in CARDS if c.load().direction != "causal"]
each = pytest.mark.parametrize
LENGTH = 96
IDS = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def small():
    return llama(64, layers=2, width=64, heads=4, kv_heads=2, hidden=64)


def method(card):
    return card.load()(**card.contract.tiny)


def model_for(card):
    """A tiny model, prepared as the room's `convert` prepares one where its masks have weights of their own."""
    model = small()
    convert = getattr(__import__(card.module, fromlist=["convert"]), "convert", None)
    if convert is not None:
        convert(model)
    return model


@each("card", CARDS, ids=lambda c: c.slug)
def test_it_is_a_method_of_this_place(card):
    made = method(card)
    assert isinstance(made, AttentionMethod) and made.direction in ("causal", "bidirectional", "both")
    assert made == method(card) and hash(made) == hash(method(card))


@each("card", CAUSAL, ids=lambda c: c.slug)
@torch.no_grad()
def test_runs_in_a_causal_model_and_leaves_no_trace(card):
    model = model_for(card)
    config, hooks = copy.deepcopy(model.config.to_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    plain = model(IDS).logits
    with use(model, method(card), record=True) as run:
        first = model(IDS).logits
        assert torch.isfinite(first).all()
        assert {r.layer for r in run.records} == {0, 1}
        for record in run.records:
            assert (record.kept <= record.allowed).all() and (record.kept > 0).all()
        run.record = False
        torch.testing.assert_close(model(IDS).logits, first)  # a new request begins anew
        alone = model(IDS[1:]).logits  # a sample does not depend on those beside it
        torch.testing.assert_close(alone, first[1:], atol=1e-5, rtol=1e-4)
        made = model.generate(IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS))
        assert made.shape == (2, LENGTH + 4)
    assert torch.equal(model(IDS).logits, plain)
    assert model.config.to_dict() == config and [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@each("card", CAUSAL, ids=lambda c: c.slug)
@torch.no_grad()
def test_copies_of_a_cache_go_on_by_themselves(card):
    model = model_for(card)
    with use(model, method(card)):
        cache = transformers.DynamicCache()
        model(IDS, past_key_values=cache)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        steps = [IDS[:, :1], IDS[:, 1:2], IDS[:, 2:3]]
        one = [model(x, past_key_values=copies[0]).logits for x in steps]
        two = [model(x, past_key_values=copies[1]).logits for x in steps]
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b)
        assert cache.get_seq_length() == LENGTH and copies[0].get_seq_length() == LENGTH + 3


@each("card", CAUSAL, ids=lambda c: c.slug)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing_for_the_other_sample(card):
    model, mask = model_for(card), torch.ones_like(IDS)
    mask[0, :11] = 0
    with use(model, method(card)):
        got = model(IDS, attention_mask=mask).logits
        assert torch.isfinite(got[mask.bool()]).all()
        torch.testing.assert_close(got[1:], model(IDS[1:]).logits, atol=1e-5, rtol=1e-4)
        model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=mask)


@each("card", CAUSAL, ids=lambda c: c.slug)
@torch.no_grad()
def test_answers_to_its_name_in_attention_interface(card):
    model = model_for(card)
    model.set_attn_implementation(f"maskwright:{card.slug}")
    assert torch.isfinite(model(IDS).logits).all()
    made = model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert made.shape == (2, LENGTH + 3)
    with pytest.raises(BadInput), use(model, object()):
        raise AssertionError
    assert len(hosts(model)) == 2


@each("card", AROUND, ids=lambda c: c.slug)
@torch.no_grad()
def test_runs_in_a_bidirectional_model(card):
    vit, x = Vit(32, 4, layers=2, width=16, heads=2), torch.rand(2, 1, 32, 32)
    before = [block.attention.attend for block in vit.blocks]
    plain = vit(x)
    with use(vit, method(card)) as run:
        for step in range(4):
            run.tell(step=step, steps=4, new_tokens=16)
            assert torch.isfinite(vit(x)).all()
    assert [block.attention.attend for block in vit.blocks] == before and torch.equal(vit(x), plain)


@each("card", [c for c in CARDS if c not in CAUSAL], ids=lambda c: c.slug)
def test_a_bidirectional_method_is_refused_by_a_causal_model(card):
    with pytest.raises(BadInput, match="bidirectional"), use(small(), method(card)):
        raise AssertionError


def test_states_are_plain_mappings_that_copy():
    state = State(a=torch.zeros(2))
    other = copy.deepcopy(state)
    other["a"][0] = 1
    assert state["a"][0] == 0 and isinstance(other, State)
