"""Every active-only form against a loop over active places, and everything that has none refused by its layer's name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import Exact, spread
from maskwright.inputs.active import active

MASK = Exact(0.4)((2, 4, 4), rng=generator(0))
X = torch.randn(2, 4, 8, 8, generator=generator(1))
KEEP = spread(MASK.keep, (8, 8))
HIDDEN = torch.where(KEEP.unsqueeze(1), X, 0.0)


class Call(nn.Module):
    """A module around any function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def under(function, x=X, mask=MASK):
    model = Call(function)
    with active(model, mask):
        return model(x)


def places(x, sample):
    """(active, channels) of one sample."""
    return x[sample].movedim(0, -1)[KEEP[sample]]


def per_sample(function):
    return torch.stack([function(places(X, sample)) for sample in range(2)])


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean([-1, -2]),
        lambda x: torch.mean(x, dim=(2, 3)),
        lambda x: x.mean((2, 3), keepdim=True).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: nn.AdaptiveAvgPool2d((1, 1))(x)[:, :, 0, 0],
        lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    ],
)
def test_means_over_space_are_over_active_places(function):
    assert close(under(function), per_sample(lambda rows: rows.mean(0)))


def test_other_reductions():
    assert close(under(lambda x: x.sum((2, 3))), per_sample(lambda rows: rows.sum(0)))
    assert close(under(lambda x: x.amax((2, 3))), per_sample(lambda rows: rows.amax(0)))
    assert close(under(lambda x: (x - 9).amax((2, 3))), per_sample(lambda rows: rows.amax(0) - 9))  # all below 0
    assert close(under(lambda x: x.amin((2, 3))), per_sample(lambda rows: rows.amin(0)))
    assert close(under(lambda x: F.adaptive_max_pool2d(x, 1).flatten(1)), per_sample(lambda rows: rows.amax(0)))
    assert close(under(lambda x: x.norm(p=2, dim=(2, 3))), per_sample(lambda rows: rows.norm(dim=0)))
    assert under(lambda x: x.isnan().any()).item() is False and under(lambda x: (x.abs() > 0).all()).item() is True
    assert close(under(lambda x: x.mean()), torch.cat([places(X, 0), places(X, 1)]).mean())
    assert close(under(lambda x: x.mean((1, 2, 3))), per_sample(lambda rows: rows.mean()))
    by_channel = under(lambda x: x.mean(1, keepdim=True) + 1)
    assert torch.equal(by_channel != 0, KEEP.unsqueeze(1)) and close(by_channel[KEEP.unsqueeze(1)], X.mean(1)[KEEP] + 1)
    assert torch.equal(under(lambda x: x.mean(1) + 1) != 0, KEEP)


@pytest.mark.parametrize("padding", [0, 1])
def test_pools_take_active_places_only(padding):
    side = 3 if padding else 2
    biggest = under(lambda x: F.max_pool2d(x - 9, side, 2, padding))  # all values below 0: a zero would win
    mean = under(lambda x: F.avg_pool2d(x, side, 2, padding, count_include_pad=False))
    for sample in range(2):
        for row in range(4):
            for column in range(4):
                window = [
                    X[sample, :, i, j]
                    for i in range(2 * row - padding, 2 * row - padding + side)
                    for j in range(2 * column - padding, 2 * column - padding + side)
                    if 0 <= i < 8 and 0 <= j < 8 and KEEP[sample, i, j]
                ]
                alive = bool(MASK.keep[sample, row, column])
                zero = torch.zeros(4)
                expected = torch.stack(window) if alive else zero
                assert close(biggest[sample, :, row, column], expected.amax(0) - 9 if alive else zero)
                assert close(mean[sample, :, row, column], expected.mean(0) if alive else zero)


def test_padding_in_an_average_counts_as_the_layer_counts_it():
    keep = Mask(torch.ones(2, 4, 4, dtype=torch.bool))
    model = nn.AvgPool2d(3, 2, 1)
    with active(model, keep, force=True):
        assert close(model(X), F.avg_pool2d(X, 3, 2, 1))
    assert close(under(lambda x: F.adaptive_avg_pool2d(x, 4)), under(lambda x: F.avg_pool2d(x, 2)))
    assert close(under(lambda x: F.adaptive_avg_pool2d(x, 8)), HIDDEN)


@pytest.mark.parametrize("groups", [1, 2])
def test_group_and_instance_norm_see_active_places(groups):
    norm = nn.GroupNorm(groups, 4)
    nn.init.normal_(norm.weight, generator=generator(3))
    nn.init.normal_(norm.bias, generator=generator(4))
    with active(norm, MASK):
        out = norm(X)
    for sample in range(2):
        rows = places(X, sample).unsqueeze(0).transpose(1, 2)  # (1, channels, active)
        assert close(places(out, sample), norm(rows)[0].T)
    assert torch.equal((out != 0).any(1), KEEP)
    instance = under(nn.InstanceNorm2d(4))
    assert close(places(instance, 1), F.instance_norm(places(X, 1).T.unsqueeze(0))[0].T)


