"""Methods on Hugging Face models and on the lab's: prefill, decoding, padding, eviction, states, no trace left."""

import copy
from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch

from maskwright.attention import AttentionMethod, Causal, KeyPlan, Window, use
from maskwright.core.errors import BadInput
from maskwright.lab.models import CharLM, Vit

transformers = pytest.importorskip("transformers")


@final
@dataclass(frozen=True)
class Plain(AttentionMethod):
    """Everything the model allows, counting its calls."""

    direction: ClassVar = "both"

    def plan(self, site, state):
        state["calls"] = state.get("calls", 0) + 1
        state["begun"] = site.begins
        return site.dense()


@final
@dataclass(frozen=True)
class LastFew(AttentionMethod):
    """Drops all but the last keys of the prompt from the cache; head 1 keeps one more."""

    few: int = 6
    direction: ClassVar = "causal"

    def plan(self, site, state):
        return site.dense()

    def evict(self, site, state):
        keep = torch.zeros(site.batch, site.kv_heads, site.keys, dtype=torch.bool)
        keep[:, :, -self.few :] = True
        keep[:, 1:, -self.few - 1 :] = True
        return keep


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    told = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(told).eval()


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    told = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(told).eval()


X = torch.randint(2, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def text(model, ids=X, **more):
    more.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=6, do_sample=False, **more)


@pytest.mark.parametrize("make", [llama, mistral])
@torch.no_grad()
def test_dense_plans_leave_a_model_as_it_is(make):
    model = make()
    logits, tokens = model(X).logits, text(model)
    with use(model, Plain(), record=True) as run:
        torch.testing.assert_close(model(X).logits, logits)
        assert {r.layer for r in run.records} == {0, 1} and run.records[0].kept.tolist() == [run.records[0].allowed] * 4
        assert torch.equal(text(model), tokens)
        assert run.kv_bytes > 0
    assert torch.equal(text(model), tokens)


