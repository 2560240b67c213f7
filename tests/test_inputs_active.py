"""Active-only operators as a context: exactness, no leak, statistics, and what is left behind (nothing)."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import Exact, spread
from maskwright.inputs.active import active
from maskwright.lab.models import ResNet8

EVERY = Mask(torch.ones(3, 4, 4, dtype=torch.bool))
MASK = Exact(0.4)((3, 4, 4), rng=generator(0))  # 6 of 16
IMAGES = torch.randn(3, 2, 16, 16, generator=generator(1))


class Last(nn.Module):
    """A ConvNeXt block: depthwise, then norm and linear maps with biases along the last dim."""

    def __init__(self):
        super().__init__()
        self.inlet, self.mix = nn.Conv2d(2, 6, 2, 2), nn.Conv2d(6, 6, 7, padding=3, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        x = self.inlet(x)
        y = self.down(F.gelu(self.up(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


def net(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "resnet":
            return ResNet8(4, channels=2)
        if kind == "convnext":
            return Last()
        return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3, 1, 1))


KINDS = pytest.mark.parametrize("kind", ["resnet", "convnext", "plain"])


def outcome(model, x, mask, **settings):
    """Output, gradients and buffers of one call."""
    model = copy.deepcopy(model)
    with active(model, mask, **settings):
        out = model(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters()], list(model.buffers())


def dense(model, x):
    model = copy.deepcopy(model)
    out = model(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters()], list(model.buffers())


def flat(found):
    out, grads, buffers = found
    return [out, *grads, *buffers]


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_with_everything_active_it_is_the_dense_net_to_the_bit_and_forced_to_1e_5(kind, training):
    model = net(kind).train(training)
    expected = flat(dense(model, IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(flat(outcome(model, IMAGES, EVERY)), expected, strict=True))
    for a, b in zip(flat(outcome(model, IMAGES, EVERY, force=True)), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("fill", [7.0, float("nan")])
def test_what_is_hidden_changes_no_bit_of_output_gradients_or_buffers(kind, fill):
    model = net(kind)
    other = torch.where(spread(MASK.keep, (16, 16)).unsqueeze(1), IMAGES, fill)
    for a, b in zip(flat(outcome(model, IMAGES, MASK)), flat(outcome(model, other, MASK)), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


@KINDS
def test_every_map_of_every_module_is_0_outside_and_not_inside(kind):
    model, seen = net(kind), {}

    def note(name, out):
        if out.ndim == 4:  # channels last where the last dim is not a side of a square
            seen[name] = out if out.shape[2] == out.shape[3] else out.permute(0, 3, 1, 2)

    with active(model, MASK):
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, out, name=name: note(name, out))
        model(IMAGES)
    assert len(seen) >= 4
    for name, out in seen.items():
        some = (out != 0).any(1)
        assert torch.equal(some, some & spread(MASK.keep, tuple(out.shape[2:]))), name
        if "norm" in name or kind != "resnet":  # after a ReLU a place may be 0 in all 4 channels
            assert some.float().mean() == 6 / 16, name


def test_a_masked_convolution_is_the_submanifold_one_place_by_place():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 6, 6, generator=generator(2))
    keep = torch.rand(1, 6, 6, generator=generator(3)) < 0.5
    with active(conv, Mask(keep)):
        out = conv(x)
    for row in range(6):
        for column in range(6):
            total = torch.zeros(3)
            if keep[0, row, column]:
                total = conv.bias.detach().clone()
                for i in range(3):
                    for j in range(3):
                        at = (row + i - 1, column + j - 1)
                        if 0 <= at[0] < 6 and 0 <= at[1] < 6 and keep[0, at[0], at[1]]:
                            total += conv.weight[:, :, i, j].detach() @ x[0, :, at[0], at[1]]
            assert torch.allclose(out[0, :, row, column], total, atol=1e-6)


def test_batch_norm_takes_its_statistics_from_active_places_alone():
    norm = nn.BatchNorm2d(1, momentum=0.1)
    x = torch.tensor([[[[1.0, 99.0], [99.0, 99.0]]], [[[99.0, 99.0], [99.0, 5.0]]]])
    keep = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    with active(norm, Mask(keep)):
        out = norm(x)
    assert norm.running_mean.item() == pytest.approx(0.1 * 3.0)  # the mean of 1 and 5
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 8.0)  # unbiased: (4 + 4) / 1
    assert out[0, 0, 0, 0].item() == pytest.approx(-1, abs=1e-3) and out[1, 0, 1, 1].item() == pytest.approx(1, abs=1e-3)
    assert int((out != 0).sum()) == 2 and int(norm.num_batches_tracked) == 1


def test_one_active_place_is_too_few_for_batch_statistics_but_not_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.BatchNorm2d(2))
    mask = Mask(torch.tensor([[[True, False], [False, False]]]))
    with active(model, mask), pytest.raises(BadInput, match=r"^1 \(BatchNorm2d\): 1 active place .* at least 2"):
        model(torch.zeros(1, 1, 4, 4))
    model.eval()
    with active(model, mask):
        assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 2, 2, 2)


def test_on_a_map_coarser_than_the_mask_a_place_is_active_when_anything_under_it_is():
    conv = nn.Conv2d(1, 1, 4, 4)
    keep = torch.zeros(1, 8, 8, dtype=torch.bool)
    keep[0, 1, 6] = True
    with active(conv, Mask(keep)):
        out = conv(torch.ones(1, 1, 16, 16))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 3] = True  # rows 4-7 of the image hold row 2 of the mask: pixel rows 2-3 lie in place 0
    assert torch.equal(out[0, 0] != 0, expected)


def test_nothing_is_left_and_no_state_moves_where_a_call_fails():
    model = net("plain")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="does not lie on"):
        with active(model, MASK):
            model(IMAGES[:2])
    with pytest.raises(ZeroDivisionError):
        with active(model, MASK):
            model[2].register_forward_pre_hook(lambda module, args: 1 / 0)
            model(IMAGES)
    model[2]._forward_pre_hooks.clear()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not (module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called)
    assert model.state_dict().keys() == state.keys()
    assert torch.nn.functional.relu(torch.tensor(-1.0)) == 0 and not torch.overrides._get_current_function_mode()
    assert torch.equal(model(IMAGES), model(IMAGES))


def test_two_models_and_one_inside_itself_do_not_disturb_each_other():
    one, two = net("resnet").eval(), net("convnext")
    other = Exact(0.4)((3, 4, 4), rng=generator(5))
    with active(one, MASK):
        alone = one(IMAGES)
    with active(two, other):
        second = two(IMAGES)
    with active(one, other):
        inner = one(IMAGES)
    with active(one, MASK), active(two, other):
        assert torch.equal(one(IMAGES), alone) and torch.equal(two(IMAGES), second)
        with active(one, other):
            assert torch.equal(one(IMAGES), inner)
        with active(one, EVERY):
            assert torch.equal(one(IMAGES), net("resnet").eval()(IMAGES))
        assert torch.equal(one(IMAGES), alone)
        with pytest.raises(BadInput, match="under active"):
            with active(one.blocks, MASK):
                pass


def test_each_thread_has_its_own_mask_on_one_model():
    model, results = net("resnet").eval(), {}
    masks = [Exact(0.4)((3, 4, 4), rng=generator(seed)) for seed in range(4)]
    expected = []
    for mask in masks:
        with active(model, mask):
            expected.append(model(IMAGES))
    barrier = threading.Barrier(4)

    def work(at):
        with torch.no_grad(), active(model, masks[at]):
            barrier.wait()
            results[at] = [model(IMAGES) for _ in range(3)]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, one in enumerate(expected):
        assert all(torch.equal(out, one) for out in results[at])


class Recomputed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inlet, self.tail, self.how = nn.Conv2d(2, 4, 3, 2, 1), net("plain")[1:], how

    def forward(self, x):
        x = self.inlet(x)
        return self.tail(x) if self.how is None else checkpoint(self.tail, x, use_reentrant=self.how)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_recomputed_in_backward_are_masked_too(reentrant):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recomputed(None)
    grads = []
    for how in (None, reentrant):
        model.how = how
        model.zero_grad()
        with active(model, MASK):
            model(IMAGES).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bad_masks():
    model = net("plain")
    empty = MASK.keep.clone()
    empty[1] = False
    for mask, what in ((Mask(empty), "nothing of sample 1"), (Mask(MASK.keep[0]), r"\(batch, rows, columns\)")):
        with pytest.raises(BadInput, match=what), active(model, mask):
            pass
    with pytest.raises(BadInput, match="needs? images"), active(model, MASK):
        model(torch.zeros(3, 5))
    bad = IMAGES.clone()
    bad[MASK.indices()[0] // 16, 0, :, :] = float("nan")
    with pytest.raises(BadInput, match="NaN"), active(model, MASK):
        model(bad)
    compiled = nn.Sequential(torch.compile(nn.ReLU(), backend="eager"))
    with pytest.raises(BadInput, match=r"^0 .*compiled or scripted"), active(compiled, MASK):
        pass