def test_layer_norm_and_linear_along_the_last_dim():
    norm, line = nn.LayerNorm(4), nn.Linear(4, 3)
    nn.init.normal_(norm.bias, generator=generator(5))
    out = under(lambda x: line(norm(x.permute(0, 2, 3, 1))))
    assert torch.equal((out != 0).any(3), KEEP)
    assert close(out[KEEP], line(norm(torch.cat([places(X, 0), places(X, 1)]))))


@pytest.mark.parametrize("stride,groups,bias", [(1, 1, True), (1, 1, False), (2, 1, True), (1, 2, True)])
def test_pointwise_convolutions_of_every_kind(stride, groups, bias):
    conv = nn.Conv2d(4, 6, 1, stride, groups=groups, bias=bias)
    out = under(conv)
    keep = spread(MASK.keep, tuple(out.shape[2:]))
    assert close(out, torch.where(keep.unsqueeze(1), conv(HIDDEN), 0)) and out.is_contiguous()


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x.exp(),
        F.softplus,
        lambda x: x + torch.arange(4.0).view(-1, 1, 1),
        lambda x: x.clone().add_(1),
        lambda x: x.clone().sigmoid_(),
        lambda x: torch.cat([x[:, :2], torch.ones(2, 2, 8, 8)], 1),
        lambda x: x.softmax(1),
        lambda x: torch.where(x > 0, x, 1.0),
        lambda x: x / torch.zeros(4, 1, 1).add(2) + 1,
        lambda x: F.normalize(x, dim=1) + 1,
        lambda x: x.chunk(2, 1)[0] + 1,
        lambda x: F.dropout(x + 1, 0.0),
        lambda x: x.view(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8) + 1,
        lambda x: F.interpolate(x + 1, scale_factor=2)[:, :, :, :],
    ],
)
def test_what_works_place_by_place_is_put_back_to_0_outside(function):
    out, expected = under(function), function(HIDDEN)
    keep = spread(MASK.keep, tuple(out.shape[2:])).unsqueeze(1)
    assert torch.equal(out, torch.where(keep, expected, 0))


def test_squeeze_excite_pools_active_places():
    squeeze, excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
    out = under(lambda x: x * torch.sigmoid(excite(F.relu(squeeze(F.adaptive_avg_pool2d(x, 1))))))
    mean = per_sample(lambda rows: rows.mean(0)).view(2, 4, 1, 1)
    assert close(out, HIDDEN * torch.sigmoid(excite(F.relu(squeeze(mean)))))


def test_zeros_padded_before_a_convolution_of_its_own():
    weight = torch.randn(4, 4, 3, 3, generator=generator(6))
    assert close(under(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), weight)), under(lambda x: F.conv2d(x, weight, padding=1)))


@pytest.mark.parametrize(
    "function,what",
    [
        (lambda x: x.flatten(1), r"flatten of a map \(2, 4, 8, 8\) to \(2, 256\)"),
        (lambda x: x.view(2, 4, -1), "flattens its places"),
        (lambda x: x.reshape(-1, 8, 8), "flattens its places"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
        (lambda x: x @ x, "matmul"),
        (lambda x: x.softmax(-1), "softmax over the places"),
        (lambda x: x.max(2, keepdim=True), "max over the places"),
        (lambda x: x.mean(2), "one side"),
        (lambda x: x.mean(0), "the batch"),
        (lambda x: x.var((2, 3)), "var"),
        (lambda x: F.layer_norm(x, (8, 8)), "a norm over the places"),
        (lambda x: F.linear(x, torch.ones(3, 8)), "a linear map over the places"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "'bilinear'"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "'reflect'"),
        (lambda x: torch.roll(x, 1, 2), "roll"),
        (lambda x: x.flip(3), "flip"),
        (lambda x: x.mT, "turned over"),
        (lambda x: x.permute(2, 3, 0, 1), "moves the batch"),
        (lambda x: F.unfold(x, 2), "unfold"),
        (lambda x: x[:, :, ::2], "__getitem__"),
        (lambda x: F.conv2d(x, torch.ones(1, 4, 3, 3)), "a map of 6 x 6 does not lie on a mask of 4 x 4"),
        (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive pool"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "running statistics"),
        (lambda x: F.lp_pool2d(x, 2, 2), "lp_pool2d"),
        (lambda x: torch.einsum("bchw->bc", x), "einsum"),
    ],
)
def test_what_has_no_active_form_is_refused_by_the_layer(function, what):
    model = nn.Sequential(nn.ReLU(), Call(function))
    with active(model, MASK), pytest.raises(BadInput, match=rf"^1(\.function)? \(\w+\): .*{what}") as error:
        model(X)
    assert "\n" not in str(error.value)


def test_a_map_of_one_place_may_be_flattened():
    line = nn.Linear(4, 3)
    out = under(lambda x: line(F.avg_pool2d(x, 8).flatten(1)))
    assert close(out, line(per_sample(lambda rows: rows.mean(0))))


def test_a_map_made_out_of_sight_is_masked_where_its_module_ends():
    class Plus(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

    model = nn.Sequential(Call(Plus.apply), nn.Identity())
    with active(model, MASK):
        assert torch.equal(model(X), torch.where(KEEP.unsqueeze(1), X + 1, 0))
