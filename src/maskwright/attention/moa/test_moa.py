"""The sheet's exact checks of MoA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention import AttentionMethod, AttentionSite, Causal, KeyPlan, Padding, State, attend, use
from maskwright.attention.heads import HeadPlan, Rule
from maskwright.attention.moa import Moa
from maskwright.attention.moa.profile import answer_loss, answered, entries, influence, profile
from maskwright.attention.moa.rules import band, candidates, density, losses
from maskwright.attention.moa.search import influence_of_groups
from maskwright.core.errors import BadInput

BLOCK = 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_of(q, k, first=None):
    structure = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, k.shape[2]))
    offset = k.shape[2] - q.shape[2]
    return AttentionSite(0, 2, q, k, k, q.shape[-1] ** -0.5, structure, offset, offset == 0, first=first)


def plan_of(pairs, block=BLOCK, sink=1, group=2):
    rules = tuple(tuple(Rule("affine", {"alpha": a, "beta": b}) for a, b in layer for _ in range(group)) for layer in pairs)
    heads = group * len(pairs[0])
    return HeadPlan("moa", len(pairs), heads, len(pairs[0]), rules, {"block": block, "sink": sink})


MIXED = plan_of([[(BLOCK, 0.0), (-BLOCK, 0.5)], [(2 * BLOCK, 0.25), (BLOCK, 0.0)]])


def tiny(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_an_entry_is_the_exact_change_of_a_loss_linear_in_the_output():
    logits, v, grad = randn(6, 6), randn(6, 5, seed=1), randn(6, 5, seed=2)
    seen = torch.ones(6, 6).tril().bool()
    share = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    got = entries(share, grad @ v.T, torch.arange(6)[:, None] == 0)
    for i, j in seen.nonzero().tolist():
        left = share[i].clone()
        left[j] = 0
        left = left / left.sum() if i else left
        assert got[i, j] == pytest.approx(float(((left - share[i]) @ v) @ grad[i]), abs=1e-11)
    # sum_j E_ij (1 - A_ij) = 0 for every row but the first
    assert (got * (1 - share)).masked_fill(~seen, 0)[1:].sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("absolute", ["after", "before"])
@pytest.mark.parametrize("length", [12, 14])
def test_influence_sums_the_entries_of_blocks(length, absolute, monkeypatch):
    q, k, v, grad = randn(2, 4, length, 8), *(randn(2, 2, length, 8, seed=s) for s in (1, 2)), randn(2, 4, length, 8, seed=3)
    want = torch.zeros(2, 4, -(-length // BLOCK), -(-length // BLOCK), dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            seen = torch.ones(length, length).tril().bool()
            share = (q[b, h] @ k[b, h // 2].T * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
            lost = entries(share, grad[b, h] @ v[b, h // 2].T, torch.arange(length)[:, None] == 0).masked_fill(~seen, 0)
            for i in range(length):
                for j in range(i + 1):
                    want[b, h, i // BLOCK, j // BLOCK] += lost[i, j].abs() if absolute == "before" else lost[i, j]
    for entries_at_a_time in (1, 1 << 24):
        monkeypatch.setattr("maskwright.attention.moa.profile._ENTRIES", entries_at_a_time)
        assert torch.allclose(influence(q, k, v, grad, 0.3, BLOCK, absolute), want, atol=1e-9)


class Biased(AttentionMethod):
    """Dense attention with a bias of zeros, whose gradient tells each entry's share of the loss."""

    def __init__(self):
        self.seen = []

    def plan(self, site, state):
        bias = torch.zeros(site.batch, site.heads, site.queries, site.keys, requires_grad=True)
        self.seen.append((site, bias))
        return KeyPlan(site.queries, site.keys, site.structure, bias=bias)


def test_the_profile_of_a_model_agrees_with_the_gradient_of_a_bias():
    model, ids = tiny(), torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    got = profile(model, ids, 5, BLOCK, Moa(density=1.0), batch=2)
    told = Biased()
    with use(model, told, impl="gather"):
        answer_loss(model, ids, 5).backward()
    assert got.shape == (2, 4, 4, 4) and model.config._attn_implementation == "sdpa"
    for layer, (site, bias) in enumerate(told.seen):
        k = site.k.repeat_interleave(2, 1)
        share = (site.q @ k.mT * site.scale).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
        lost = (-bias.grad / (1 - share)).sum(0)
        lost[:, 0, 0] = 0
        want = lost.unflatten(2, (4, 4)).unflatten(1, (4, 4)).sum((2, 4)).detach()
        inside = torch.ones(4, 4).tril().bool()
        inside[0, 0] = False  # holds row 0, which has nothing to renormalise
        assert torch.allclose(got[layer][:, inside], want[:, inside], atol=1e-5, rtol=1e-3)
    assert all(p.grad is not None for p in model.parameters())  # of the bias run; the profile itself gives none
    model.zero_grad(set_to_none=True)
    profile(model, ids, 5, BLOCK, Moa(density=1.0))
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_a_cache_is_profiled_and_answers_too():
    from maskwright.lab.models import CharLM

    model, ids = CharLM(20, layers=2, width=16, heads=2, context=16, seed=0).eval(), torch.randint(0, 20, (2, 12))
    said = answered(model, ids, 16)
    assert said.shape == (2, 16) and torch.equal(said[:, 12], model(ids)[:, -1].argmax(-1))
    assert profile(model, said, 4, BLOCK, Moa(density=1.0)).shape == (2, 2, 4, 4)


