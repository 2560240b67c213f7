"""MID's exact checks, on networks whose answer is known."""

import pytest
import torch
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
    with pytest.raises(BadInput, match="at least 1 mask"):
        begun().denoise(clean, masks=0)
    with pytest.raises(BadInput, match="rng"):
        Mid().keep(torch.zeros(1, 4, 4))