@torch.no_grad()
def test_padding_on_either_side():
    model, mask = llama(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    logits, tokens = model(X, attention_mask=mask).logits, text(model, attention_mask=mask)
    right = mask.flip(1)
    other = model(X, attention_mask=right).logits
    with use(model, Plain()):
        torch.testing.assert_close(model(X, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
        torch.testing.assert_close(model(X, attention_mask=right).logits[right.bool()], other[right.bool()])
        assert torch.equal(text(model, attention_mask=mask), tokens)
        holes = mask.clone()
        holes[1, 7] = 0
        with pytest.raises(BadInput, match="holes"):
            model(X, attention_mask=holes)


def test_gradients_flow_through_a_model():
    model = llama()
    grads = []
    for inside in (False, True):
        model.zero_grad()
        if inside:
            with use(model, Plain(), impl="gather"):
                model(X, labels=X, use_cache=False).loss.backward()
        else:
            model(X, labels=X, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_state_lives_as_long_as_its_cache_and_is_copied_with_it():
    from maskwright.attention.cache import state_of

    model = llama()
    with use(model, Plain()):
        cache = transformers.DynamicCache()
        model(X, past_key_values=cache)
        assert state_of(cache.layers[0]) == {"calls": 1, "begun": True}
        other = copy.deepcopy(cache)
        model(X[:, :1], past_key_values=cache)
        model(X[:, :1], past_key_values=cache)
        model(X[:, :3], past_key_values=other)
        assert state_of(cache.layers[1]) == {"calls": 3, "begun": False}
        assert state_of(other.layers[1]) == {"calls": 2, "begun": False}
        fresh = transformers.DynamicCache()
        model(X, past_key_values=fresh)
        assert state_of(fresh.layers[0])["calls"] == 1


@torch.no_grad()
def test_an_eviction_shrinks_the_cache_and_positions_stay_right():
    model = llama()
    with use(model, LastFew(few=6)) as run:
        cache = transformers.DynamicCache()
        model(X, past_key_values=cache)
        layer = cache.layers[0]
        assert layer.keys.shape == (2, 2, 7, 8) and cache.get_seq_length() == 20
        assert layer.first.tolist() == [[1, 0], [1, 0]] and run.kv_bytes == 2 * 2 * 2 * 2 * 7 * 8 * 4
        step = model(X[:, :1], past_key_values=cache).logits
        assert cache.layers[0].keys.shape[2] == 8 and cache.get_seq_length() == 21
        many = text(model)
    # the same by a mask over the whole cache: a window that ends with the prompt
    cache = transformers.DynamicCache()
    model(X, past_key_values=cache)

    @final
    @dataclass(frozen=True)
    class Masked(AttentionMethod):
        def plan(self, site, state):
            if site.queries > 1:
                return site.dense()
            keep = torch.zeros(1, site.kv_heads, 1, site.keys, dtype=torch.bool)
            keep[:, 0, :, 14:], keep[:, 1, :, 13:] = True, True
            from maskwright.attention import Pieces

            return KeyPlan(1, site.keys, site.structure, Pieces.from_keep(keep, 1, 1))

    with use(model, Masked()):
        torch.testing.assert_close(model(X[:, :1], past_key_values=cache).logits, step)
        assert torch.equal(text(model), many)
    beams = model.generate(X, max_new_tokens=4, num_beams=2, do_sample=False, attention_mask=torch.ones_like(X))
    with use(model, LastFew(few=20)):
        assert torch.equal(
            model.generate(X, max_new_tokens=4, num_beams=2, do_sample=False, attention_mask=torch.ones_like(X)), beams
        )


@torch.no_grad()
def test_set_attn_implementation_by_name(monkeypatch):
    from maskwright.attention import huggingface

    model = llama()
    with use(model, LastFew()):
        want = text(model)
    monkeypatch.setattr(huggingface, "get", lambda slug: LastFew)
    model.set_attn_implementation("maskwright:sliding_window")
    assert torch.equal(text(model), want)  # also the first time, when the cache is not known at the prefill
    assert torch.equal(text(model), want)
    other = llama()
    other.set_attn_implementation("maskwright:sliding_window")
    cache = transformers.DynamicCache()
    other(X, past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    one, two = (other(X[:, :1], past_key_values=c).logits for c in copies)
    assert torch.equal(one, two) and copies[1].layers[0].keys.shape[2] == 8
    model.set_attn_implementation("sdpa")
    assert torch.equal(text(model), text(llama()))


def test_no_trace_is_left():
    model = llama()
    before = copy.deepcopy(dict(model.config.to_dict()))
    with pytest.raises(ZeroDivisionError), use(model, Plain()):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == before
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    lab = CharLM(10, layers=1, width=16, heads=2, context=8)
    was = lab.blocks[0].attention.attend
    with use(lab, Plain()):
        assert lab.blocks[0].attention.attend is not was
    assert lab.blocks[0].attention.attend is was


@torch.no_grad()
def test_lab_models_and_sessions_without_a_cache():
    lm, vit = CharLM(10, layers=2, width=16, heads=2, context=8), Vit(8, 4, layers=2, width=16, heads=2)
    ids, image = torch.arange(8)[None], torch.rand(1, 1, 8, 8)
    for model, x in ((lm, ids), (vit, image)):
        want = model(x)
        with use(model, Plain()) as run:
            torch.testing.assert_close(model(x), want)
            model(x)
            calls = {layer: state["calls"] for layer, state in run._states.items()}
            assert calls == ({} if model is lm else {0: 2, 1: 2})
            run.tell(step=0)
            model(x)
            assert model is lm or run._states[1]["calls"] == 1


@torch.no_grad()
def test_what_cannot_be_done_is_refused_in_one_line():
    @final
    @dataclass(frozen=True)
    class Wrong(AttentionMethod):
        def plan(self, site, state):
            return KeyPlan(site.queries, site.keys + 1, Causal())

    @final
    @dataclass(frozen=True)
    class Around(AttentionMethod):
        direction: ClassVar = "bidirectional"

        def plan(self, site, state):
            return KeyPlan(site.queries, site.keys, Window(2, 1))

    model = llama()
    with pytest.raises(BadInput, match="bidirectional attention; this model's attention is causal"), use(model, Around()):
        raise AssertionError
    with use(model, Wrong()), pytest.raises(BadInput, match="Wrong, layer 0: the plan is for 20 queries and 21 keys"):
        model(X)
    with pytest.raises(BadInput, match="not str"), use(model, "quest"):
        raise AssertionError
    with pytest.raises(BadInput, match="no attention layer"), use(torch.nn.Linear(2, 2), Plain()):
        raise AssertionError
    dropping = llama(attention_dropout=0.1).train()
    with use(dropping, Plain()), pytest.raises(BadInput, match="attention dropout"):
        dropping(X)
    with use(model, Plain()), pytest.raises(BadInput, match="4-D"):
        model(X, attention_mask=torch.zeros(2, 1, 20, 20))
    with use(model, Plain()), pytest.raises(BadInput, match="static cache"):
        model.generate(X, max_new_tokens=2, cache_implementation="static", attention_mask=torch.ones_like(X))
    model.set_attn_implementation("maskwright:active")
    with pytest.raises(BadInput, match="works inside"):
        model(X)


def test_importing_the_place_does_not_import_transformers():
    import subprocess
    import sys

    code = "import sys, maskwright.attention as a; print('transformers.modeling_utils' in sys.modules);"
    code += "from transformers.modeling_utils import AttentionInterface as A; print('maskwright:sliding_window' in A())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