def test_the_model_answers_by_itself():
    model, ids = tiny(), torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
                          eos_token_id=None)  # fmt: skip
    assert torch.equal(answered(model, ids, 16), want)
    with pytest.raises(BadInput, match="leave no answer"):
        answered(model, ids, 10)


def test_bands_and_densities():
    assert band(256, 0, 1024, 64) == 4 and density(4, 1024, 64, 1) == 5 / 16
    assert band(0, 1, 1024, 64) == 16 and density(16, 1024, 64, 1) == 1.0
    assert [band(300, 0, n, 64) for n in (256, 512, 4096)] == [4, 4, 4]
    assert band(-65, 0.5, 1024, 64) == 6  # alpha / 64 is floored downward: -2
    assert band(-1024, 0.125, 1024, 64) == 1


def test_the_search_space():
    rules = candidates((128, 256), 512, 8, 64, 9)
    assert (0.0, 1.0) in rules and len(set(rules)) == len(rules)
    for alpha, beta in rules:
        assert alpha + beta * 256 <= 256 and alpha + beta * 512 <= 512 and alpha + beta * 128 > 0
    bands = [tuple(band(*rule, n, 8) for n in (128, 256, 512)) for rule in rules]
    assert len(set(bands)) == len(bands)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_losses_are_what_the_layout_leaves_out_and_fall_with_the_band(n, sink, seed):
    blocks = randn(2, 3, n, n, seed=seed).abs()
    got = losses(blocks, list(range(1, n + 3)), sink)
    for wide in range(1, n + 3):
        out = torch.tensor([[j <= i and i - j >= wide and j >= sink for j in range(n)] for i in range(n)])
        assert torch.allclose(got[..., wide - 1], (blocks * out).sum((-1, -2)))
    assert (got.diff(dim=-1) <= 1e-12).all() and (got[..., n - 1 :] == 0).all()


def test_signs_cancel_before_the_absolute_and_groups_take_the_greatest():
    blocks = torch.tensor([1.0, -3.0, 2.0, 0.5]).view(1, 4, 1, 1)
    assert influence_of_groups(blocks, 2).flatten().tolist() == [3.0, 2.0]


