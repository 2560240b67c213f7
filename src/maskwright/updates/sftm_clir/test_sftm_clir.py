"""The sheet's exact checks of SFTM-CLIR, and what a module and a sum of modules must be.

A name's number is the line of the sheet's "Exact checks": 1 sums, 2 adapter table, 6 head; 3 to 5 in test_sftm_ranking.py.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import add
from maskwright.updates.sftm_clir import Modules, SftmClir, adapter_entries, compose


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        return nn.ModuleDict({"body": body, "head": nn.Linear(6, 1)})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def train(seed, ends=None):
    """A loop of three steps on numbers by chance; `ends` takes the state at the end of each phase."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randint(9, (12,), generator=rng), torch.randint(2, (12, 1), generator=rng).float()

    def run(phase):
        optimizer = torch.optim.AdamW(phase.trainable, lr=0.03, weight_decay=0.1)
        with phase.restrict(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                score = phase.model["head"](phase.model["body"](x))
                (F.binary_cross_entropy_with_logits(score, y) + phase.penalty()).backward()
                optimizer.step()
        if ends is not None:
            ends[phase.name] = state(phase.model)

    return run


HEAD = ("head.*",)
LANGUAGE = SftmClir(count=40, where=("body.0.*", "body.1.*"), l1=0.1)
RANKING = SftmClir(count=60, full=HEAD)


@pytest.fixture(scope="module")
def modules():
    model = net()
    languages = {name: LANGUAGE.fit(model, train(seed), seed=seed) for seed, name in enumerate(("en", "da", "pt"))}
    return Modules(model, RANKING.fit(model, train(7), on=languages["en"], tokenizer="t"), languages)


# --- 1: sums ------------------------------------------------------------------------------------------------------


def test_1_the_sum_is_the_same_in_either_order_and_what_dense_tensors_give(modules):
    model, ranking, danish = modules.model, modules.ranking, modules.languages["da"]
    before = state(model)
    with modules.use("en", "da"):
        found = state(model)
    with add(model, danish, ranking):
        assert same(model, found)
    for name, value in found.items():
        parts = [module[name].dense() for module in (ranking, danish) if name in module]
        whole = ranking.full.get(name, before[name])
        assert torch.equal(value, before[name] + sum(parts) if parts else whole)
    assert same(model, before) and not same(model, found)


def test_1_a_hundred_switches_leave_the_base_and_each_language_to_the_bit(modules):
    model = modules.model
    before, first, drifted = state(model), {}, state(model)
    for turn in range(100):
        name = ("en", "da", "pt")[turn % 3]
        with modules.use("en", name):
            assert same(model, first.setdefault(name, state(model)))
        assert same(model, before)
        for module in (modules.ranking, modules.languages[name]):
            for site, delta in module.items():
                drifted[site] += delta.dense()
        for module in (modules.ranking, modules.languages[name]):
            for site, delta in module.items():
                drifted[site] -= delta.dense()
    far = {site: float((drifted[site] - before[site]).abs().max()) for site in modules.ranking}
    assert 0 < max(far.values()) < 1e-4  # += and -= come back within rounding, and drift


def test_1_whose_language(modules):
    model = modules.model
    sums = {}
    for by, names in (("query", ("en",)), ("document", ("da",)), ("both", ("en", "da"))):
        with modules.use("en", "da", by):
            sums[by] = state(model)
        with compose(model, modules.ranking, *(modules.languages[name] for name in names)):
            assert same(model, sums[by])
    with modules.use("da", "da", "both"):  # once, not twice
        assert same(model, sums["document"])


def test_1_training_adds_the_source_language_and_its_module_is_the_bases(modules):
    """phi_R = theta_2 - (theta_0 + phi_en): base + phi_en + phi_R is what training ended with; the base is untouched."""
    model, english, ends = modules.model, modules.languages["en"], {}
    before, flags = state(model), [weight.requires_grad for weight in model.parameters()]
    ranking = RANKING.fit(model, train(7, ends), on=english, tokenizer="t")
    assert same(model, before) and flags == [weight.requires_grad for weight in model.parameters()]
    assert ranking.key == modules.ranking.key and ranking.made_by["on"] == english.made_by
    with compose(model, ranking, english):
        for name, value in ends["sparse"].items():
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=0)
    add(model, ranking, check="full").undo()  # the hashes are the base's, not those of base + English
    assert not any(torch.equal(ends["full"][name], ends["sparse"][name]) for name in ("body.1.weight", "head.weight"))


