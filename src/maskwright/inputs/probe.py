"""A linear probe: how well frozen features tell classes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, penalty: float = 1e-3, iterations: int = 100
) -> float:
    """Accuracy on `test` of logistic regression fitted to `train`; each is (features (n, d), classes (n,)).

    Features are centred and scaled by the training part's mean and deviation. The fit is convex and starts from 0, so it
    is the same each time: L-BFGS with `penalty` times half the weights' squares. Raises BadInput for empty parts, features
    that are not finite, or a training part of one class.
    """
    (x, y), (held, truth) = train, test
    if not len(y) or not len(truth) or not bool(x.isfinite().all() and held.isfinite().all()):
        raise BadInput(f"a probe needs finite features and rows on both sides, got {tuple(x.shape)} and {tuple(held.shape)}")
    classes = int(torch.cat([y, truth]).max()) + 1
    if len(y.unique()) < 2:
        raise BadInput("a probe needs at least two classes to tell apart")
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    x, held = ((part - mean) / scale for part in (x, held))
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        fit.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        fit.step(closure)  # type: ignore[no-untyped-call]
    return float(((held @ weight.detach() + bias.detach()).argmax(1) == truth).float().mean())
