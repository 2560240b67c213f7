"""MaPO's mask: its scale, what it watches in models of several forms, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.sparsepo import SparsePo, activation_mask
from maskwright.inputs.sparsepo.activations import TYPES, Watch, rescaled
from maskwright.lab.decoder import llama

IDS = torch.randint(1, 11, (3, 8), generator=generator(0, "ids"))
RESPONSE = torch.ones(3, 7, dtype=torch.bool)
RESPONSE[:, :2], RESPONSE[1, 5:] = False, False


def models():
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield llama(11, layers=2, width=16, heads=2, kv_heads=1, hidden=16, context=16)
        yield transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ).eval()
        config = transformers.GPTNeoXConfig(
            vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        yield transformers.GPTNeoXForCausalLM(config).eval()


def rows(seed, spread=3.0):
    return spread * torch.randn(3, 7, generator=generator(seed, "rows"), dtype=torch.float64)


def test_on_numbers_worked_out_by_hand():
    active = torch.tensor([[9.0, 1.0, 3.0, 2.0, -5.0]])
    response = torch.tensor([[False, True, True, True, False]])
    assert rescaled(active, response).tolist() == [[0.0, 0.0, 1.0, 0.5, 0.0]]


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_each_row_runs_from_0_to_1_and_shift_and_scale_do_not_matter(seed):
    active = rows(seed)
    share = rescaled(active, RESPONSE)
    assert bool((share[~RESPONSE] == 0).all())
    for row, keep in zip(share, RESPONSE, strict=True):
        assert row[keep].min() == 0 and row[keep].max() == 1
    torch.testing.assert_close(rescaled(2 * active + 3, RESPONSE), share, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_normalising_first_changes_nothing(seed):
    active, whole = rows(seed), rescaled(rows(seed), RESPONSE)
    for row, (values, keep) in enumerate(zip(active, RESPONSE, strict=True)):
        z = (values[keep] - values[keep].mean()) / (values[keep].std() + 1e-12)
        wanted = (z - z.min()) / (z.max() - z.min())
        torch.testing.assert_close(whole[row][keep], wanted, rtol=0, atol=1e-5)


def test_one_token_and_constant_activity_weigh_1_and_nan_is_refused():
    one = torch.tensor([[False, True, False]])
    assert rescaled(torch.tensor([[5.0, -2.0, 7.0]]), one).tolist() == [[0.0, 1.0, 0.0]]
    assert rescaled(torch.full((1, 3), 4.0), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[1.0, 1.0, 1.0]]
    assert rescaled(torch.tensor([[torch.nan, -2.0, torch.nan]]), one).tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(BadInput, match="not finite"):
        rescaled(torch.tensor([[0.0, torch.nan, 0.0]]), one)
    with pytest.raises(BadInput, match="not finite"):
        SparsePo(mask="mapo").keep(torch.full((1, 3, 2), torch.nan))


def test_every_type_is_found_in_models_of_three_forms():
    for model in models():
        model.requires_grad_(True)
        name = type(model).__name__
        with Watch(model) as watch:
            model(input_ids=IDS)
        layers = 2
        assert len(watch.seen["mlp"]) == layers, name
        # query, key, value (one where fused) and the mixed values
        assert len(watch.seen["attention"]) == layers * (4 if name.startswith("Llama") else 2), name
        # each of two norms a block and the last one, in and out, and what attention and MLP add
        assert len(watch.seen["residual"]) == layers * 6 + 2, name
        assert not [m for m in model.modules() if m._forward_hooks]
        found = {kind: activation_mask(model, IDS, RESPONSE, kind) for kind in TYPES}
        for mask in found.values():
            assert mask.shape == (3, 7) and not mask.requires_grad
            assert 0 <= mask.min() and mask.max() <= 1 and bool((mask[~RESPONSE] == 0).all())
        assert found["logits"].max() == 1
        torch.testing.assert_close(activation_mask(model, IDS, RESPONSE), torch.stack(list(found.values())).mean(0))


def test_the_logits_mask_is_their_mean_one_place_before_the_token():
    model = next(models())
    logits = model(input_ids=IDS).logits.detach()
    mask = activation_mask(model, IDS, RESPONSE, ["logits"])
    torch.testing.assert_close(mask, rescaled(logits[:, :-1].mean(-1), RESPONSE))


def test_unknown_types_and_models_without_one_are_refused():
    model = next(models())
    with pytest.raises(BadInput, match="heads"):
        activation_mask(model, IDS, RESPONSE, ["mlp", "heads"])
    for layer in model.model.layers:
        layer.mlp = torch.nn.Linear(16, 16)
    with pytest.raises(BadInput, match="LlamaForCausalLM has no module of the type 'mlp'"):
        activation_mask(model, IDS, RESPONSE)
