"""What the claim's ungated part stands on: layers cut off a BERT, and a search that brackets its best rate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.select import generator
from maskwright.updates.sparse_mezo.worlds import TopLayers, World, adapted, arms, effects, measured, search


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_layers_on_stored_states_are_the_whole_model(count):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        )
        encoder = transformers.BertModel(config).eval()
    ids = torch.randint(1, 30, (70, 7), generator=generator(0))
    ids[::2, 4:] = 0
    ids[1::3, 6:] = 0
    head = F.normalize(torch.randn(5, 16, generator=generator(1)), dim=-1)
    real = ids != 0
    with torch.no_grad():
        hidden = encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        mean = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        whole = 20 * F.normalize(mean, dim=-1) @ head.T
        model = TopLayers(encoder, head, 20.0, count).eval()
        states = TopLayers.states(encoder, ids, count)
        torch.testing.assert_close(model(states), whole, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(states[::2]), whole[::2], rtol=0, atol=1e-4)  # all short: cut
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[3] for name in trained} == {str(layer) for layer in range(count)}
    assert all(p.requires_grad for p in encoder.parameters()) and len(encoder.encoder.layer) == 3


@pytest.mark.parametrize("lowest", [-1, 3, 5])
def test_the_search_ends_with_the_best_between_two_that_are_worse(lowest):
    asked = []

    def at(octave):
        asked.append(octave)
        return abs(octave - lowest)

    assert search(at, 3, reach=1, moves=9) == lowest
    assert {lowest - 1, lowest, lowest + 1} <= set(asked) <= set(range(-2, 7))


def linear(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(4, 3)
    x = torch.randn(60, 4, generator=generator(seed))
    y = x[:, :3].argmax(-1)
    return World(model, (x[:30], y[:30]), (x[30:45], y[30:45]), (x[45:], y[45:]), steps=10)


def test_a_run_adapts_a_copy_and_the_same_one_each_time():
    world = linear(0)
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    once, again = (adapted(world, "random", 12, 0) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in world.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert measured(once, world.train)["loss"] < measured(world.model, world.train)["loss"]
    with torch.no_grad():
        once.bias[0] = float("nan")
    assert measured(once, world.test)["loss"] == float("inf")


def test_arms_and_effects_go_together_and_gate_nothing():
    start = {"dense": 10, "small": 12, "large": 12}
    made, told = arms("a", linear, start), effects("a", "A", start)
    assert list(made) == ["a_before", "a_dense", "a_small", "a_large"] and len(told) == 4
    figures = {name: arm(0, "full") for name, arm in made.items()}
    for effect in told:
        assert (
            effect.kind == "quality" and effect.figure in figures[effect.better] and effect.figure in figures[effect.worse]
        )
    assert all(3 <= figures[name]["rates"] <= 5 and figures[name]["inside"] in (0, 1) for name in made if name != "a_before")
