"""The contract of the updates place: generated from the cards, every room passes it without a line of its own."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.core.method import get, methods
from maskwright.core.select import generator
from maskwright.lab.models import Vit
from maskwright.updates import MergeMethod, Tuning, merge

CARDS = methods("updates")
TUNING = [c for c in CARDS if c.contract.kind == "mask"]
MERGING = [c for c in CARDS if c.contract.kind == "merge"]
each = pytest.mark.parametrize


def method(card, **settings):
    return card.load()(**{**card.contract.tiny, **settings})


def test_every_room_is_one_of_the_two_kinds():
    assert {c.slug for c in CARDS} == {c.slug for c in TUNING + MERGING}
    assert all(issubclass(c.load(), Tuning) and c.when == "training" for c in TUNING)
    assert all(issubclass(c.load(), MergeMethod) and c.when == "one-shot" for c in MERGING)


# --- training rooms ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def net():
    """Residual layers, a buffer and a part that was frozen by the user."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Layer(), Layer(), nn.BatchNorm1d(16))
    model[0].up.bias.requires_grad_(False)
    model[1].eval()
    return model, torch.randn(8, 16, generator=generator(0, "x"))


def vit():
    return Vit(16, 4, layers=2, width=16, heads=2, classes=16), torch.rand(8, 1, 16, 16, generator=generator(0, "images"))


MODELS = {"net": net, "vit": vit}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
         "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip


def told(model):
    """Everything of a model that must be as before, but for the values of its tensors."""
    return {
        "keys": list(model.state_dict()),
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, type(m).__name__, m.training) for name, m in model.named_modules()],
        "hooks": [(hooks, len(getattr(m, hooks) or ())) for m in model.modules() for hooks in HOOKS],
        "slots": [name for name, m in model.named_modules() if hasattr(m, "parametrizations")],
    }


def values(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def step(model, run, x, seed=0):
    """One step of an ordinary optimiser in an ordinary loop; the loss after it."""
    optimizer = torch.optim.Adam(run.trainable, lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 16).backward()
        optimizer.step()


def eval_output(model, x):
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        out = model(x)
    for module, mode in modes:
        module.training = mode
    return out


@each("kind", MODELS)
@each("card", TUNING, ids=lambda c: c.slug)
def test_attaches_trains_by_an_ordinary_optimizer_and_leaves_no_trace(card, kind):
    model, x = MODELS[kind]()
    before, state, plain = told(model), values(model), eval_output(model, x)
    with method(card).attach(model, seed=0) as run:
        assert run.trainable and all(isinstance(p, nn.Parameter) and p.requires_grad for p in run.trainable)
        assert len({id(p) for p in run.trainable}) == len(run.trainable)
        first = [p.detach().clone() for p in run.trainable]
        step(model, run, x)
        assert any(not torch.equal(old, new) for old, new in zip(first, run.trainable, strict=True))
        mine = {id(p) for p in run.trainable}
    assert told(model) == before
    # Weights that a method trains in place are trained, and so are the running statistics beside them.
    changed = {name for name, p in model.named_parameters() if id(p) in mine}
    changed |= {name for name, _ in model.named_buffers()} if changed else set()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name not in changed)
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    if not changed:
        assert torch.equal(eval_output(model, x), plain)


@each("card", TUNING, ids=lambda c: c.slug)
def test_an_error_inside_leaves_no_trace_either(card):
    model, x = net()
    before = told(model)
    with pytest.raises(RuntimeError, match="mine"), method(card).attach(model) as run:
        step(model, run, x)
        raise RuntimeError("mine")
    assert told(model) == before


@each("kind", MODELS)
@each("card", TUNING, ids=lambda c: c.slug)
def test_masks_hold_depend_on_the_seed_alone_and_are_saved(card, kind, tmp_path):
    found = []
    for _ in range(2):
        model, x = MODELS[kind]()
        with method(card).attach(model, seed=3) as run:
            step(model, run, x)
            found.append(run.masks().check())
    masks = found[0]
    assert len(masks) and masks.equal(found[1])
    assert masks.made_by["method"] == card.slug and masks.made_by["seed"] == 3
    masks.fits(model)  # the names and shapes of the model's own parameters
    masks.save(tmp_path / "m.safetensors")
    assert MaskSet.load(tmp_path / "m.safetensors").equal(masks)


