"""Logs that make a run again, and what cannot be: losses, settings, closures, models and logs that are refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates.sparse_mezo import Log, SparseMezo
from maskwright.updates.sparse_mezo.test_sparse_mezo import BATCH, bits, loss_of, net, weights


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind,refresh", [("small", "step"), ("random", "step"), ("large", "start"), ("dense", "start")])
def test_replay_is_bit_exact(tmp_path, kind, refresh, n, snapshot):
    settings_ = {"mask": kind, "refresh": refresh, "n": n, "snapshot": snapshot, "weight_decay": 0.01}
    model, rates = net(), (1e-2, 3e-3, 0.0, 0.05)
    method = SparseMezo(density=0.4, where=("*.weight",), **settings_)
    calls = 0

    def closure(bad=None, error=None):
        def run_it():
            nonlocal calls
            calls += 1
            if error is not None and calls == error:
                raise RuntimeError("a batch that cannot be read")
            return float("nan") if calls == bad else loss_of(model)()

        return run_it

    with method.attach(model, seed=7) as run:
        for rate in rates:
            run.step(closure(), lr=rate)
        assert run.step(closure(bad=calls + 2), lr=1.0).skipped
        for which in (1, 2, 2 * n):
            with pytest.raises(RuntimeError, match="cannot be read"):
                run.step(closure(error=calls + which))
        run.step(closure(), lr=1e-2)
        run.log.save(tmp_path / "log.json")
    fresh = net()
    log = Log.load(tmp_path / "log.json")
    assert len(log) == 9 and log.rows == run.log.rows and log.made_by["settings"]["where"] == ["*.weight"]
    log.replay(fresh)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    with pytest.raises(BadInput, match="not those the log began with"):
        log.replay(fresh)


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_loss_that_is_not_finite_is_skipped_and_restored(snapshot, bad):
    model, calls = net(), []
    before = weights(model)

    def closure():
        calls.append(1)
        return torch.tensor(float("inf") if len(calls) == bad else 1.0)

    with SparseMezo(snapshot=snapshot, lr=1.0, weight_decay=0.5).attach(model) as run:
        step = run.step(closure)
    assert step.skipped and run.log.rows[0].gradients is None and len(calls) == 2
    for name, value in model.named_parameters():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-6)
        assert not snapshot or torch.equal(value, before[name])


def test_half_precision_warns_and_trains_in_its_own_dtype():
    model = net().to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"bfloat16.*last bit"), SparseMezo(eps=0.1, lr=0.1).attach(model) as run:
        run.step(lambda: (model(BATCH.bfloat16()) - BATCH).square().mean())
    assert model[0].weight.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SparseMezo().attach(net().double()):
            pass


@pytest.mark.parametrize(
    "bad",
    [
        {"eps": 0.0}, {"eps": -1.0}, {"eps": float("nan")}, {"density": 0.0}, {"density": 1.01}, {"lr": -1.0},
        {"lr": float("inf")}, {"weight_decay": -0.1}, {"n": 0}, {"mask": "smallest"}, {"refresh": "never"},
        {"vectors": "all"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(bad):
    with pytest.raises(BadInput, match=r"^sparse_mezo[^\n]*$"):
        SparseMezo(**bad)


def test_closures_that_cannot_be_leave_the_weights_as_they_were():
    model = net()
    before = weights(model)

    def changes():
        with torch.no_grad():
            model[0].weight[0, 0] += 0.0
        return 0.0

    with SparseMezo(snapshot=True).attach(model) as run:
        for closure, word in (
            (lambda: model(BATCH), r"one number.*\(16, 12\)"), (lambda: torch.zeros(2), r"one number.*\(2,\)"),
            (lambda: None, "one number.*NoneType"), (lambda: torch.zeros((), dtype=torch.complex64), "one number"),
            (changes, r"0\.weight: the closure changed"),
        ):  # fmt: skip
            with pytest.raises(BadInput, match=word):
                run.step(closure)
        with pytest.raises(BadInput, match="lr is at least 0"):
            run.step(lambda: 0.0, lr=-1.0)
        assert run.step(lambda: np.float32(1.0)).loss == 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_models_that_cannot_be():
    def refused(model, word, **settings):
        with pytest.raises(BadInput, match=word), SparseMezo(**settings).attach(model):
            pass

    frozen = net().requires_grad_(False)
    refused(frozen, "Sequential: nothing to train")
    refused(frozen, "where '0': nothing to train", where=("0",))
    refused(net(), "where 'nothing' matches no parameter; names look like 0.weight", where=("nothing",))
    refused(nn.Linear(2, 2, bias=False), "nothing to train at density 0.01", density=0.01)  # every count rounds to 0
    whole_numbers = net()
    whole_numbers.codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with SparseMezo().attach(whole_numbers) as run:
        assert "codes" not in run.masks()
    refused(whole_numbers, r"codes: torch.int8 of shape \(3, 3\) is no floating dtype", where=("codes",))
    complex_ = nn.Module()
    complex_.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    refused(complex_, "weight: torch.complex64")
    broken = net()
    with torch.no_grad():
        broken[4].weight[1, 1] = float("nan")
    refused(broken, r"4.weight: the weight of shape \(12, 20\) holds NaN")
    refused(nn.Linear(3, 3, device="meta"), "weight: .* no data")
    turned = nn.Linear(3, 4)
    turned.weight = nn.Parameter(torch.randn(3, 4).t())
    refused(turned, r"weight: the weight of shape \(4, 3\) is not contiguous")


def test_logs_that_cannot_be(tmp_path):
    model, path = net(), tmp_path / "log.json"
    with SparseMezo().attach(model) as run:
        run.step(loss_of(model))
    run.log.save(path)
    told = json.loads(path.read_text())
    for change in (
        {"format": "other"}, {"version": 2}, {"rows": [[[1], [float("nan")], 0.1]]}, {"rows": [[[1], [1.0, 2.0], 0.1]]},
        {"rows": [[[1], [1.0]]]}, {"made_by": {}}, {"rows": 3},
    ):  # fmt: skip
        path.write_text(json.dumps({**told, **change}))
        with pytest.raises(BadInput, match=r"log\.json"):
            Log.load(path)
    path.write_text("{")
    with pytest.raises(BadInput, match=r"log\.json: no log"):
        Log.load(path)
    with pytest.raises(BadInput, match="no log"):
        Log.load(tmp_path / "none.json")
    path.write_text(json.dumps({**told, "made_by": {"seed": 0, "settings": {"where": [], "density": 3}}}))
    with pytest.raises(BadInput, match="settings are not those"):
        Log.load(path).replay(net())
