"""The additive branch, LoRA that keeps a pruned model pruned, the guard, and PEFT's folders."""

import copy
import json

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.gate import gated
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import NM, Unstructured
from maskwright.core.select import draw, generator, select
from maskwright.updates.branch import Branch, branched, linears, named
from maskwright.updates.guard import guard, zero_masks
from maskwright.updates.lora import Adapter, Lora, LowRank, unmasked
from maskwright.updates.lora_files import read_peft, write_peft
from maskwright.weights import bake


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


class Dense(Branch):
    """dW free in every entry."""

    def __init__(self, shape, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.full(shape, float(value)))

    def delta(self):
        return self.value


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


def batch(seed=0, rows=16):
    return torch.randn(rows, 8, generator=generator(seed))


def photo(model):
    """Everything that must be as before: values, keys, order, identity, flags, modes, hooks."""
    return (
        [(n, id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()],
        [(k, v.clone()) for k, v in model.state_dict().items()],
        [(n, m.training, sorted(m.__dict__), list(m._modules), len(m._forward_hooks)) for n, m in model.named_modules()],
    )


def same(a, b):
    flat = [
        x for part in (a, b) for x in [str([[y for y in row if not isinstance(y, torch.Tensor)] for p in part for row in p])]
    ]
    pairs = zip([t for p in a for row in p for t in row], [t for p in b for row in p for t in row], strict=True)
    return flat[0] == flat[1] and all(torch.equal(x, y) for x, y in pairs if isinstance(x, torch.Tensor))


def nm(model, n=2, m=4):
    found = {name: select(site.weight.detach().abs(), NM(n, m)) for name, site in linears(model).items()}
    return MaskSet(found, {"method": "test"})


def step(model, run, lr=0.1, optimizer=None, seed=0):
    optimizer = optimizer or torch.optim.SGD(run.trainable, lr=lr)
    optimizer.zero_grad()
    model(batch(seed)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_sites_are_the_linear_weights_of_the_blocks():
    assert list(linears(net())) == [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")]
    assert [site.block for site in linears(net()).values()] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert list(linears(net(), "head")) == ["head.weight"]
    assert list(linears(net(), ("blocks.*.up", r"re:1\.down"))) == [
        "blocks.0.up.weight", "blocks.1.up.weight", "blocks.1.down.weight",
    ]  # fmt: skip
    plain = nn.Sequential()
    plain.add_module("a", nn.Linear(2, 2))
    plain.add_module("b", nn.Linear(2, 2))
    assert list(linears(plain)) == ["a.weight"]  # no block: all but the head
    with pytest.raises(BadInput, match="matches no Linear weight; names look like blocks.0.up"):
        linears(net(), "mlp")
    with pytest.raises(BadInput, match="no Linear"):
        linears(nn.ReLU())
    with pytest.raises(BadInput, match="regular expression"):
        named("a.weight", "re:(")
    assert named("a.b.weight", "b") and not named("a.bc.weight", "b")


def test_forward_is_the_sum_and_merge_changes_nothing():
    model, x = net(), batch()
    sites = linears(model)
    with branched(model, sites, {n: LowRank(s.shape, 2, seed=1, name=n) for n, s in sites.items()}) as run:
        step(model, run)
        moved = {name: run.branches[name].delta().detach() for name in sites}
        want = copy.deepcopy(model)
        for name in sites:
            torch.testing.assert_close(sites[name].weight, want.get_parameter(
                name.replace("weight", "parametrizations.weight.original")) + moved[name])  # fmt: skip
        attached = model(x)
        run.merge()
        run.merge()  # no second sum
        assert torch.equal(model(x), attached)
    assert torch.equal(model(x), attached)
    assert all(m.abs().max() > 0 for m in moved.values())
    assert type(model.blocks[0].up).__name__ == "Linear" and not list(model.blocks[0].up.children())
    with pytest.raises(BadInput, match="context"):
        branched_run = run
        branched_run.merged = False
        branched_run.merge()


def test_nothing_is_left_without_merge():
    model = net()
    model.blocks[0].up.bias.requires_grad_(False)
    before = photo(model)
    sites = linears(model)
    with branched(model, sites, {n: Dense(s.shape) for n, s in sites.items()}, train=("head",), recompute=True) as run:
        assert [p.requires_grad for n, p in model.named_parameters() if "value" not in n] == [
            "head" in n for n, _ in model.named_parameters() if "value" not in n
        ]
        model.train()
        step(model, run)
        assert not torch.equal(before[0][-1][2], model.head.bias)
    assert same(before, photo(model)) and all(p.grad is None for p in model.parameters())


def test_an_error_inside_leaves_nothing_either():
    model = net()
    before, sites = photo(model), linears(model)
    with pytest.raises(ZeroDivisionError), branched(model, sites, {n: Dense(s.shape, 1) for n, s in sites.items()}):
        raise ZeroDivisionError
    with pytest.raises(BadInput, match=r"blocks.0.down.weight: the branch gives \(12, 8\), the weight is \(8, 12\)"):
        wrong = {n: Dense((12, 8)) for n in sites}
        with branched(model, sites, wrong):
            pass
    assert same(before, photo(model))


def test_merge_keeps_what_was_trained_and_thaws_the_rest():
    model = net()
    head, norm = model.head.weight.clone(), model.blocks[0].norm.running_mean.clone()
    sites = linears(model)
    with branched(model, sites, {n: Dense(s.shape) for n, s in sites.items()}, train="head") as run:
        model.train()
        step(model, run)
        run.merge()
    assert not torch.equal(model.head.weight, head) and not torch.equal(model.blocks[0].norm.running_mean, norm)
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_refusals_name_the_site():
    model = net()
    sites = linears(model)
    branches = {n: Dense(s.shape) for n, s in sites.items()}
    with branched(model, sites, branches), pytest.raises(BadInput, match=r"blocks.0.up.weight: .* a branch already"):
        with branched(model, sites, branches):
            pass
    from maskwright.weights import attach

    with attach(model, nm(model)), pytest.raises(BadInput, match="a gate"), branched(model, sites, branches):
        pass
    with pytest.raises(BadInput, match="there is a mask but no branch"):
        with branched(model, sites, branches, masks={"head.weight": Mask(torch.ones(3, 8, dtype=torch.bool))}):
            pass
    with pytest.raises(BadInput, match="train 'tail' matches no parameter"), branched(model, sites, branches, train="tail"):
        pass
    tied = net()
    tied.blocks[1].up.weight = tied.blocks[0].up.weight
    with pytest.raises(BadInput, match=r"blocks.0.up.weight: tied to blocks.1.up.weight"):
        with branched(tied, linears(tied), branches):
            pass
    bad = {n: Dense(s.shape, float("nan")) for n, s in sites.items()}
    before = model.blocks[0].up.weight.clone()
    with branched(model, sites, bad) as run, pytest.raises(BadInput, match="not finite, so nothing is merged"):
        run.merge()
    assert torch.equal(before, model.blocks[0].up.weight)


def test_a_gate_may_lie_over_a_branch():
    model, masks = net(), nm(net())
    before, sites = photo(model), linears(model)
    name = "blocks.0.up.weight"
    with branched(model, sites, {n: Dense(s.shape, 1.0) for n, s in sites.items()}):
        with gated([(model.blocks[0].up, "weight")], masks[name]):
            assert not bool(sites[name].weight[~masks[name].keep].any())
            assert bool((sites[name].weight[masks[name].keep] > 0.5).all())
        assert bool((sites[name].weight > 0.5).all())
    assert same(before, photo(model))


def test_recompute_saves_no_matrix_and_gives_the_same_gradients():
    grads, saved = [], []
    for recompute in (False, True):
        model = net()
        sites = linears(model)
        pairs = {n: LowRank(s.shape, 2, seed=1, name=n) for n, s in sites.items()}
        for pair in pairs.values():
            nn.init.ones_(pair.B)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tuple(tensor.shape))
            return tensor

        with branched(model, sites, pairs, recompute=recompute) as run:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model(batch()).square().sum()
            saved.append([shape for shape in sizes if shape in {(12, 8), (8, 12)} and shape != (16, 8)])
            loss.backward()
            grads.append([p.grad for p in run.trainable])
    assert saved[0] and not saved[1]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_deep_copy_made_inside_computes_with_its_own_branches():
    model, x = net(), batch()
    sites = linears(model)
    with branched(model, sites, {n: Dense(s.shape, 0.1) for n, s in sites.items()}, recompute=True) as run:
        twin = copy.deepcopy(model)
        want = model(x)
        with torch.no_grad():
            run.branches["blocks.0.up.weight"].value.fill_(5.0)
        assert torch.equal(twin(x), want) and not torch.equal(model(x), want)
    assert torch.equal(twin(x), want)


class Conv1D(nn.Module):  # transformers' layer by its type's name: weight (inputs, outputs)
    def __init__(self):
        super().__init__()
        self.nf, self.weight = 6, nn.Parameter(torch.randn(4, 6, generator=generator(0)))

    def forward(self, x):
        return x @ self.weight


def test_transposed_weights_get_the_transposed_update():
    model = nn.Sequential(Conv1D(), nn.ReLU(), nn.Linear(6, 2))
    sites = linears(model, "0")
    assert sites["0.weight"].transposed and sites["0.weight"].shape == (6, 4)
    x = torch.randn(3, 4, generator=generator(1))
    pair = LowRank((6, 4), 2, seed=3)
    nn.init.ones_(pair.B)
    keep = draw(Unstructured(), (4, 6), 10, rng=generator(2))
    want = torch.where(keep.keep, model[0].weight + (pair.B @ pair.A).T, 0.0)
    with branched(model, sites, {"0.weight": pair}, masks={"0.weight": keep}) as run:
        torch.testing.assert_close(model[0](x), x @ want)
        run.merge()
    torch.testing.assert_close(model[0].weight.detach(), want.detach())


def test_half_precision_weights_stay_half():
    model = net().bfloat16()
    sites = linears(model)
    with branched(model, sites, {n: LowRank(s.shape, 2, seed=1, name=n) for n, s in sites.items()}) as run:
        run.branches["blocks.0.up.weight"].B.data.fill_(0.1)
        y = model(batch().bfloat16())
        run.merge()
        assert torch.equal(model(batch().bfloat16()), y)
    assert model.blocks[0].up.weight.dtype == torch.bfloat16


# LoRA


def test_lora_starts_at_the_base_and_its_pairs_depend_on_seed_and_name_only():
    model, x = net(), batch()
    with Lora(rank=2).attach(model, seed=3) as run:
        assert torch.equal(model(x), net()(x)) and len(run.trainable) == 8
        first = run.adapter()
        assert run.masks().density == 1.0
    with Lora(rank=2, where=("blocks.1.up",)).attach(model, seed=3) as run:
        assert torch.equal(run.adapter().A["blocks.1.up.weight"], first.A["blocks.1.up.weight"])
    with Lora(rank=2).attach(model, seed=4) as run:
        assert not torch.equal(run.adapter().A["blocks.1.up.weight"], first.A["blocks.1.up.weight"])
    assert first.A["blocks.0.up.weight"].abs().max() <= 8**-0.5
    assert Lora(rank=4, alpha=8).scale == 2 and Lora(rank=4, alpha=8, rslora=True).scale == 4
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(BadInput, match="lora needs"):
            Lora(**bad)


def by_masks(model):
    return nm(model)


def by_zeros(model):
    bake(model, nm(model))
    return "unstructured"


def by_nm_zeros(model):
    bake(model, nm(model))
    return "2:4"


@pytest.mark.parametrize("given", [by_masks, by_zeros, by_nm_zeros])
def test_masked_lora_keeps_the_pattern_and_merging_changes_no_output(given):
    model, x = net(), batch()
    truth = nm(model)
    masks = given(model)
    with Lora(rank=2).attach(model, masks) as run:
        masked = copy.deepcopy(net())
        bake(masked, truth)
        assert torch.equal(model(x), masked(x))  # already masked at the start
        for _ in range(3):
            step(model, run, lr=0.05)
        attached = model(x)
        assert not torch.allclose(attached, masked(x))
        assert run.masks().equal(truth) or masks == "unstructured"
        run.merge()
        assert torch.equal(model(x), attached)
    assert torch.equal(model(x), attached)
    for name, mask in truth.items():
        weight = model.get_parameter(name)
        assert not bool(weight[~mask.keep].any()) and int((weight != 0).sum()) == mask.count
        mask.pattern.check(weight != 0)


def test_dense_lora_merge_is_what_loses_the_sparsity():
    model = net()
    masks = nm(model)
    bake(model, masks)
    with Lora(rank=2).attach(model) as run:
        step(model, run)
        run.merge()
    assert all(bool(model.get_parameter(n)[~m.keep].any()) for n, m in masks.items())


def test_gradients_of_the_factors_see_kept_entries_only():
    """dL/dA = scale B' (mask * dL/dW): against autograd of the written-out product."""
    model, x = net(), batch()
    masks = nm(model)
    name = "blocks.0.up.weight"
    with Lora(rank=2, alpha=6, where=(name,)).attach(model, MaskSet({name: masks[name]})) as run:
        pair = run.branched.branches[name]
        nn.init.ones_(pair.B)
        model(x).square().sum().backward()
        twin = net()
        twin.blocks[0].up.weight = nn.Parameter(
            torch.where(masks[name].keep, twin.blocks[0].up.weight + 3 * pair.B @ pair.A, 0.0).detach()
        )
        twin(x).square().sum().backward()
        grad = twin.blocks[0].up.weight.grad * masks[name].keep
        torch.testing.assert_close(pair.A.grad, 3 * pair.B.detach().T @ grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.B.grad, 3 * grad @ pair.A.detach().T, rtol=1e-4, atol=1e-5)


def test_lora_refuses_masks_that_do_not_fit():
    model = net()
    with pytest.raises(BadInput, match=r"head.weight: has a mask but is not among the 2 sites"):
        with Lora(where=("up",)).attach(model, MaskSet({"head.weight": Mask(torch.ones(3, 8, dtype=torch.bool))})):
            pass
    with pytest.raises(BadInput, match=r"blocks.0.up.weight: the mask has shape \(3, 8\), the weight \(12, 8\)"):
        with Lora().attach(model, MaskSet({"blocks.0.up.weight": Mask(torch.ones(3, 8, dtype=torch.bool))})):
            pass
    with pytest.raises(BadInput, match=r"blocks.0.up.weight: 2:4 does not hold: 24 groups have more than 2"):
        with Lora().attach(model, "2:4"):
            pass
    with (
        pytest.raises(BadInput, match="matches no Linear"),
        Lora().attach(model, MaskSet({"tail.weight": nm(model)["blocks.0.up.weight"]})),
    ):
        pass


# the guard


def test_zero_masks_read_the_zeros():
    model = net()
    with torch.no_grad():
        model.blocks[0].up.weight[0, :4] = torch.tensor([0.0, -0.0, 1.0, 0.0])
    masks = zero_masks(model)
    assert masks["blocks.0.up.weight"].keep[0, :4].tolist() == [False, False, True, False]
    assert masks["blocks.1.down.weight"].count == 96 and list(masks) == list(linears(model))
    bake(model, nm(net()))
    with torch.no_grad():
        model.blocks[0].up.weight[0, 0:4] = 0.0  # kept weights that are 0 by chance: the pattern still holds
    assert zero_masks(model, pattern="2:4")["blocks.0.up.weight"].keep[0, :4].tolist() == [True, True, False, False]


def test_zero_masks_of_a_transposed_weight_run_along_its_inputs():
    model = nn.Sequential(Conv1D(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[1::2] = 0
    assert zero_masks(model, "0", "2:4")["0.weight"].pattern == NM(2, 4, -2)
    with pytest.raises(BadInput, match="transposed"):
        zero_masks(model, "0", "block:2x2")


def test_the_guard_names_the_site_the_step_and_how_many_entries_broke():
    model = net()
    masks = nm(model)
    bake(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with guard(optimizer, model, masks) as watch:
        optimizer.step()  # no gradient yet: nothing moves
        assert watch.step == 1
        name = "blocks.0.up.weight"
        weight = model.get_parameter(name)
        weight.grad = torch.zeros_like(weight)
        for at in (~masks[name].keep).nonzero()[:3]:
            weight.grad[tuple(at)] = 1.0
        first = tuple((~masks[name].keep).nonzero()[0].tolist())
        with pytest.raises(BadInput) as error:
            optimizer.step()
    told = str(error.value)
    assert told.startswith(f"{name}: after step 2, 3 of 48 dropped weights are not 0") and str(first) in told
    assert "2:4 is broken in" in told and "\n" not in told
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(BadInput, match="after step 0"), guard(optimizer, net(), masks):
        pass
    with pytest.raises(BadInput, match="no parameter named tail"), guard(optimizer, model, MaskSet({"tail": masks[name]})):
        pass
    with pytest.raises(BadInput, match=r"head.weight: the mask has shape"):
        with guard(optimizer, model, MaskSet({"head.weight": masks[name]})):
            pass


@pytest.mark.parametrize("trouble", ["nan", "decay of dense copies"])
def test_the_guard_sees_nan_and_values_that_momentum_brings_back(trouble):
    model = net()
    masks = nm(model)
    bake(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with guard(optimizer, model, masks), pytest.raises(BadInput, match="after step 1"):
        model(batch()).sum().backward()
        if trouble == "nan":
            model.blocks[0].up.weight.grad.fill_(float("nan"))
        optimizer.step()


def test_the_guard_passes_masked_lora_and_stops_plain_lora():
    for masked in (True, False):
        model = net()
        masks = nm(model)
        bake(model, masks)
        with Lora(rank=2).attach(model, masks if masked else None) as run:
            optimizer = torch.optim.AdamW(run.trainable, lr=0.1)
            with guard(optimizer, model, masks) as watch:
                if masked:
                    for _ in range(4):
                        step(model, run, optimizer=optimizer)
                    assert watch.step == 4
                else:
                    with pytest.raises(BadInput, match=r"blocks.0.up.weight: after step 1, \d+ of 48"):
                        step(model, run, optimizer=optimizer)


# PEFT's folders


def trained(model, masks=None, **settings):
    with Lora(**{"rank": 2, **settings}).attach(model, masks) as run:
        step(model, run, lr=0.05)
        return run.adapter(), model(batch())


def test_a_folder_round_trip_merges_to_the_attached_outputs(tmp_path):
    for number, settings in enumerate(({}, {"alpha": 3.0, "rslora": True}, {"where": ("up",)})):
        model = net()
        adapter, attached = trained(model, **settings)
        write_peft(tmp_path / str(number), adapter, base="here")
        back = read_peft(tmp_path / str(number))
        assert back.masks is None and list(back.A) == sorted(adapter.A)
        back.merge(model)
        torch.testing.assert_close(model(batch()), attached, rtol=1e-5, atol=1e-5)


def test_masks_travel_beside_the_adapter_and_a_dense_export_must_be_asked_for(tmp_path):
    model = net()
    masks = nm(model)
    bake(model, masks)
    adapter, attached = trained(model, masks)
    with pytest.raises(BadInput, match="PEFT would fill 192 dropped weights of 4 sites"):
        write_peft(tmp_path, adapter)
    assert not list(tmp_path.iterdir())
    write_peft(tmp_path, adapter, dense=True)
    back = read_peft(tmp_path)
    assert back.masks.equal(masks)
    back.merge(model)
    torch.testing.assert_close(model(batch()), attached, rtol=1e-5, atol=1e-5)
    assert all(not bool(model.get_parameter(n)[~m.keep].any()) for n, m in masks.items())
    write_peft(tmp_path, unmasked(adapter))
    assert read_peft(tmp_path).masks is None


def test_merging_a_foreign_adapter_masked(tmp_path):
    """mask * (W + BA) by hand, with masks given at the merge."""
    model = net()
    adapter, _ = trained(model)
    masks = nm(model)
    want = {n: torch.where(masks[n].keep, model.get_parameter(n) + adapter.delta(n), 0.0) for n in adapter.A}
    adapter.merge(model, masks)
    for name, value in want.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    with pytest.raises(BadInput, match="is a weight of the adapter: head.weight"):
        adapter.merge(model, MaskSet({"head.weight": Mask(torch.ones(3, 8, dtype=torch.bool))}))


def test_what_the_reader_refuses(tmp_path):
    adapter, _ = trained(net())
    write_peft(tmp_path, adapter)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, told in (
        ({"peft_type": "LOHA"}, "not 'LORA'"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["head"]}, "modules_to_save"), ({"r": 0}, "r is 0"), ({"lora_alpha": "x"}, "lora_alpha"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"), ({"r": 3}, "rank 2, adapter_config.json says 3"),
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(BadInput, match=told) as error:
            read_peft(tmp_path)
        assert "\n" not in str(error.value)
    path.write_text(
        json.dumps(good | {"rank_pattern": {"up": 2}, "r": 2, "alpha_pattern": {"1.up": 6}, "use_rslora": False})
    )
    back = read_peft(tmp_path)
    assert back.scale["blocks.1.up.weight"] == 3 and back.scale["blocks.0.up.weight"] == good["lora_alpha"] / 2
    path.write_text("{")
    with pytest.raises(BadInput, match="no readable"):
        read_peft(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickled"):
        read_peft(tmp_path)
    with pytest.raises(BadInput, match="no readable"):
        read_peft(tmp_path / "none")


def test_what_the_writer_and_the_merge_refuse(tmp_path):
    model = net()
    adapter, _ = trained(model)
    names = list(adapter.A)
    scales = {**adapter.scale, names[0]: 7.0}
    with pytest.raises(BadInput, match="one rank and one scale"):
        write_peft(tmp_path, Adapter(adapter.A, adapter.B, scales))
    broken = Adapter({**adapter.A, names[0]: adapter.A[names[0]] * float("inf")}, adapter.B, adapter.scale)
    with pytest.raises(BadInput, match="factor A"):
        write_peft(tmp_path, broken)
    before = photo(model)
    with pytest.raises(BadInput, match=f"{names[0]}: the adapter's B A"):
        broken.merge(model)
    turned = Adapter({names[0]: adapter.A[names[1]]}, {names[0]: adapter.B[names[1]]}, {names[0]: 1.0})
    with pytest.raises(BadInput, match=r"for a weight of shape \(8, 12\), the model's is \(12, 8\)"):
        turned.merge(model)
    with pytest.raises(BadInput, match="matches no Linear"):
        adapter.merge(nn.Sequential(nn.Linear(2, 2)))
    assert same(before, photo(model))


@pytest.mark.filterwarnings("ignore")  # of peft and transformers themselves
@pytest.mark.parametrize("settings", [{}, {"alpha": 3.0, "rslora": True}])
def test_peft_loads_what_is_written_and_we_merge_what_peft_writes(tmp_path, settings):
    peft = pytest.importorskip("peft")
    model, x = net(), batch()
    adapter, attached = trained(model, **settings)
    write_peft(tmp_path / "ours", adapter)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x), attached, rtol=1e-5, atol=1e-5)

    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["up", "down"], rank_pattern={"down": 2},
                             alpha_pattern={"blocks.0.up": 9}, init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(net(), config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = net()
    read_peft(tmp_path / "theirs").merge(model)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_agrees_on_transposed_weights(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
    model = GPT2Model(config).eval()
    ids = torch.arange(6)[None]
    with Lora(rank=2, where=("c_attn",)).attach(model) as run:
        assert run.branched.sites["h.0.attn.c_attn.weight"].transposed
        run.branched.branches["h.0.attn.c_attn.weight"].B.data.fill_(0.3)
        attached = model(ids).last_hidden_state
        write_peft(tmp_path, run.adapter())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(ids).last_hidden_state, attached, rtol=1e-5, atol=1e-5)
    read_peft(tmp_path).merge(model)
    torch.testing.assert_close(model(ids).last_hidden_state, attached, rtol=1e-5, atol=1e-5)
