import copy

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs import patches, spread, unpatched
from maskwright.inputs.pretraining import Pretrain, Recipe
from maskwright.inputs.spark import Spark
from maskwright.inputs.spark.decoder import Decoder
from maskwright.inputs.spark.learner import SparkLearner
from maskwright.inputs.spark.stages import Stage, find
from maskwright.lab.models import ResNet8

IMAGES = torch.rand(3, 2, 16, 16, generator=generator(1))  # ResNet8's maps: 8 x 8 (stride 2), 4 x 4 (stride 4)
SETTINGS = Spark(width=16)


def learner(seed: int = 0, settings: Spark = SETTINGS) -> SparkLearner:
    return settings.learner(ResNet8(4, channels=2, seed=0), IMAGES, seed=seed)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(num_channels=2, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck")
    return ResNetModel(config)


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(num_channels=2, num_stages=3, hidden_sizes=[8, 12, 16], depths=[1, 2, 1]))


@pytest.mark.parametrize("shape,density,kept", [((7, 7), 0.4, 20), ((4, 4), 0.4, 6), ((1, 5), 0.5, 2)])
def test_counts_are_whole_and_round_half_to_even(shape: tuple[int, int], density: float, kept: int) -> None:
    mask = Spark(density=density).keep(torch.zeros(6, *shape), rng=generator(0))
    assert mask.keep.flatten(1).sum(1).tolist() == [kept] * 6