@each("kind", MODELS)
@each("card", TUNING, ids=lambda c: c.slug)
def test_merge_gives_a_plain_model_that_computes_the_same(card, kind):
    model, x = MODELS[kind]()
    before, state = told(model), values(model)
    with method(card).attach(model, seed=0) as run:
        step(model, run, x)
        masks, attached = run.masks(), eval_output(model, x)
        mine = {id(p) for p in run.trainable}
        run.merge()
    torch.testing.assert_close(eval_output(model, x), attached, atol=1e-5, rtol=1e-5)
    assert told(model) == before
    # Where weights are trained in place an ordinary step moves all of them: the method's own loop holds to the masks.
    in_place = any(id(p) in mine for p in model.parameters())
    for name, mask in () if in_place else masks.items():
        old, new = state[name][~mask.keep], model.state_dict()[name][~mask.keep]
        assert ((new == old) | (new == 0)).all(), name  # outside the mask: untouched, or switched off
    with method(card).attach(model, seed=0) as again:  # and it can be tuned on
        step(model, again, x)


# --- merging rooms -------------------------------------------------------------------------------------------------

SHAPES = {"a.weight": (6, 7), "a.bias": (6,), "conv.weight": (4, 2, 3, 3), "b.weight": (5, 6), "scale": ()}


def state(seed, base=None, size=0.1):
    """A state dict, or one tuned from `base`: floats of several shapes, a counter and a bool."""
    rng = generator(seed, "state")
    noise = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    floats = noise if base is None else {name: base[name] + size * value for name, value in noise.items()}
    return {**floats, "norm.num_batches_tracked": torch.tensor(seed), "causal": torch.tensor([True, bool(seed % 2)])}


BASE = state(0)
TUNED = [state(seed, BASE) for seed in (1, 2, 3)]


def delta(result, base=BASE):
    return {name: result.state[name] - base[name] for name in SHAPES}


def close(a, b, **how):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"atol": 2e-6, "rtol": 1e-5, **how})


def whole(card, **settings):
    """The room's settings with nothing dropped."""
    fields = {f.name for f in dataclasses.fields(card.load())}
    return method(
        card, **{name: value for name, value in (("density", 1.0), ("drop_top", 0.0)) if name in fields}, **settings
    )


def drops(card):
    return any(f.name == "density" for f in dataclasses.fields(card.load()))


def kept(card, made, number):
    """How many of a tensor's entries stay, by the settings."""
    return max(1, int(made.density * number)) if drops(card) else number


@each("card", MERGING, ids=lambda c: c.slug)
def test_equal_copies_at_equal_parts_are_one_copy(card):
    random = card.contract.selects == "random"  # each copy draws a mask of its own: only the whole ones agree
    made = whole(card) if random else method(card)
    one = merge(BASE, [TUNED[0]], made)
    for copies in (2, 3):
        close(merge(BASE, [TUNED[0]] * copies, made, weights=[1 / copies] * copies).state, one.state)
    close(delta(merge(BASE, [BASE] * 3, made)), {name: torch.zeros(shape) for name, shape in SHAPES.items()}, atol=0, rtol=0)


@each("card", MERGING, ids=lambda c: c.slug)
def test_the_density_of_each_tensor_is_exact_however_small(card):
    made = method(card)
    result = merge(BASE, [TUNED[0]], made)
    assert set(result.report) == set(SHAPES)
    for name, value in delta(result).items():
        number = value.numel()
        told = result.report[name]
        assert told.total == number and len(told.kept) == 1
        assert told.kept[0] == int((value != 0).sum())
        if card.contract.selects != "random":
            assert told.kept[0] == (kept(card, made, number) if value.ndim else 1)
    if drops(card):  # a share that is less than one entry wipes no tensor
        tiny = method(card, density=0.01, **({"drop_top": 0.01} if "drop_top" in card.contract.tiny else {}))
        if card.contract.selects != "random":
            assert all(told.kept[0] >= 1 for told in merge(BASE, [TUNED[0]], tiny).report.values())


@each("card", [c for c in MERGING if c.contract.selects == "random"], ids=lambda c: c.slug)
def test_chance_keeps_its_share_and_the_mean_over_seeds_is_the_dense_delta(card):
    base, tuned = {"w": torch.zeros(200, 200)}, {"w": torch.full((200, 200), 0.5)}
    made = method(card)
    share = merge(base, [tuned], made).report["w"].kept[0] / 40_000
    assert abs(share - made.density) < 4 * (made.density * (1 - made.density) / 40_000) ** 0.5
    mean = sum(merge(base, [tuned], method(card, scale=1.0), seed=seed).state["w"].mean() for seed in range(4)) / 4
    assert abs(float(mean) - 0.5) < 0.01
    # Models draw apart from each other, and one model's masks are not another's of the next seed.
    drawn = [merge(base, [tuned, base], made).state, merge(base, [base, tuned], made).state]
    drawn.append(merge(base, [tuned, base], made, seed=1).state)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        same = float(((drawn[i]["w"] != 0) == (drawn[j]["w"] != 0)).float().mean())
        assert abs(same - made.density**2 - (1 - made.density) ** 2) < 0.02


