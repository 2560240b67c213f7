"""l1 coding: on orthonormal columns the code is the soft threshold of the correlations, and refit takes its bias off."""

import torch

from maskwright.inputs import Coder, refit
from maskwright.inputs.l1_coding import L1Coding


def test_by_hand_on_orthonormal_columns():
    coder = Coder(torch.eye(3), L1Coding(lam=0.5, atoms=3, iterations=1, ridge=None))
    x = torch.tensor([[2.0, -0.4, -1.5], [0.5, 0.6, 0.0]])
    code = coder.encode(x)
    assert torch.allclose(code.value, torch.tensor([[1.5, 0.0, -1.0], [0.0, 0.1, 0.0]]))
    assert code.mask.keep.tolist() == [[True, False, True], [False, True, False]]
    unbiased = refit(coder.dictionary, coder.prepared(x), code.mask)
    assert torch.allclose(unbiased, torch.tensor([[2.0, 0.0, -1.5], [0.0, 0.6, 0.0]]))
    assert torch.equal(L1Coding(lam=0.5).keep(x).keep, code.mask.keep)


def test_the_code_does_not_depend_on_the_start():
    from maskwright.inputs import L1, infer

    rng = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64)).Q[:, :5] + 0.1
    x, start = (torch.randn(6, n, generator=rng, dtype=torch.float64) for n in (8, 5))
    one, other = infer(columns, x, L1(0.2), 2000), infer(columns, x, L1(0.2), 2000, start=3 * start)
    assert torch.allclose(one, other, atol=1e-9) and not torch.allclose(infer(columns, x, L1(0.2), 2), one, atol=1e-3)
