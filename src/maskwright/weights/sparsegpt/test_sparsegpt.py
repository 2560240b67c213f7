"""The sheet's exact checks of SparseGPT."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.pattern import NM, Unstructured
from maskwright.core.score import magnitude
from maskwright.core.select import generator, select
from maskwright.weights.hessian import inverse_factor
from maskwright.weights.sites import maskable
from maskwright.weights.sparsegpt import SparseGpt


def site(weight, gram, pattern):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return replace(maskable(layer)["weight"], stats={"gram": gram}, pattern=pattern)


def test_two_columns_by_hand():
    gram = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    upper, _, _ = inverse_factor(gram, 1e-13)
    assert torch.allclose(upper, torch.tensor([[1.25, -0.75], [0.0, 1.0]], dtype=torch.float64), atol=1e-6)
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    got = SparseGpt(damping=1e-13).solve(site(weight, gram, Unstructured()), torch.tensor([1]))
    assert got.mask.keep.tolist() == [[False, True]]
    assert torch.allclose(got.value, torch.tensor([[0.0, 2.6]], dtype=torch.float64), atol=1e-6)


def test_diagonal_hessian_is_magnitude_and_changes_no_kept_weight():
    weight = torch.randn(12, 32, generator=generator(0))
    here = site(weight, torch.eye(32), Unstructured())
    got = SparseGpt().solve(here, torch.tensor([192]))
    assert got.mask.equal(select(magnitude(here), Unstructured(), 192))
    assert torch.equal(got.value[got.mask.keep], weight[got.mask.keep])


def test_a_dropped_column_is_made_up_for_by_least_squares():
    x = torch.randn(200, 6, generator=generator(1), dtype=torch.float64)
    weight = torch.tensor([[1e-3, 1.0, -2.0, 3.0, 1.5, -1.0]], dtype=torch.float64)
    got = SparseGpt(damping=1e-13).solve(site(weight, x.T @ x, Unstructured()), torch.tensor([5]))
    assert got.mask.keep[0].tolist() == [False] + [True] * 5
    best = torch.linalg.lstsq(x[:, 1:], x @ weight[0]).solution
    assert torch.allclose(got.value[0, 1:], best, atol=1e-8)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Unstructured((0,)), Unstructured()], ids=str)
def test_counts_are_exact_and_density_one_is_untouched(pattern):
    x = torch.randn(400, 40, generator=generator(2))
    weight = torch.randn(10, 40, generator=generator(3))
    here = site(weight, x.T @ x, pattern)
    groups, units = pattern.grid((10, 40))
    count = pattern.fixed if pattern.fixed is not None else 13 * (units // 40)
    got = SparseGpt(block=16).solve(here, torch.full((groups,), count))
    got.mask.check()
    assert set(pattern.fold(got.mask.keep).sum(1).tolist()) == {count}
    if pattern.fixed is None:
        full = SparseGpt().solve(here, torch.full((groups,), units))
        assert torch.equal(full.value, weight)


def test_the_factor_is_the_same_for_every_number_of_threads():
    x = torch.randn(512, 576, generator=generator(5), dtype=torch.float64)
    gram, threads, factors = x.T @ x, torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            factors.append(inverse_factor(gram, 0.01)[0])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*factors)


def test_a_singular_hessian_is_damped_loudly_or_refused():
    assert inverse_factor(torch.zeros(3, 3), 0.01)[1].all()
    with pytest.raises(BadInput, match="singular"):
        inverse_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01 / 1000)
