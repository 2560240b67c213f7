"""The weights place: sites, the calibration walk, one-shot pruning, training under masks, attach and bake."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.method import get
from maskwright.core.select import generator
from maskwright.lab.models import CharLM, Mlp, ResNet8
from maskwright.weights import MaskedTraining, Rule, attach, bake, sites, ste, training
from maskwright.weights.magnitude import Magnitude
from maskwright.weights.rigl import RigL
from maskwright.weights.set import Set
from maskwright.weights.sites import matches, parameter
from maskwright.weights.solve import assign
from maskwright.weights.sr_ste import SrSte
from maskwright.weights.statistics import input_rows
from maskwright.weights.walk import walk
from maskwright.weights.wanda import Wanda

NEEDS = frozenset({"input_norm", "input_mean", "input_variance", "gram"})


def lm(seed: int = 0) -> CharLM:
    return CharLM(20, layers=3, width=16, heads=2, context=8, seed=seed)


def windows(n: int = 2) -> list[Tensor]:
    return [torch.randint(0, 20, (3, 8), generator=generator(i)) for i in range(n)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- which weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern,name,found",
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.q_proj", "model.layers.0.self_attn.q_proj.weight", False),  # a run is contiguous
        ("layers.*.self_attn", "model.layers.10.self_attn.q_proj.weight", True),
        ("layers.*.q_proj", "model.layers.10.self_attn.q_proj.weight", False),  # * is one segment
        ("layers.**.q_proj", "model.layers.10.self_attn.q_proj.weight", True),
        ("layers.**.0", "model.layers.0.weight", True),  # ** may be no segment
        ("*_proj", "model.layers.0.mlp.up_proj.weight", True),
        ("layers.1", "model.layers.10.mlp.weight", False),  # never part of a segment
        ("proj", "model.layers.0.mlp.up_proj.weight", False),
        (r"re:layers\.(0|2)\..*up", "model.layers.2.mlp.up_proj.weight", True),
        (r"re:^layers", "model.layers.2.mlp.up_proj.weight", False),
    ],
)
def test_where(pattern: str, name: str, found: bool) -> None:
    assert matches(name, pattern) is found


@pytest.mark.parametrize("where", ["nothing", ("attention", "nothing"), "re:("])
def test_a_where_without_a_match_is_refused(where: Any) -> None:
    with pytest.raises(BadInput, match="where"):
        sites(lm(), where)


def _transformers() -> dict[str, Callable[[], nn.Module]]:
    import transformers as t

    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 32, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    wide = {"intermediate_size": 24}
    gqa = {**size, **text, **wide, "num_key_value_heads": 1}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 32}
    gpt2 |= {"bos_token_id": 0, "eos_token_id": 1}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**gqa)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**gqa, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**size, **text, ffn_dim=24, word_embed_proj_dim=16)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**size, **text, **wide)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**size, **wide, image_size=8, patch_size=4)),
    }


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bert": {"query", "key", "value", "dense"},
    "vit": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
}
PER_BLOCK = {"llama": 7, "qwen2": 7, "gpt2": 4, "opt": 6, "bert": 6, "vit": 6}


@pytest.mark.parametrize("family", EXPECTED)
def test_default_sites_are_the_matrices_of_the_blocks(family: str) -> None:
    model = _transformers()[family]()
    found = sites(model)
    assert {name.split(".")[-2] for name in found} == EXPECTED[family]
    assert [site.block for site in found.values()] == [0] * PER_BLOCK[family] + [1] * PER_BLOCK[family]
    before = snapshot(model)
    x = noise(2, 3, 8, 8) if family == "vit" else torch.randint(3, 32, (2, 8), generator=generator(0))
    masks = Wanda(density=0.25).masks(model, [x, x])
    assert unchanged(model, before) and masks.density == 0.25
    # Per output row, also where the layer keeps its weight transposed.
    assert all((found[n].layout.matrix(m.keep).sum(1) == found[n].matrix.shape[1] // 4).all() for n, m in masks.items())


def test_transposed_layers_group_along_their_inputs() -> None:
    model = _transformers()["gpt2"]()
    name = "transformer.h.0.attn.c_attn.weight"
    assert sites(model)[name].shape == (16, 48) and sites(model)[name].matrix.shape == (48, 16)
    mask = Magnitude(pattern="1:4").masks(model)[name]
    assert (mask.keep.reshape(4, 4, 48).sum(1) == 1).all()


def test_a_resnet_gives_its_convolutions_but_not_stem_and_head() -> None:
    model = ResNet8(4)
    found = sites(model)
    assert len(found) == 8 and all(name.startswith("blocks.") and site.value.ndim == 4 for name, site in found.items())
    before = snapshot(model)
    masks = Wanda().masks(model, [noise(2, 1, 8, 8)])
    assert masks.density == 0.5 and unchanged(model, before)
    assert "fc.weight" in sites(model, "fc") and list(sites(Mlp((4, 4, 2)))) == ["1.weight"]


def test_a_tied_parameter_is_one_site() -> None:
    model = _transformers()["qwen2"]()
    found = sites(model, "**.weight")
    found = {name: site for name, site in found.items() if len(site.owners) > 1}
    assert list(found) == ["model.embed_tokens.weight"] and len(found["model.embed_tokens.weight"].owners) == 2
    assert list(sites(model, "lm_head")) == ["model.embed_tokens.weight"]  # found by its other name too
    embed, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    masks = Magnitude(where=("embed_tokens",)).masks(model)
    keep = masks["model.embed_tokens.weight"].keep
    before, keys = snapshot(model), list(model.state_dict())
    with attach(model, masks):
        assert (embed.weight[~keep] == 0).all() and (head.weight[~keep] == 0).all()
    assert embed.weight is head.weight and unchanged(model, before) and list(model.state_dict()) == keys
    bake(model, masks)
    assert embed.weight is head.weight and (head.weight[~keep] == 0).all()


# --- attach and bake -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, ste()], ids=["hard", "ste"])
def test_attach_leaves_no_trace_and_bake_computes_the_same(gate: Any) -> None:
    model, ids = lm(), windows()[0]
    masks = Magnitude(density=0.5).masks(model)
    before, objects = snapshot(model), [id(p) for p in model.parameters()]
    dense = model(ids)
    with attach(model, masks, **({} if gate is None else {"gate": gate})):
        masked = model(ids)
    assert unchanged(model, before) and [id(p) for p in model.parameters()] == objects
    assert hooks(model) == 0 and not any(parametrize.is_parametrized(m) for m in model.modules())
    assert torch.equal(model(ids), dense) and not torch.equal(masked, dense)
    assert torch.equal(bake(model, masks)(ids), masked)


def test_an_error_inside_attach_leaves_no_trace_either() -> None:
    model = lm()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the user's"), attach(model, Magnitude().masks(model)):
        raise RuntimeError("the user's")
    assert unchanged(model, before)


def test_masks_of_another_model_are_refused_and_of_other_weights_told() -> None:
    masks = Magnitude().masks(lm())
    with pytest.raises(BadInput, match=r"blocks\.0"), attach(Mlp((4, 4)), masks):
        pass
    with pytest.raises(BadInput):
        bake(Mlp((4, 4)), masks)
    with pytest.warns(UserWarning, match="other weights"), attach(lm(seed=1), masks):
        pass


@pytest.mark.parametrize("slug", ["magnitude", "random", "wanda", "owl", "dsnot", "essential_sparsity"])
def test_prune_is_bake_of_masks(slug: str) -> None:
    method, pruned, baked = get(slug)(density=0.5), lm(), lm()
    before = snapshot(baked)
    masks = method.masks(baked, windows(), seed=1)
    assert unchanged(baked, before) and hooks(baked) == 0 and baked.training
    assert method.prune(pruned, windows(), seed=1).equal(masks)
    assert unchanged(bake(baked, masks), snapshot(pruned))


@pytest.mark.parametrize("slug", ["magnitude", "wanda", "sparsegpt"])
def test_masks_holds_the_old_weights_of_two_blocks_at_most(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = lm(), get(slug)(density=0.5)
    dense, most = snapshot(model), []

    solve = type(method).solve

    def counting(site: Any, counts: Any) -> Any:
        now = model.state_dict()
        most.append(len({name.split(".")[1] for name in sites(model) if not torch.equal(now[name], dense[name])}))
        return solve(method, site, counts)

    monkeypatch.setattr(type(method), "solve", lambda self, site, counts: counting(site, counts))
    method.masks(model, windows())
    assert max(most) == 2 and len(most) == len(sites(model)) and unchanged(model, dense)


def test_sparsegpt_masks_leave_the_model_but_prune_compensates() -> None:
    method, model = get("sparsegpt")(density=0.5), lm()
    before = snapshot(model)
    masks = method.masks(model, windows())
    assert unchanged(model, before)
    assert method.prune(model, windows()).equal(masks) and not unchanged(bake(lm(), masks), snapshot(model))
    assert all((parameter(model, name)[~mask.keep] == 0).all() for name, mask in masks.items())


def test_rules() -> None:
    model = lm()
    method = Magnitude(density=0.5)
    _, densities = assign(method, model, [Rule("blocks.0", density=0.75), Rule("attention", dense=True)])
    assert {d for n, d in densities.items() if n.startswith("blocks.0")} == {0.75}
    assert not any("attention" in n and not n.startswith("blocks.0") for n in densities)
    with pytest.raises(BadInput, match="'head' matches no site"):
        assign(method, model, [Rule("head")])
    with pytest.raises(BadInput, match="shadowed"):
        assign(method, model, [Rule("blocks"), Rule("attention", density=0.1)])
    with pytest.raises(BadInput, match="nothing to prune"):
        assign(method, model, [Rule("blocks", dense=True)])


def test_n_to_m_on_a_size_that_does_not_divide_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with pytest.raises(BadInput, match=r"^0\.weight: 2:4 .* 6 is not divisible by 4"):
        Magnitude(pattern="2:4").masks(model)


# --- the calibration walk ------------------------------------------------------------------------------------


def by_hand(model: nn.Module, batches: list[Any], names: list[str]) -> dict[str, Tensor]:
    """Every named Linear's input rows over a plain full forward of the whole model."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda m, args, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def agree(site: Any, x: Tensor) -> None:
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(site.stat("input_norm"), x.square().sum(0).sqrt(), **close)
    torch.testing.assert_close(site.stat("input_mean"), x.mean(0), **close)
    torch.testing.assert_close(site.stat("input_variance"), x.var(0, unbiased=False), **close)
    torch.testing.assert_close(site.stat("gram"), x.T @ x, rtol=1e-3, atol=1e-3)
    assert int(site.stat("rows")) == len(x)


