import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.almguard import AlmGuard
from maskwright.inputs.almguard.guard import Guard
from maskwright.inputs.almguard.method import bin_gradients

T = torch.tensor
QUICK = AlmGuard(bins=2, steps=5, epochs=2, rate=0.1)


def clips(n=3, bins=4, frames=6):
    return [torch.randn(1, bins, frames, generator=generator(i)) for i in range(n)]


def linear(weights):
    return lambda x, number: (x * T(weights)[None, :, None]).sum()


def far(x, number):
    return (x - 3).square().mean()


def test_worked_example():
    method = AlmGuard(bins=2)
    score = method.score(T([4.0, 1, 3, 2]), T([4, 0.1, 1, 2]))
    assert torch.allclose(score, T([1.0, 10, 3, 1]).double(), rtol=1e-4)
    assert method.keep(score[None]).keep.tolist() == [[False, True, True, False]]


def test_exactly_k_bins_and_ties_to_the_lower_one():
    for k in range(1, 9):
        mask = AlmGuard(bins=k).keep(torch.ones(2, 8))
        assert mask.keep.tolist() == [[b < k for b in range(8)]] * 2
    with pytest.raises(BadInput, match="at least 1"):
        AlmGuard(bins=0)
    with pytest.raises(BadInput, match="keeps 9 bins"):
        AlmGuard(bins=9).keep(torch.ones(1, 8))


def test_a_bin_that_recognition_never_uses_is_first_and_one_that_nobody_uses_is_0():
    score = AlmGuard().score(T([0.5, 100.0, 0.0]), T([0.0, 1.0, 0.0]))
    assert score[0] == pytest.approx(0.5 / 1e-6) and score[2] == 0 and int(score.argmax()) == 0


def test_scaling_the_losses_keeps_the_ranking():
    on, off = torch.rand(2, 16, generator=generator(1)) + 0.1
    for a, b in ((1e3, 1), (1, 1e3), (7, 50)):
        assert torch.equal(AlmGuard().score(a * on, b * off).argsort(), AlmGuard().score(on, off).argsort())


def test_gradients_by_hand_and_duplicated_frames():
    x = T([[[1.0, -2.0], [3.0, 0.0]]]).requires_grad_()
    assert bin_gradients(x.square().sum(), x).tolist() == [3, 3]  # means of |2|, |-4| and of |6|, |0|
    twice = x.detach().repeat_interleave(2, dim=2).requires_grad_()
    assert bin_gradients(twice.square().sum(), twice).tolist() == [3, 3]
    # A mean over time halves every cell's gradient when frames are doubled: g halves, for both losses, the ratio stays.
    one, two = (bin_gradients(v.square().mean(2).sum(), v) for v in (x, twice))
    assert torch.equal(one, 2 * two)


def test_delta_is_0_outside_the_mask_at_every_step_and_never_above_tau():
    seen = []

    def loss(x, number):
        seen.append(x.detach().clone())
        return far(x, number)

    zero = [torch.zeros(1, 4, 6)] * 2
    mask = Mask(T([[False, True, False, True]]))
    delta, log = QUICK.train(loss, zero, mask)
    seen.append(delta)
    assert all(d[:, [0, 2]].eq(0).all() and d.abs().max() <= 0.5 for d in seen)
    assert seen[0][:, [1, 3]].ne(0).all() and delta[:, [1, 3]].eq(0.5).all()
    assert [(v.epoch, v.clip, v.steps) for v in log] == [(0, 0, 5), (0, 1, 5), (1, 0, 5), (1, 1, 5)]


def test_first_step_of_each_clip_is_a_fresh_adam_step():
    method = AlmGuard(bins=4, steps=1, epochs=1, rate=0.01, start=0.0)
    delta, _ = method.train(linear([2.0, -0.5, 1.0, 0.0]), clips(2), Mask(torch.ones(1, 4, dtype=torch.bool)))
    assert torch.allclose(delta[0, :, 0], T([-0.02, 0.02, -0.02, 0.0]), atol=1e-6)  # rate * sign, once a clip


def test_a_clip_below_the_stop_takes_no_step():
    method = AlmGuard(bins=4, steps=9, epochs=1, start=0.0)
    delta, log = method.train(lambda x, n: 0.05 + 0 * x.sum(), clips(1), Mask(torch.ones(1, 4, dtype=torch.bool)))
    assert delta.eq(0).all() and log[0].steps == 0 and log[0].loss == pytest.approx(0.05)


