from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import NM
from maskwright.weights import sites, training
from maskwright.weights.sr_ste import SrSte
from maskwright.weights.sr_ste.method import sad

DRAWN = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def keep(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    return SrSte(n=n, m=m).start(sites(linear(weight)))["weight"].keep


def gradient(weight: Tensor, decay: float, upstream: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The gradient the optimiser sees: one SGD step of rate 1 moves the weight by exactly that."""
    layer = linear(weight)
    with training(layer, torch.optim.SGD(layer.parameters(), lr=1.0), SrSte(n=n, m=m, decay=decay)) as run:
        (layer.weight * upstream).sum().backward()
        run.before_step(torch.optim.SGD(layer.parameters(), lr=1.0))
        grad = layer.parametrizations.weight.original.grad
        assert grad is not None
        return grad.clone()


@pytest.mark.parametrize("n,m", [(1, 4), (2, 4), (3, 8), (8, 8)])
@pytest.mark.parametrize("weight", [DRAWN, torch.full((6, 8), -0.5), torch.zeros(6, 8)], ids=["drawn", "equal", "zero"])
def test_every_group_keeps_exactly_n(weight: Tensor, n: int, m: int) -> None:
    kept = keep(weight, n, m)
    assert (kept.reshape(-1, m).sum(1) == n).all() and int(kept.sum()) == n * weight.numel() // m


def test_n_equal_to_m_trains_bit_for_bit_as_dense() -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    dense, masked = linear(DRAWN), linear(DRAWN)

    def fit(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(6):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()

    fit(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2))
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    with training(masked, optimizer, SrSte(n=4, m=4, decay=0.5)):
        fit(masked, optimizer)
    assert torch.equal(dense.weight, masked.weight)


def test_without_decay_the_gradient_passes_straight_through() -> None:
    upstream = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(gradient(DRAWN, 0.0, upstream), upstream)
    assert (upstream[~keep(DRAWN)] != 0).all()


def test_the_tiny_numbers_of_the_paper_sheet() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.3, 0.2]])
    assert keep(weight).tolist() == [[True, False, True, False]]
    assert torch.allclose(gradient(weight, 0.1, torch.ones(1, 4)), torch.tensor([[1.0, 0.99, 1.0, 1.02]]))


def test_one_of_four_on_eight_numbers() -> None:
    weight = torch.tensor([[0.1, -0.9, 0.3, 0.9, 0.0, 0.2, -0.3, 0.1]])
    assert keep(weight, 1, 4).nonzero()[:, 1].tolist() == [1, 6]  # a tie: the lower index stays


def test_the_gradient_of_kept_weights_does_not_depend_on_decay() -> None:
    upstream, kept = torch.ones(6, 8), keep(DRAWN)
    weak, strong = gradient(DRAWN, 1e-4, upstream), gradient(DRAWN, 0.5, upstream)
    assert torch.equal(weak[kept], strong[kept]) and not torch.equal(weak, strong)
    assert torch.allclose(strong[~kept], 1 + 0.5 * DRAWN[~kept])


def test_the_mask_ignores_scale_and_signs_and_moves_with_its_group() -> None:
    kept = keep(DRAWN)
    assert torch.equal(keep(DRAWN * 4), kept) and torch.equal(keep(-DRAWN), kept)
    assert torch.equal(keep(DRAWN * torch.tensor([1.0, -1.0]).repeat(4)), kept)
    swapped = DRAWN.reshape(6, 2, 4).flip(1).reshape(6, 8)
    assert torch.equal(keep(swapped), kept.reshape(6, 2, 4).flip(1).reshape(6, 8))


def test_sad() -> None:
    def one(*kept: int) -> MaskSet:
        return MaskSet({"w": Mask(torch.tensor([kept], dtype=torch.bool), NM(2, 4))})

    a, b, c = one(1, 0, 1, 0), one(1, 1, 0, 0), one(0, 1, 0, 1)
    assert sad(a, b) == sad(b, a) == 2 and sad(a, a) == 0 and sad(a, c) == 4 <= sad(a, b) + sad(b, c)


def test_conv_groups_run_along_the_input_channels() -> None:
    conv = nn.Conv2d(8, 3, 3)
    found = SrSte().start(sites(conv))["weight"].keep
    rows = conv.weight.detach().movedim(1, -1)  # (out, kh, kw, in)
    assert torch.equal(found, keep(rows.reshape(-1, 8)).reshape(rows.shape).movedim(-1, 1))
    one = nn.Conv2d(8, 3, 1)
    assert torch.equal(SrSte().start(sites(one))["weight"].keep.flatten(1), keep(one.weight.detach().flatten(1)))


@pytest.mark.parametrize("n,m", [(1, 4), (2, 4), (3, 8)])
def test_the_masked_weight_is_the_nearest_point_of_the_pattern(n: int, m: int) -> None:
    weight = torch.randn(5, m, generator=torch.Generator().manual_seed(m))
    away = (weight * ~keep(weight, n, m)).square().sum(1)
    for row, chosen in zip(weight, away, strict=True):
        others = [row.square().sum() - row[list(kept)].square().sum() for kept in combinations(range(m), n)]
        assert torch.isclose(chosen, min(others), atol=1e-6)


def test_the_mask_follows_the_weights_every_kth_step() -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    layer = linear(DRAWN)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    with training(layer, optimizer, SrSte(update_every=3)) as run:
        for _ in range(6):
            optimizer.zero_grad()
            (layer(x) - x[:, :6]).square().mean().backward()
            optimizer.step()
        assert torch.equal(run.masks["weight"].keep, keep(layer.parametrizations.weight.original.detach()))
    assert [bool(moved) for moved in run.moved] == [False, False, True, False, False, True]


@pytest.mark.parametrize("bad", [{"decay": float("nan")}, {"n": 0}, {"n": 5}, {"update_every": 0}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        SrSte(**bad)  # type: ignore[arg-type]


def test_a_ragged_size_names_the_layer() -> None:
    with pytest.raises(BadInput, match=r"weight: 2:4 .* not divisible"):
        SrSte().start(sites(nn.Linear(6, 2)))