@each("card", MERGING, ids=lambda c: c.slug)
def test_with_nothing_dropped_one_model_comes_back_and_a_plain_sum_is_task_arithmetic(card):
    close(merge(BASE, [TUNED[0]], whole(card, scale=1.0)).state, {**TUNED[0], **integers()})
    made = whole(card, scale=0.3)
    consensus = made.parts().consensus
    if type(consensus).__name__ == "Summed" and not consensus.normalise:
        wanted = {name: BASE[name] + 0.3 * sum(t[name] - BASE[name] for t in TUNED) for name in SHAPES}
        got = merge(BASE, TUNED, made)
        close({name: got.state[name] for name in SHAPES}, wanted)
        close(got.state, merge(BASE, TUNED, get("task_arithmetic")(scale=0.3)).state, atol=0, rtol=0)


def integers():
    return {name: value for name, value in BASE.items() if name not in SHAPES}


@each("group", ["tensor", "row", "global"])
@each("card", MERGING, ids=lambda c: c.slug)
def test_neither_the_order_of_tensors_nor_of_models_matters(card, group):
    has = "group" in {f.name for f in dataclasses.fields(card.load())}
    if not has and group != "tensor":
        pytest.skip("no groups")
    made = method(card, group=group) if has else method(card)
    first = merge(BASE, TUNED, made, weights=[0.5, 1.0, 0.25], seed=1)
    turned = [dict(reversed(s.items())) for s in (BASE, *TUNED)]
    again = merge(turned[0], turned[1:], made, weights=[0.5, 1.0, 0.25], seed=1)
    close(dict(reversed(again.state.items())), first.state, atol=0, rtol=0)
    if card.contract.selects != "random":
        close(merge(BASE, TUNED[::-1], made, weights=[0.25, 1.0, 0.5], seed=1).state, first.state)


@each("card", MERGING, ids=lambda c: c.slug)
def test_same_seed_same_result_inputs_unchanged_integers_from_the_base(card):
    inputs = [{name: value.clone() for name, value in s.items()} for s in (BASE, *TUNED)]
    results = [merge(BASE, TUNED, method(card), seed=seed) for seed in (0, 0, 1)]
    close(results[0].state, results[1].state, atol=0, rtol=0)
    differs = any(not torch.equal(results[0].state[name], results[2].state[name]) for name in SHAPES)
    assert differs == (card.contract.selects == "random")
    for held, now in zip(inputs, (BASE, *TUNED), strict=True):
        close(held, now, atol=0, rtol=0)
    assert list(results[0].state) == list(BASE)
    for name, value in results[0].state.items():
        assert value.dtype == BASE[name].dtype and value.shape == BASE[name].shape
        assert value.data_ptr() != BASE[name].data_ptr()
    for name, value in integers().items():
        assert torch.equal(results[0].state[name], value)


@each("card", MERGING, ids=lambda c: c.slug)
def test_half_precision_is_merged_in_float32_and_written_in_its_own(card):
    half = [{name: v.bfloat16() if v.is_floating_point() else v for name, v in s.items()} for s in (BASE, *TUNED)]
    wide = [{name: v.float() if v.is_floating_point() else v for name, v in s.items()} for s in half]
    got, wanted = (merge(s[0], s[1:], method(card)) for s in (half, wide))
    for name in SHAPES:
        assert got.state[name].dtype == torch.bfloat16
        assert torch.equal(got.state[name], wanted.state[name].bfloat16())


@each("bad", [float("nan"), float("inf")])
@each("card", MERGING, ids=lambda c: c.slug)
def test_values_that_are_not_finite_are_refused_naming_the_tensor(card, bad):
    for where in range(4):  # in the base or in any model
        broken = [{name: value.clone() for name, value in s.items()} for s in (BASE, *TUNED)]
        broken[where]["b.weight"][2, 3] = bad
        for seed in range(3):  # chance may drop the entry, and it is refused all the same
            with pytest.raises(BadInput, match=r"b\.weight"):
                merge(broken[0], broken[1:], method(card), seed=seed)


@each("card", MERGING, ids=lambda c: c.slug)
def test_models_that_do_not_fit_are_refused_by_name(card):
    made = method(card)
    shapes = {**TUNED[1], "b.weight": torch.zeros(5, 7)}
    less = {name: value for name, value in TUNED[1].items() if name != "b.weight"}
    more = {**TUNED[1], "extra.weight": torch.zeros(2)}
    for wrong, name in ((shapes, r"b\.weight"), (less, r"b\.weight"), (more, r"extra\.weight")):
        with pytest.raises(BadInput, match=name) as told:
            merge(BASE, [TUNED[0], wrong], made)
        assert "\n" not in str(told.value) and "model 1" in str(told.value)
    for models, weights in (([], None), (TUNED, [1.0]), (TUNED, [1.0, 1.0, float("nan")])):
        with pytest.raises(BadInput):
            merge(BASE, models, made, weights=weights)
    with pytest.raises(BadInput, match="scale"):
        method(card, scale=float("nan"))