def test_with_everything_kept_maps_statistics_and_gradients_are_the_dense_nets() -> None:
    for training in (True, False):
        one, other = learner().train(training), learner().train(training)
        maps = one.maps(IMAGES, Mask(torch.ones(3, 4, 4, dtype=torch.bool)))
        seen: list[torch.Tensor] = []
        for stage in other.stages:
            module = other.backbone.get_submodule(stage.name)
            module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        other.backbone(IMAGES)
        for a, b in zip(maps, reversed(seen), strict=True):  # coarsest first
            assert torch.equal(a, b)
        sum(a.square().sum() for a in maps).backward()
        sum(b.square().sum() for b in seen).backward()
        for p, q in zip(one.backbone.parameters(), other.backbone.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad, atol=1e-5)
        for p, q in zip(one.backbone.buffers(), other.backbone.buffers(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("fill", [5.0, float("nan")])
def test_hidden_pixels_change_neither_maps_nor_what_is_told_nor_gradients(fill: float) -> None:
    mask = SETTINGS.keep(torch.zeros(3, 4, 4), rng=generator(2))
    other = torch.where(spread(mask.keep, (16, 16)).unsqueeze(1), IMAGES, fill)
    found = []
    for images in (IMAGES, other):
        made = learner()
        maps = made.maps(images, mask)
        told = made.decoder(maps, mask, made.under)
        (told - 1).square().mean().backward()
        found.append([*maps, told, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 30


@pytest.mark.parametrize("make", [lambda: ResNet8(8, channels=2), resnet, convnext])
def test_every_stage_map_is_0_outside_and_only_there(make) -> None:  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = make()
    images = torch.rand(4, 2, 64, 64, generator=generator(3))
    made = Spark(width=32).learner(backbone, images)
    mask = made.mask(images, generator(4))
    for stage, x in zip(made.stages, made.maps(images, mask), strict=True):
        keep = spread(mask.keep, (64 // stage.stride, 64 // stage.stride))
        some = (x != 0).any(1)
        assert x.shape == (4, stage.channels, *keep.shape[1:]) and not (some & ~keep).any()
        assert some.sum() > 0.98 * keep.sum()  # after a ReLU all channels of a place may be 0
    first = [made.loss(images, generator(step)) for step in range(2)]
    first[0].backward()
    assert all(loss.isfinite() for loss in first) and first[0] != first[1]
    assert made.features(images).shape == (4, made.stages[0].channels)


def test_stages_are_found_where_a_resolution_ends() -> None:
    x = torch.rand(1, 2, 64, 64)
    assert find(ResNet8(4, channels=2), x) == (Stage("blocks.2", 16, 4), Stage("blocks.1", 8, 2))
    found = find(resnet(), x)
    assert [(s.channels, s.stride) for s in found] == [(16, 8), (8, 4), (8, 2)]
    assert [s.name for s in found] == ["encoder", "encoder.stages.0", "embedder.embedder"]
    assert [(s.name, s.stride) for s in find(convnext(), x)[1:]] == [("encoder.stages.1", 8), ("encoder.stages.0", 4)]
    wide = find(ResNet8(4, channels=2), torch.rand(1, 2, 32, 64), ("blocks.2",))
    assert wide == (Stage("blocks.2", 16, 4),)


def test_the_dry_run_leaves_nothing() -> None:
    model = ResNet8(4, channels=2)
    model.blocks[1].eval()
    state = copy.deepcopy(model.state_dict())
    find(model, IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert model.training and not model.blocks[1].training
    assert not any(m._forward_hooks for m in model.modules())


def test_the_backbone_stays_a_plain_net_under_its_own_names_and_a_second_learner_fits() -> None:
    model = ResNet8(4, channels=2, seed=0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = SETTINGS.learner(model, IMAGES, seed=0)
    second = SETTINGS.learner(model, IMAGES, seed=0)
    assert first.stages == second.stages and list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    for a, b in zip(first.decoder.state_dict().values(), second.decoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.decoder.out.weight, learner(seed=1).decoder.out.weight)
    list(Pretrain(second, 3, lambda at: (IMAGES[at] * 255).to(torch.uint8), Recipe(steps=2, batch=3)).steps())
    fresh = ResNet8(4, channels=2, seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Zero(nn.Module):
    """A decoder that tells 0 everywhere, through a tensor whose gradient can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.told = nn.Parameter(torch.zeros(3, 2, 16, 16))

    def forward(self, maps: object, mask: object, under: object) -> torch.Tensor:
        return self.told


def test_telling_0_costs_p_less_1_over_p_and_seen_patches_have_no_gradient() -> None:
    made = learner()
    made.decoder = Zero()  # type: ignore[assignment]
    loss = made.loss(IMAGES, generator(5))
    assert loss.item() == pytest.approx(31 / 32, abs=1e-3)  # p = 2 * 4 * 4; variances here are about 1 / 12
    loss.backward()
    grad = made.decoder.told.grad
    hidden = ~spread(made.mask(IMAGES, generator(5)).keep, (16, 16)).unsqueeze(1).expand_as(grad)
    assert (grad[~hidden] == 0).all() and (grad[hidden] != 0).all()


def test_patches_and_back() -> None:
    assert torch.equal(unpatched(patches(IMAGES, 4), 4, (4, 4)), IMAGES)


def test_the_decoder_fills_with_its_tokens_and_adds_each_scale_once() -> None:
    stages = (Stage("c", 8, 4), Stage("b", 4, 2))
    decoder = Decoder(stages, 1, 8, layer_norm=True, seed=0).eval()
    assert isinstance(decoder.densify["0"].project, nn.Identity)  # widths are equal at the coarsest scale
    assert decoder.densify["1"].project.kernel_size == (3, 3)
    assert [tuple(block[4].weight.shape[:2]) for block in decoder.blocks] == [(4, 8), (2, 4)]
    for scale in decoder.densify.values():
        assert scale.token.abs().max() <= 0.02 and scale.token.abs().max() > 0
    mask = Mask(torch.tensor([[[True, False], [False, False]]]))
    maps = [torch.rand(1, 8, 2, 2), torch.rand(1, 4, 4, 4)]

    def told(maps: list[torch.Tensor]) -> torch.Tensor:
        from maskwright.inputs.active import active

        return decoder(maps, mask, active)

    other = [x.clone() for x in maps]
    other[0][0, :, 1, 1] = 9.0
    other[1][0, :, 2:, 2:] = 9.0
    assert told(maps).shape == (1, 1, 8, 8) and torch.equal(told(maps), told(other))
    for at, place in ((0, (0, 0)), (1, (1, 0))):
        moved = [x.clone() for x in maps]
        moved[at][0, 0, place[0], place[1]] += 1
        assert not torch.equal(told(maps), told(moved))


def test_reconstructions_are_in_the_images_units_and_keep_what_was_seen() -> None:
    made = learner()
    made.backbone.blocks[0].eval()
    before = copy.deepcopy(made.state_dict())
    shown = made.reconstruct(IMAGES * 255, generator(6))
    keep = spread(made.mask(IMAGES, generator(6)).keep, (16, 16)).unsqueeze(1)
    assert torch.equal(shown.filled * keep, IMAGES * 255 * keep) and shown.filled.shape == IMAGES.shape
    assert torch.equal(shown.hidden * keep, IMAGES * 255 * keep) and 20 < shown.filled[~keep.expand_as(IMAGES)].mean() < 235
    assert all(torch.equal(a, b) for a, b in zip(before.values(), made.state_dict().values(), strict=True))
    assert made.training and not made.backbone.blocks[0].training
    assert torch.equal(shown.filled, made.reconstruct(IMAGES * 255, generator(6)).filled)


@pytest.mark.parametrize("patch,grid", [(2, 8), (8, 2)])
def test_any_patch_size_goes(patch: int, grid: int) -> None:
    made = Spark(width=16, patch=patch).learner(ResNet8(4, channels=2), IMAGES)
    mask = made.mask(IMAGES, generator(7))
    assert mask.shape == (3, grid, grid) and made.loss(IMAGES, generator(7)).isfinite()
    coarse = mask.keep.view(3, 4, 2, 4, 2).any(4).any(2) if patch == 2 else spread(mask.keep, (4, 4))
    assert not ((made.maps(IMAGES, mask)[0] != 0).any(1) & ~coarse).any()


def test_without_the_hierarchy_only_the_coarsest_map_is_decoded() -> None:
    made = learner(settings=Spark(width=16, hierarchy=False))
    assert [stage.name for stage in made.stages] == ["blocks.2"] and list(made.decoder.densify) == ["0"]
    assert made.loss(IMAGES, generator(0)).isfinite()


def test_one_patch_in_the_batch_is_too_few_for_batch_norm_and_is_refused_by_name() -> None:
    made = Spark(width=16, density=0.07).learner(ResNet8(4, channels=2), IMAGES)  # 1 of 16
    with pytest.raises(BadInput, match=r"norm\d? \(BatchNorm2d\): 1 active place"):
        made.loss(IMAGES[:1], generator(0))


@pytest.mark.parametrize(
    "settings,what",
    [
        ({"density": 0.0}, "density 0"), ({"density": 1.0}, "density 1"), ({"patch": -1}, "patch"), ({"width": 0}, "width"),
        ({"stages": "blocks.2"}, "tuple"), ({"stages": ("nope",)}, "no such module"), ({"stages": ("fc",)}, "gives no map"),
        ({"stages": ("blocks.0",)}, "map of 16 x 16"), ({"stages": ("blocks.2", "blocks.2.conv2")}, "one size"),
        ({"density": 0.01}, "keeps 0 of the 16"), ({"density": 0.99}, "keeps 16 of the 16"),
        ({"width": 6}, "halved 2 times"), ({"patch": 3}, "does not divide"),
    ],
)  # fmt: skip
def test_bad_settings(settings: dict[str, object], what: str) -> None:
    with pytest.raises(BadInput, match=what) as error:
        Spark(**{"width": 16, **settings}).learner(ResNet8(4, channels=2), IMAGES)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_bad_images_and_backbones() -> None:
    with pytest.raises(BadInput, match="not finite"):
        SETTINGS.learner(ResNet8(4, channels=2), IMAGES * float("nan"))
    with pytest.raises(BadInput, match="no module gives a map"):
        SETTINGS.learner(nn.Sequential(nn.Conv2d(2, 4, 3, 3)), torch.rand(1, 2, 18, 18))
    with pytest.raises(BadInput, match="does not divide"):
        learner().loss(IMAGES[:, :, :14, :14], generator(0))
    with pytest.raises(BadInput, match="is NaN or infinite"):
        learner().loss(IMAGES * float("nan"), generator(0))
    flat = nn.Sequential(nn.Conv2d(2, 4, 4, 4), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(BadInput, match=r"1 \(Flatten\): .*flattens its places"):
        SETTINGS.learner(flat, IMAGES).loss(IMAGES, generator(0))
