"""The pre-training loop: addressed by step, resumed to the bit, refused when it makes no sense; the linear probe."""

import itertools

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs import Exact, Learner, Shown, hide, masked_loss
from maskwright.inputs.pretraining import Pretrain, Recipe, crops
from maskwright.inputs.probe import linear_probe


class Filling(Learner):
    """Fills hidden pixels by a small net with batch norm (buffers must be resumed too)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Conv2d(4, 1, 1)

    def loss(self, images, rng):
        mask = Exact(0.5)((len(images), 8, 8), rng=rng)
        return masked_loss(self.head(self.backbone(hide(images, mask))), images, ~mask)

    def features(self, images):
        return self.backbone(images).mean((2, 3))

    def reconstruct(self, images, rng):
        return Shown(images, images, images)


IMAGES = (torch.rand(10, 1, 8, 8, generator=generator(0)) * 255).to(torch.uint8)


def run(**settings):
    return Pretrain(Filling(), 10, lambda at: IMAGES[at], Recipe(**{"steps": 12, "batch": 4, "lr": 1e-2, **settings}))


def test_the_loss_falls_and_every_step_is_given():
    one = run(steps=60)
    losses = list(one.steps())
    assert len(losses) == one.step == 60 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_files_may_be_named_by_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = run(), run()
    next(one.steps())
    one.save("state.safetensors")
    two.restore("state.safetensors")
    assert two.step == 1


def test_weights_that_grew_out_of_range_are_named_instead_of_the_images():
    one = run(lr=1e30)
    with pytest.raises(BadInput, match="a smaller lr may help") as caught:
        list(one.steps())
    assert "step 0" not in str(caught.value)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole = run()
    list(whole.steps())
    first = run()
    for _ in range(5):
        next(first.steps())
    first.save(tmp_path / "state.safetensors")
    second = run()
    second.restore(tmp_path / "state.safetensors")
    assert second.step == 5
    list(second.steps())
    assert second.losses == whole.losses
    for a, b in zip(whole.learner.state_dict().values(), second.learner.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_another_recipe_learner_or_file_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    one = run()
    next(one.steps())
    one.save(path)
    with pytest.raises(BadInput, match="the stopped run has steps 12, now 13"):
        run(steps=13).restore(path)
    other = run()
    other.learner.head = nn.Conv2d(4, 2, 1)
    with pytest.raises(BadInput, match="another learner"):
        other.restore(path)
    with pytest.raises(BadInput, match="no state to go on from"):
        run().restore(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadInput, match="no state to go on from"):
        run().restore(path)


def test_a_pass_takes_every_image_once():
    numbers = torch.cat([run().numbers(step) for step in range(5)])
    assert numbers[:10].sort().values.tolist() == numbers[10:].sort().values.tolist() == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist()


def test_a_batch_is_never_larger_than_the_set():
    assert run(batch=64).numbers(3).sort().values.tolist() == list(range(10))


def test_rates_rise_and_fall():
    recipe = Recipe(steps=100, warmup=0.1, lr=1.0, final=0.01)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[100] == pytest.approx(0.01)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_crops_keep_shape_and_whole_images_stay():
    images = torch.rand(6, 3, 8, 12, generator=generator(1))
    assert crops(images, generator(0), 1.0, False) is images
    flipped = crops(images, generator(0), 1.0, True)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(images, flipped, strict=True)]
    turned = [torch.allclose(a.flip(2), b, atol=1e-5) for a, b in zip(images, flipped, strict=True)]
    assert any(same) and any(turned) and all(a or b for a, b in zip(same, turned, strict=True))
    constant = torch.full((5, 1, 8, 8), 0.3)
    assert torch.allclose(crops(constant, generator(0), 0.3, True), constant, atol=1e-6)


def test_bad_settings_and_a_loss_that_breaks_down():
    for bad in ({"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"crop": 0.0}, {"warmup": 1.0}):
        with pytest.raises(BadInput):
            Recipe(**bad)
    with pytest.raises(BadInput, match="no image"):
        Pretrain(Filling(), 0, lambda at: IMAGES[at], Recipe())
    broken = run()
    with torch.no_grad():
        broken.learner.head.bias.fill_(float("inf"))
    with pytest.raises(BadInput, match=r"step 0|NaN|inf"):
        next(broken.steps())


def test_the_probe_tells_what_a_line_can_and_only_that():
    x = torch.randn(400, 5, generator=generator(2))
    y = (x[:, 0] * 100 + 3 > 0).long()
    assert linear_probe((x[:300], y[:300]), (x[300:], y[300:])) > 0.95
    ring = (x[:, :2].square().sum(1) > 1.4).long()
    assert linear_probe((x[:300], ring[:300]), (x[300:], ring[300:])) < 0.75
    with pytest.raises(BadInput, match="two classes"):
        linear_probe((x, torch.zeros(400, dtype=torch.long)), (x, y))
    with pytest.raises(BadInput, match="finite"):
        linear_probe((x * float("nan"), y), (x, y))