def test_all_bins_equal_unmasked_training():
    method = AlmGuard(bins=4, steps=5, epochs=2, rate=0.1)
    made = method.guard(far, linear([1.0, 2, 3, 4]), clips(), seed=3)
    assert made.mask.keep.all()
    delta = torch.randn(1, 4, 6, generator=generator(3, "almguard")) * 0.01
    for _ in range(2):
        for clip in clips():
            delta = delta.detach().requires_grad_()
            adam = torch.optim.Adam([delta], lr=0.1)
            for _ in range(5):
                adam.zero_grad()
                far(clip + delta, 0).backward()
                adam.step()
                delta.data.clamp_(-0.5, 0.5)
    assert torch.equal(made.delta, delta.detach())


def test_the_model_is_unchanged_and_gets_no_gradient():
    net = nn.Linear(6, 1)
    before = net.weight.detach().clone()
    QUICK.guard(lambda x, n: net(x).square().mean() + 1, linear([1.0, 2, 3, 4]), clips())
    assert torch.equal(net.weight, before) and net.weight.grad is None and net.bias.grad is None


def test_clips_without_a_transcript_are_skipped_and_counted():
    use = linear([1.0, 2, 3, 4])
    on, off, skipped = QUICK.measure(far, lambda x, n: None if n == 1 else use(x, n), clips())
    assert skipped == 1 and off.tolist() == [1, 2, 3, 4]
    assert torch.equal(on, QUICK.measure(far, use, clips()[::2])[0])
    with pytest.raises(BadInput, match="none of 3 clips"):
        QUICK.measure(far, lambda x, n: None, clips())


def test_files_may_be_named_by_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = QUICK.guard(far, linear([1.0, 2, 3, 4]), clips())
    made.save("guard.safetensors")
    assert torch.equal(Guard.load("guard.safetensors").delta, made.delta)


def test_saved_and_loaded_applied_to_other_lengths(tmp_path):
    made = QUICK.guard(far, linear([1.0, 2, 3, 4]), clips())
    made.save(tmp_path / "g.safetensors")
    again = Guard.load(tmp_path / "g.safetensors")
    for name in ("safety", "utility", "delta"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert again.mask.equal(made.mask) and again.made_by == made.made_by and again.skipped == 0
    short, long = again.apply(torch.zeros(2, 4, 3)), again.apply(torch.zeros(1, 4, 8))
    assert torch.equal(short, made.delta[:, :, :3].expand(2, 4, 3))
    assert torch.equal(long, torch.cat([made.delta, made.delta[:, :, :2]], 2))
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(BadInput, match="not a saved guard"):
        Guard.load(tmp_path / "bad")
    with pytest.raises(BadInput, match="5 bins, expected 4"):
        again.apply(torch.zeros(1, 5, 6))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: QUICK.guard(far, linear([1.0, 2, 3, 4]), []), "at least one clip"),
        (lambda: QUICK.measure(lambda x, n: x.sum() * torch.nan, far, clips()), "finite number"),
        (lambda: QUICK.measure(lambda x, n: (0 * x).sqrt().sum(), far, clips()), "not finite"),
        (lambda: QUICK.measure(lambda x, n: T(1.0), far, clips()), "does not depend"),
        (lambda: QUICK.measure(lambda x, n: 0.5, far, clips()), "one finite number, got a float"),
        (lambda: QUICK.measure(far, lambda x, n: 0.5, clips()), "one finite number, got a float"),
        (lambda: QUICK.measure(far, far, [clips()[0].numpy()]), "got a ndarray"),
        (lambda: QUICK.measure(far, far, [*clips(1), *clips(1, bins=5)]), "5 bins, expected 4"),
        (lambda: QUICK.train(far, clips(), Mask(torch.ones(1, 3, dtype=torch.bool))), "mask"),
        (lambda: QUICK.measure(far, far, [torch.full((1, 4, 6), torch.nan)]), "not finite"),
        (lambda: QUICK.score(T([1.0, -1.0]), T([1.0, 1.0])), "at least 0"),
        (lambda: QUICK.score(T([1.0]), T([1.0, 1.0])), "one shape"),
        (lambda: QUICK.keep(T([[1.0, torch.nan, 2.0]])), "NaN"),
    ],
)
def test_refusals(call, told):
    with pytest.raises(BadInput, match=told):
        call()
