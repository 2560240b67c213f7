"""MID's exact checks, on networks whose answer is known."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.mid import Mid
from maskwright.inputs.mid.rounds import lag1

TINY = {"steps": 2, "batch": 4, "patch": 8, "rounds": 2, "masks": 3}


class Known(nn.Module):
    """Answers what it is told, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.free = answer, nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return self.answer(z)


def conv(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, outputs, 3, padding=1)
    )


def images(name, n=5, channels=2):
    return torch.rand(n, channels, 12, 12, generator=generator(0, name))


def begun(build=conv, seed=0, **settings):
    return Mid(**{**TINY, **settings}).start(images("clean"), images("noisy"), build, seed=seed)


def test_density_1_shows_the_image_bit_for_bit_and_k_masks_agree():
    run, y = begun(density=1.0), images("y")
    assert run.show(y, generator(1))[:, :2].equal(y)
    assert run.once(y, 0, 0).equal(run.once(y, 0, 1)) and run.once(y, 0, 0).equal(run.once(y, 5, 2))


def test_mask_is_shared_by_channels_fresh_for_each_sample_with_the_stated_mean():
    method, big = Mid(density=0.25), torch.zeros(4, 100, 100)
    keep = method.keep(big, rng=generator(3)).keep
    assert abs(keep.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / keep.numel()) ** 0.5
    assert not keep[0].equal(keep[1]) and keep.equal(method.keep(big, rng=generator(3)).keep)
    seen = begun(density=0.25).show(images("y") + 1, generator(0))
    assert (seen[:, 0] != 0).equal(seen[:, 1] != 0) and (seen[:, 0] != 0).equal(seen[:, 2] == 1)


def test_hidden_values_do_not_reach_the_output():
    run, y = begun(), images("y")
    keep = run.show(y, generator(7, "mid mask 0"))[:, 2:] == 1
    spoiled = torch.where(keep, y, torch.tensor(float("nan")))
    out = run.once(spoiled, 7, 0)
    assert bool(out.isfinite().all()) and out.equal(run.once(y, 7, 0))
    with pytest.raises(BadInput, match="NaN"):
        run.once(torch.where(keep, torch.tensor(float("nan")), y), 7, 0)


def test_bank_and_pseudo_clean_add_up_and_the_bank_is_detached():
    run = begun()
    run.round()
    assert not run.bank.requires_grad and run.bank.grad_fn is None
    clean = run.denoise(run.noisy, seed=run.seed)
    assert run.bank.equal(run.noisy - clean)
    torch.testing.assert_close(run.bank + clean, run.noisy, rtol=0, atol=1e-6)


def test_average_is_the_mean_of_the_single_predictions():
    run, y = begun(), images("y")
    one, two, three = (run.once(y, 4, at) for at in range(3))
    assert run.denoise(y, masks=3, seed=4).equal((one + two + three) / 3) and not one.equal(two)
    assert run.network.training  # eval mode is for the prediction only


def test_a_perfect_denoiser_returns_the_true_noise_and_a_do_nothing_one_is_refused():
    clean, noise = images("clean"), torch.randn(5, 2, 12, 12, generator=generator(1))
    run = Mid(**TINY).start(clean, clean + noise, lambda i, o: Known(lambda z: clean), seed=0)
    assert torch.allclose(run.renewed(), noise, atol=1e-6)
    idle = begun(lambda i, o: Known(lambda z: z[:, :2]), density=1.0)
    with pytest.raises(BadInput, match="nothing was removed"):
        idle.renewed()


def test_clean_and_noise_indices_are_independent():
    run = begun()
    first, second = run.picks(5000, generator(2))
    table = torch.zeros(5, 5).index_put((first, second), torch.ones(5000), accumulate=True)
    chi = ((table - 200) ** 2 / 200).sum()
    assert chi < 24 + 5 * 48**0.5  # 24 degrees of freedom: mean 24, variance 48


def test_pairs_take_their_noise_from_the_bank_once_there_is_one():
    run = begun()
    run.bank = torch.full((5, 2, 12, 12), 0.125)
    clean, noisy = run.pairs(6, generator(0))
    torch.testing.assert_close(noisy - clean, torch.full_like(clean, 0.125), rtol=0, atol=1e-6)


def test_a_pair_is_a_clean_patch_of_the_first_pick_under_noise_of_the_second():
    marks = torch.arange(5.0)[:, None, None, None].expand(5, 2, 12, 12)
    run = Mid(**TINY).start(marks, marks.flip(0) / 4, conv)
    run.bank = 8 * marks
    first, second = run.picks(40, generator(3))
    clean, noisy = run.pairs(40, generator(3))
    assert clean.equal(first[:, None, None, None].expand(40, 2, 8, 8).float()) and not first.equal(second)
    assert (noisy - clean).equal(8.0 * second[:, None, None, None].expand(40, 2, 8, 8))


