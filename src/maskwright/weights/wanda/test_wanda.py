from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from maskwright.core.pattern import Unstructured
from maskwright.weights import sites
from maskwright.weights.magnitude import Magnitude
from maskwright.weights.sites import WeightSite
from maskwright.weights.wanda import Wanda

G = torch.Generator().manual_seed(0)
WEIGHT, X = torch.randn(6, 8, generator=G), torch.randn(40, 8, generator=G) * torch.arange(1, 9)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def site(weight: Tensor, norm: Tensor) -> WeightSite:
    return replace(sites(linear(weight))["weight"], stats={"input_norm": norm}, pattern=Unstructured((0,)))


def keep(weight: Tensor, x: Tensor, **settings: object) -> Tensor:
    return Wanda(**settings).masks(linear(weight), [x])["weight"].keep  # type: ignore[arg-type]


@pytest.mark.parametrize("dropped", [0.0, 0.25, 0.5, 0.75])
def test_every_row_drops_the_same_exact_count(dropped: float) -> None:
    assert (keep(WEIGHT, X, density=1 - dropped).sum(1) == 8 - int(dropped * 8)).all()


def test_n_to_m_keeps_n_in_every_group() -> None:
    assert (keep(WEIGHT, X, pattern="1:4").reshape(-1, 4).sum(1) == 1).all()


def test_the_score_is_weight_times_norm() -> None:
    norm = X.square().sum(0).sqrt()
    assert torch.equal(Wanda().score(site(WEIGHT, norm)), WEIGHT.abs() * norm)
    kept = keep(WEIGHT, X)
    best = (WEIGHT.abs() * norm).argsort(dim=1, descending=True)[:, :4]
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(1, best, True))


def test_equal_norms_are_magnitude_per_row() -> None:
    signs = torch.where(torch.rand(40, 8, generator=G) < 0.5, -1.0, 1.0)  # every column has the same norm
    plain = Magnitude().masks(linear(WEIGHT))["weight"].keep
    assert torch.equal(keep(WEIGHT, signs), plain) and not torch.equal(keep(WEIGHT, X), plain)


def test_scales_that_do_not_matter() -> None:
    assert torch.equal(keep(WEIGHT, 8 * X), keep(WEIGHT, X))
    norm = X.square().sum(0).sqrt()
    scale = 2.0 ** torch.arange(8)
    score = Wanda().score
    assert torch.equal(score(site(WEIGHT / scale, norm * scale)), score(site(WEIGHT, norm)))


def test_ties_fall_to_the_lower_column() -> None:
    tied = site(torch.tensor([[1.0, -2.0, 0.5, 0.1]]), torch.tensor([1.0, 0.2, 3.0, 10.0]))  # scores 1, 0.4, 1.5, 1
    # Differs: the reference removes the lower column of a tie (0 and 1 here), maskwright keeps it.
    assert Wanda().solve(tied, torch.tensor([2])).mask.keep.tolist() == [[True, False, True, False]]