def test_a_loop_that_fails_leaves_the_base(modules):
    before = state(modules.model)

    def broken(phase):
        train(0)(phase)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        RANKING.fit(modules.model, broken, on=modules.languages["en"])
    assert same(modules.model, before)
    add(modules.model, modules.languages["en"]).undo()  # and nothing is on


# --- 2: sizes -----------------------------------------------------------------------------------------------------


def test_2_the_adapter_table():
    table = {1: 14_174_208, 2: 7_091_712, 4: 3_550_464, 8: 1_779_840, 16: 894_528, 32: 451_872}
    assert {reduction: adapter_entries(reduction) for reduction in table} == table
    assert {reduction: SftmClir.sized(reduction).count for reduction in table} == table
    for reduction, layers in ((5, 12), (0, 12), (1, 0)):
        with pytest.raises(BadInput, match="adapters of width 768"):
            adapter_entries(reduction, layers=layers)


@settings(max_examples=30)
@given(st.integers(1, 138), st.booleans())
def test_2_exactly_as_many_entries_as_asked_and_none_of_a_norm(count, chance):
    method = SftmClir(count=count, full=HEAD, chance=chance)
    with method.attach(net(), seed=1) as run:
        assert not any(name.startswith(("body.2", "head")) for name in run.maskable)
        for weight in run.maskable.values():
            weight.data.add_(1)
        run.select(run.count)
        assert run.masks().check().count == count


# --- 6: the head --------------------------------------------------------------------------------------------------


def test_6_the_head_is_the_ranking_modules_and_a_languages_is_refused_or_left_out_by_flag(modules):
    model, ranking = modules.model, modules.ranking
    before = state(model)
    headed = dataclasses.replace(LANGUAGE, full=HEAD).fit(model, train(4))
    assert set(headed.full) == {"head.weight", "head.bias"}
    with pytest.raises(BadInput, match=r"a language module brings head\.bias"):
        compose(model, ranking, headed)
    assert same(model, before)
    with Modules(model, ranking, {"x": headed}, drop_heads=True).use("x", "x"):
        found = state(model)
    with compose(model, ranking, headed, drop_heads=True):
        assert same(model, found)
    with compose(model, ranking, headed.without_full()):
        assert same(model, found)
    assert torch.equal(found["head.weight"], ranking.full["head.weight"]) and same(model, before)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_sums_that_make_no_sense_are_refused(modules):
    model, ranking, danish = modules.model, modules.ranking, modules.languages["da"]
    before = state(model)
    for make, message in (
        (lambda: compose(model, danish), "no head of its own"),
        (lambda: compose(model, ranking, danish, danish), "listed twice"),
        (lambda: compose(net(1), ranking, danish), "made for another base"),
        (lambda: compose(model, ranking, dataclasses.replace(danish, made_by={"tokenizer": "u"})), "tokenizers: t, u"),
        (lambda: modules.use("en", "fi"), "no module of language 'fi'; there are en, da, pt"),
        (lambda: modules.use("en", "da", "dlang"), "by is 'query', 'document' or 'both', got 'dlang'"),
    ):
        with pytest.raises(BadInput, match=message):
            make()
        assert same(model, before)
    with modules.use("en", "da"), pytest.raises(BadInput, match="already on"):
        modules.use("en", "pt")


def test_settings_that_make_no_sense_are_refused():
    for bad in ({"density": 1.1}, {"density": -0.1}, {"count": -1}, {"l1": -1.0}, {"eps": -1.0}):
        with pytest.raises(BadInput):
            SftmClir(**bad)
    with pytest.raises(BadInput, match="9999 entries were asked for, 138 of"), SftmClir(count=9999, full=HEAD).attach(net()):
        pass
    with pytest.raises(BadInput, match=r"body\.2\.weight belongs to a norm"), SftmClir(where=("body.*",)).attach(net()):
        pass