def brute(keys, i, wide, sink, first=0, prompt=True):
    """Keys that the row at position i sees."""
    at = i - first
    low = (at // BLOCK - wide + 1) * BLOCK if prompt else at - wide * BLOCK + 1
    return [first <= j <= i and (j - first < sink * BLOCK or j - first >= low) for j in range(keys)]


@pytest.mark.parametrize("first", [None, (0, 5)])
@pytest.mark.parametrize("keys", [24, 23, 3])
def test_the_layout_of_a_prompt(keys, first):
    q, k = randn(2, 4, keys, 8), randn(2, 2, keys, 8)
    first = None if first is None or keys < 9 else torch.tensor(first)
    method = Moa(heads=MIXED)
    plan = method.plan(site_of(q, k, first), State())
    got = plan.dense().expand(2, -1, -1, -1)
    got = got.repeat_interleave(4 // got.shape[1], 1)
    for b in range(2):
        shift = 0 if first is None else int(first[b])
        for h in range(4):
            wide = band(*[(BLOCK, 0.0), (-BLOCK, 0.5)][h // 2], keys - shift, BLOCK)
            for i in range(shift, keys):
                assert got[b, h, i].tolist() == brute(keys, i, wide, 1, shift), (b, h, i)


def test_a_decoding_row_sees_the_sink_and_the_window_of_the_prompts_length():
    method, state = Moa(heads=MIXED), State()
    q = randn(1, 4, 40, 8)
    method.plan(site_of(q[:, :, :24], q[:, ::2, :24]), state)
    for keys in (25, 29, 40):
        got = method.plan(site_of(q[:, :, keys - 1 : keys], q[:, ::2, :keys]), state).dense()[0, :, 0]
        for h in range(4):
            wide = band(*[(BLOCK, 0.0), (-BLOCK, 0.5)][h // 2], 24, BLOCK)
            assert got[h].tolist() == brute(keys, keys - 1, wide, 1, prompt=False)


@pytest.mark.parametrize("keys", [24, 21])
def test_alpha_0_beta_1_is_dense_attention(keys):
    q, k = randn(1, 4, keys, 8), randn(1, 2, keys, 8, seed=1)
    site = site_of(q, k)
    for method in (Moa(density=1.0, block=BLOCK), Moa(heads=plan_of([[(0, 1), (0, 1)]]), sink=0)):
        state = State()
        assert torch.allclose(attend(q, k, k, method.plan(site, state)), attend(q, k, k, site.dense()), atol=1e-12)
        assert method.evict(site, state) is None
        late = site_of(q[:, :, -1:], torch.cat([k, k], 2))
        assert method.plan(late, state).dense().all()


@pytest.mark.parametrize("padded", [False, True])
def test_a_shrunk_cache_equals_masking_at_every_step(padded):
    model = tiny()
    x = torch.randint(0, 32, (2, 27), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 27 + 12, dtype=torch.long)
    if padded:
        mask[1, :6] = 0
    said, size = [], []
    with torch.inference_mode():
        for shrink in (True, False):
            with use(model, Moa(heads=MIXED, shrink=shrink)) as run:
                told = model(x, attention_mask=mask[:, :27], use_cache=True)
                logits, cache = [told.logits[:, -1:]], told.past_key_values
                size.append(run.kv_bytes)
                for step in range(12):
                    at = mask[:, : 28 + step]
                    place = {"position_ids": at.sum(1, keepdim=True) - 1}
                    told = model(logits[-1].argmax(-1), attention_mask=at, past_key_values=cache, **place)
                    logits.append(told.logits)
            said.append(torch.cat(logits, 1))
    assert torch.allclose(*said, atol=1e-5) and size[0] < size[1]


def test_search_finds_a_plan_in_the_bounds_that_is_saved_and_used(tmp_path):
    model = tiny()
    prompts = {n: torch.randint(0, 32, (2, n - 4), generator=torch.Generator().manual_seed(n)) for n in (16, 32)}
    told = []
    plan = Moa.search(model, prompts, density=0.6, lengths=(16, 32), say=told.append, block=BLOCK, step=8, points=3)
    bands = [[band(r.parameters["alpha"], r.parameters["beta"], 32, BLOCK) for r in layer] for layer in plan.rules]
    mean = sum(density(wide, 32, BLOCK, 1) for layer in bands for wide in layer) / 8
    assert 0.54 - 1e-6 <= mean <= 0.6 + 1e-6
    assert all(layer[0] == layer[1] and layer[2] == layer[3] for layer in plan.rules)
    assert plan.table["densities"][1] == pytest.approx(mean) and len(told) >= 3
    plan.save(tmp_path / "moa.json")
    method = Moa(heads=str(tmp_path / "moa.json"))
    ids = torch.randint(0, 32, (1, 32))
    with torch.inference_mode():
        with use(model, method):
            one = model(ids).logits
        with use(model, Moa(heads=plan)):
            assert torch.equal(one, model(ids).logits)
    with pytest.raises(BadInput, match="no prompts for lengths"):
        Moa.search(model, prompts, lengths=(16, 64))
    with pytest.raises(BadInput, match=r"densities go from 0\.\d+ to"):
        Moa.search(model, prompts, density=0.01, lengths=(16, 32), block=BLOCK, step=8)


def test_plans_that_do_not_fit_are_refused():
    from maskwright.attention import ModelShape

    with pytest.raises(BadInput, match="2 layers, 4 heads and 2 key heads; this model has 3"):
        Moa(heads=MIXED).fits(ModelShape(3, 4, 2, 8, True))
    odd = plan_of([[(4, 0), (4, 0), (8, 0), (4, 0)]], group=1)
    Moa(heads=odd).fits(ModelShape(1, 4, 4, 8, True))
    odd = HeadPlan("moa", 1, 4, 2, odd.rules, odd.grid)
    with pytest.raises(BadInput, match="share keys"):
        Moa(heads=odd).fits(ModelShape(1, 4, 2, 8, True))
    for method, grid, rule in (("hip", MIXED.grid, "alpha"), ("moa", {}, "alpha"), ("moa", MIXED.grid, "x")):
        rules = ((Rule("affine", {rule: 1.0, "beta": 0.0}),),)
        with pytest.raises(BadInput, match="moa"):
            Moa(heads=HeadPlan(method, 1, 1, 1, rules, grid)).fits(ModelShape(1, 1, 1, 8, True))
    for told in ({"density": 0.0}, {"density": 1.5}, {"block": 0}, {"sink": -1}, {"heads": "nowhere.json"}):
        with pytest.raises(BadInput):
            Moa(**told)