def test_a_round_at_density_1_is_plain_adam_on_the_l1_loss():
    def plain(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, outputs, 3, padding=1))

    run = begun(plain, seed=3, density=1.0, steps=4, rate=0.01)
    torch.manual_seed(3)
    net, rng, losses = plain(3, 2), generator(3, "mid round 0"), []
    weights = list(net.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, 5):
        clean, noisy = run.pairs(4, rng)
        run.method.keep(noisy[:, 0], rng=rng)  # all is seen, but the draw moves the generator
        loss = (net(torch.cat([noisy, torch.ones(4, 1, 8, 8)], 1)) - clean).abs().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, g, m, v in zip(weights, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                weight.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    report = run.round()
    for mine, hand in zip(run.network.parameters(), weights, strict=True):
        torch.testing.assert_close(mine, hand, rtol=0, atol=1e-6)
    with torch.no_grad():
        bank = run.noisy - net(torch.cat([run.noisy, torch.ones(5, 1, 12, 12)], 1))
    torch.testing.assert_close(run.bank, bank, rtol=0, atol=1e-5)
    assert report["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_a_saved_run_goes_on_to_the_same_bits(tmp_path):
    run, other = begun(), begun()
    run.round()
    run.save(tmp_path / "mid.safetensors")
    other.load(tmp_path / "mid.safetensors")
    assert other.number == 1 and other.bank.equal(run.bank) and other.reports == run.reports
    assert run.round() == other.round() and run.done and run.bank.equal(other.bank)
    with pytest.raises(BadInput, match="rounds are done"):
        run.round()
    with pytest.raises(BadInput, match="this run others"):
        begun(seed=1).load(tmp_path / "mid.safetensors")


def test_only_the_file_of_this_very_run_is_gone_on_from(tmp_path):
    run, path = begun(), tmp_path / "mid.safetensors"
    run.round()
    run.save(str(path))
    begun().load(str(path))
    method, clean, noisy = Mid(**TINY), images("clean"), images("noisy")
    (tmp_path / "junk").write_bytes(b"junk")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    tests = [
        (begun(), tmp_path / "none", "not a saved run"),
        (begun(), tmp_path / "junk", "not a saved run"),
        (begun(), tmp_path / "other", "not a saved run"),
        (begun(), tmp_path, "not a saved run"),
        (method.start(clean, noisy.flip(0), conv), path, "other clean or noisy images"),
        (method.start(clean + 2**-20, noisy, conv), path, "other clean or noisy images"),
        (begun(lambda i, o: nn.Conv2d(i, o, 3, padding=1)), path, "another network"),
    ]
    for other, file, says in tests:
        with pytest.raises(BadInput, match=says) as caught:
            other.load(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_lag1_by_hand():
    assert lag1(torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]])) == -1.0
    assert lag1(torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]])) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "bad",
    [{"density": 0.0}, {"density": 1.5}, {"rounds": 0}, {"masks": 0}, {"low": 0.0}, {"low": 0.3}, {"rate": -1.0}],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(BadInput):
        Mid(**bad)


def test_images_that_do_not_fit_are_refused():
    clean = images("clean")
    for noisy, word in (
        (images("noisy", channels=1), "channels"),
        (clean * 255, "range"),
        (clean * float("nan"), "NaN"),
        (clean[..., :4], "patch"),
    ):
        with pytest.raises(BadInput, match=word):
            Mid(**TINY).start(clean, noisy, conv)
    with pytest.raises(BadInput, match="got a ndarray"):
        Mid(**TINY).start(clean.numpy(), clean, conv)
    for y, word in (
        (clean[:, :1], "1 channels, not 2"),
        (clean[0], r"got \(2, 12, 12\)"),
        (clean.numpy(), "ndarray"),
        ((clean * 255).byte(), "floats"),
    ):
        with pytest.raises(BadInput, match=word):
            begun().denoise(y)
    with pytest.raises(BadInput, match="at least 1 mask"):
        begun().denoise(clean, masks=0)
    with pytest.raises(BadInput, match="rng"):
        Mid().keep(torch.zeros(1, 4, 4))


def failing(inputs, outputs):
    raise ValueError("no such\nnetwork")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (failing, r"failing\(3, 2\) raises ValueError: no such network"),
        (lambda i, o: "net", r"\(3, 2\) gives a str"),
        (lambda i, o: nn.Conv2d(i, o, 3), r"gives \(4, 2, 6, 6\) for images of shape \(4, 3, 8, 8\), not \(4, 2, 8, 8\)"),
        (lambda i, o: nn.Conv2d(i, 1, 1), r"gives \(4, 1, 8, 8\)"),  # would spread over both channels
        (lambda i, o: nn.Conv2d(i + 1, o, 1), "on images of shape .* raises RuntimeError"),
        (lambda i, o: Known(lambda z: [z]), "gives a list"),
    ],
)
def test_what_a_users_network_raises_or_gives_is_told_in_one_line(build, says):
    with pytest.raises(BadInput, match=says) as caught:
        begun(build).round()
    assert "\n" not in str(caught.value)
    if "failing" not in says and "str" not in says:
        with pytest.raises(BadInput, match="MID: the network"):
            begun(build).denoise(images("y"))