def test_dense_statistics_are_those_of_a_plain_forward() -> None:
    model, batches = lm().eval(), windows(3)
    found = sites(model)
    rows = by_hand(model, batches, list(found))
    labels = []
    for step in walk(model, batches, found, NEEDS, propagate=False):
        labels.append(step.label)
        assert len({site.block for site in step.sites}) == 1 and hooks(model) == 0
        for site in step.sites:
            agree(site, rows[site.name])
            with torch.no_grad():
                site.parameter.zero_()  # not seen downstream
    assert labels == ["blocks.0", "blocks.1", "blocks.2"]


def test_pruned_blocks_are_seen_downstream() -> None:
    model, batches = lm().eval(), windows()
    found = sites(model)
    dense = by_hand(model, batches, list(found))
    for step in walk(model, batches, found, NEEDS):
        rows = by_hand(model, batches, list(found))  # the model as pruned so far
        for site in step.sites:
            agree(site, rows[site.name])
            assert (site.block == 0) == torch.equal(rows[site.name], dense[site.name])
        with torch.no_grad():
            for site in step.sites:
                site.parameter[:, ::2] = 0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, shift: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        return hidden_states + scale * self.drop(self.inner(hidden_states + shift)), None


class Chain(nn.Module):
    """Blocks called with keywords that differ from block to block, and returning tuples."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(hidden_states=x, shift=shift * i, scale=1.0 + i)[0]
        return x


def test_keyword_arguments_reach_every_block_and_dropout_is_off() -> None:
    model = Chain()
    batches = [{"x": noise(2, 4, 8, seed=i), "shift": noise(8, seed=10 + i)} for i in range(2)]
    model.train()
    model.blocks[1].eval()
    flags = [m.training for m in model.modules()]
    found = sites(model)
    steps = list(walk(model, batches, found, NEEDS, propagate=True))
    assert [m.training for m in model.modules()] == flags and not any("forward" in vars(m) for m in model.modules())
    rows = by_hand(model.eval(), batches, list(found))
    assert [s.label for s in steps] == ["blocks.0", "blocks.1", "blocks.2"]
    for step in steps:
        for site in step.sites:
            agree(site, rows[site.name])


def test_an_interrupted_walk_leaves_hooks_and_modes_alone() -> None:
    model = lm()
    steps = walk(model, windows(), sites(model), NEEDS)
    next(steps)
    steps.close()
    assert hooks(model) == 0 and model.training and not any("forward" in vars(m) for m in model.modules())


def test_bad_calibration_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="at least one batch"):
        next(walk(lm(), [], sites(lm()), NEEDS))
    model = lm()
    with torch.no_grad():
        model.blocks[1].norm1.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match=r"blocks\.1\.attention\.query\.weight: .*NaN"):
        Wanda().masks(model, windows())
    assert model.training and hooks(model) == 0
    model = lm()
    with torch.no_grad():
        model.blocks[2].mlp[0].weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match=r"blocks\.2\.mlp\.0\.weight: 1 weights"):
        Magnitude().masks(model)


CONVS = [
    nn.Conv2d(3, 4, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    nn.Conv2d(4, 4, (1, 3), groups=4, padding=(0, 1)),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(3, 4, (1, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(3, 4, 3, padding="valid"),
    nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
    nn.Conv1d(4, 6, 3, padding=2, padding_mode="replicate"),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolution_inputs_are_unfolded_in_the_order_of_the_matrix(conv: Any) -> None:
    x = noise(2, conv.in_channels, *([7] * (conv.weight.ndim - 2)))
    rows = input_rows(conv, x)
    matrix = sites(conv)["weight"].matrix.reshape(conv.groups, -1, rows.shape[2])
    out = (rows @ matrix.transpose(1, 2)).permute(1, 0, 2).flatten(1)  # (batch x places, outputs)
    expected = (conv(x) - conv.bias.reshape(-1, *[1] * (x.ndim - 2))).flatten(2).transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    (step,) = walk(conv, [x, x], sites(conv), frozenset({"input_norm"}))
    norm = (2 * rows.square().sum(1)).sqrt()
    each = norm.repeat_interleave(conv.out_channels // conv.groups, 0) if conv.groups > 1 else norm[0]
    torch.testing.assert_close(step.sites[0].stat("input_norm"), each, rtol=1e-4, atol=1e-5)


def test_convolution_norms_against_a_hand_unfold() -> None:
    conv, x = nn.Conv2d(3, 4, 2, padding=1), noise(2, 3, 5, 5)
    (step,) = walk(conv, [x], sites(conv), frozenset({"input_norm"}))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    norms = [padded[:, c, i : i + 6, j : j + 6].square().sum().sqrt() for i in (0, 1) for j in (0, 1) for c in range(3)]
    torch.testing.assert_close(step.sites[0].stat("input_norm"), torch.stack(norms), rtol=1e-4, atol=1e-5)
    assert (Wanda().masks(conv, [x])["weight"].keep.flatten(1).sum(1) == 6).all()


# --- training ------------------------------------------------------------------------------------------------


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], None] = lambda: None) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = noise(16, 12, seed=step)
        (model(x) - x[:, :6]).square().mean().backward()
        optimizer.step()
        after()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", [Set, RigL])
def test_dropped_weights_and_moments_are_exactly_zero(method: Any, make: Any) -> None:
    model = Mlp((12, 24, 6))
    optimizer, weight = make(model.parameters()), model[1].weight
    fit(model, optimizer, range(3))  # moments of the dense run are there already
    with training(model, optimizer, method(density=0.3, every=2, total=12)) as run:
        count = run.masks.count

        def check() -> None:
            dropped = ~run.masks["1.weight"].keep
            assert run.masks.count == count == round(0.3 * weight.numel())
            assert (weight[dropped] == 0).all() and (weight[~dropped] != 0).any()
            state = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
            assert state and all((v[dropped] == 0).all() for v in state)

        fit(model, optimizer, range(12), check)
        assert sum(run.moved) > 0 and sum(run.moved[8:]) == 0
    assert model[1].weight is weight and (weight[~run.masks["1.weight"].keep] == 0).all()


def test_a_fraction_of_zero_is_static_training_under_a_fixed_mask() -> None:
    runs = []
    for method in (RigL(density=0.3, every=2, total=12, fraction=0.0), Set(density=0.3, every=99, total=12)):
        model = Mlp((12, 24, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with training(model, optimizer, method) as run:
            fit(model, optimizer, range(6))
        runs.append((run.masks, snapshot(model)))
        assert sum(run.moved) == 0
    assert runs[0][0].equal(runs[1][0]) and all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])


def test_the_optimiser_sees_no_gradient_of_dropped_weights_but_growth_does() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training(model, optimizer, RigL(density=0.3, every=1, total=12)) as run:
        x = noise(16, 12)
        model(x).square().mean().backward()
        weight, dropped = run.found["1.weight"].parameter, ~run.masks["1.weight"].keep
        assert weight.grad is not None and (weight.grad[dropped] != 0).any()
        dense = run.before_step(optimizer)
        assert (weight.grad[dropped] == 0).all() and (dense["1.weight"][dropped] != 0).any()


def test_rewiring_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0, 0, 0, 0]])
    grads = torch.tensor([[9.0, 9, 9, 9, 1, 4, 2, 3]])
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    site = dataclasses.replace(sites(layer)["weight"], stats={"dense_grad": -grads})
    old = Mask(weight != 0)

    def grown(**settings: Any) -> list[int]:
        method = RigL(density=0.5, every=1, total=1000, fraction=0.52, **settings)
        new = method.update(site, old, 1)
        assert new is not None
        return new.indices().tolist()

    assert grown() == [0, 1, 2, 3]  # the two dropped have the greatest gradients and come back
    assert grown(regrow=False) == [0, 3, 5, 7]


def test_a_full_site_survives_rewiring_without_regrowth() -> None:
    model = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training(model, optimizer, Set(density=0.6, every=1, total=8, regrow=False)) as run:
        counts = {name: mask.count for name, mask in run.masks.items()}
        assert max(mask.density for mask in run.masks.values()) > 0.8
        fit(model, optimizer, range(8))
    assert {name: mask.count for name, mask in run.masks.items()} == counts


METHODS = [
    SrSte(n=1, m=4, decay=1e-3),
    Set(density=0.3, every=2, total=20),
    RigL(density=0.3, every=2, total=20, budget="uniform"),
]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_resumed_run_goes_on_as_if_never_stopped(method: MaskedTraining, make: Any) -> None:
    whole = Mlp((12, 24, 6))
    optimizer = make(whole.parameters())
    with training(whole, optimizer, method, seed=3) as run:
        fit(whole, optimizer, range(7))
        saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), run.state_dict()))
        fit(whole, optimizer, range(7, 14))
    again = Mlp((12, 24, 6), seed=9)
    optimizer = make(again.parameters())
    with training(again, optimizer, method, seed=3) as other:
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        other.load_state_dict(saved[2])
        fit(again, optimizer, range(7, 14))
    assert unchanged(again, snapshot(whole)) and other.masks.equal(run.masks)
    assert other.moved == run.moved and other.step == run.step == 14 and other.itop == run.itop


def test_resuming_with_another_total_or_seed_is_refused() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training(model, optimizer, Set(density=0.3, every=2, total=20)) as run:
        state = run.state_dict()
    for method, seed in ((Set(density=0.3, every=2, total=30), 0), (Set(density=0.3, every=2, total=20), 1)):
        with training(model, optimizer, method, seed=seed) as run, pytest.raises(BadInput, match="the saved one"):
            run.load_state_dict(state)


def test_same_seed_same_masks_other_seed_other_masks() -> None:
    def masks(seed: int) -> MaskSet:
        model = Mlp((12, 24, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with training(model, optimizer, Set(density=0.3, every=2, total=12), seed=seed) as run:
            fit(model, optimizer, range(6))
        return run.masks

    assert masks(0).equal(masks(0)) and not masks(0).equal(masks(1))


def test_an_averaged_copy_is_masked_by_bake() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with training(model, optimizer, RigL(density=0.3, every=2, total=20)) as run:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        fit(model, optimizer, range(12), lambda: ema.update_parameters(model))
    bake(ema.module, run.masks)
    stored, seen = parameter(ema.module, "1.weight"), ema.module[1].weight
    assert (stored[~run.masks["1.weight"].keep] == 0).all() and sum(run.moved) > 0
    assert torch.equal(seen, stored)  # the copy's own gate does not hide what has grown since


def test_grad_scaler_skips_do_not_move_the_clock() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with training(model, optimizer, RigL(density=0.3, every=1, total=12)) as run:
        before = run.masks
        for step, factor in enumerate((1.0, float("inf"), 1.0)):
            optimizer.zero_grad()
            scaler.scale(factor * model(noise(16, 12, seed=step)).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert run.step == (1, 1, 2)[step] and run.masks.count == before.count
        weight = run.found["1.weight"].parameter
        assert torch.isfinite(weight).all() and (weight[~run.masks["1.weight"].keep] == 0).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_accumulated_micro_batches_are_one_step(method: MaskedTraining) -> None:
    results = []
    for parts in (1, 4):
        model = Mlp((12, 24, 6)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with training(model, optimizer, method) as run:
            for step in range(4):
                optimizer.zero_grad()
                for x in noise(16, 12, seed=step).double().chunk(parts):
                    (model(x).square().mean() / parts).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
        assert run.step == 4
        results.append((run.masks, model[1].weight.detach().clone()))
    assert results[0][0].equal(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_training_leaves_no_trace_and_refuses_what_it_cannot_hold() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="stop"), training(model, optimizer, METHODS[1]):
        fit(model, optimizer, range(1))
        raise RuntimeError("stop")
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == objects
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(BadInput, match=r"^1\.weight: the optimiser does not hold"):
        training(model, torch.optim.SGD(model[3].parameters(), lr=0.1), METHODS[1]).__enter__()
    with pytest.raises(BadInput, match=r"^1\.weight: density 1e-09"):
        training(model, optimizer, Set(density=1e-9)).__enter__()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"^1\.weight: 1 weights"):
        training(model, optimizer, METHODS[1]).__enter__()


def test_a_missing_or_infinite_gradient_names_the_layer_that_would_grow() -> None:
    model = Mlp((12, 24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training(model, optimizer, RigL(density=0.3, every=1, total=12)):
        with pytest.raises(BadInput, match=r"1\.weight: no gradient"):
            optimizer.step()
        (model(noise(16, 12)).sum() * float("inf")).backward()
        with pytest.raises(BadInput, match=r"1\.weight: its gradient .* not finite"):
            optimizer.step()
