"""Gradient dropout regularity: a task gradient passes where the gradient of the old knowledge agrees with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2 per entry, in [0, 1]: 1 where the signs agree or b is 0.

    a, b: gradients of one shape. Two zeros give 1/2. Differs: the code adds 1e-8 to the denominator, which lets a
    gradient of 1e-8 (usual for a weight times its gradient) fall by chance though nothing speaks against it, and
    makes P depend on the scale of the loss. arXiv 2307.15049 (GDR); the form is GradDrop's, arXiv 2010.06808.
    """
    size = a.abs() + b.abs()
    # Two zeros: 0 / 1 instead of 0 / 0.
    return 0.5 * (1 + a.sign() * (a + b) / torch.where(size == 0, 1.0, size))


def gradient_dropout(a: Tensor, b: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """g = ((1 - lam) + lam 1[P > U]) a with P = `agreement(a, b)` and U uniform on [0, 1) per entry.

    a: the gradient that is used, b: the one that is only listened to, of one shape. lam in [0, 1]: how much of a
    dropped entry's gradient is taken away; 0 gives `a`. U comes from `generator` (CPU): give a fresh one each step.
    Raises BadInput for shapes that differ, lam outside [0, 1], or a gradient that is not finite.
    """
    if a.shape != b.shape:
        raise BadInput(f"gradient dropout: the gradients have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not 0 <= lam <= 1:
        raise BadInput(f"gradient dropout: lam lies in 0..1, got {lam}")
    for what, gradient in (("task", a), ("old knowledge's", b)):
        if not bool(torch.isfinite(gradient).all()):
            raise BadInput(f"gradient dropout: the {what} gradient of shape {tuple(a.shape)} is NaN or infinite")
    uniform = torch.rand(a.shape, generator=generator).to(a.device)
    return torch.where(agreement(a, b) > uniform, a, (1 - lam) * a)


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean cross-entropy of softmax(teacher / T) and log softmax(logits / T): the KL up to a constant.

    logits, teacher: (..., classes). At T = 1, the paper's value. T^2 scales this gradient, and so P: leave it at 1
    unless that is meant. No gradient goes to `teacher`.
    """
    soft = (teacher.detach() / temperature).softmax(-1)
    return -(temperature**2) * (soft * F.log_softmax(logits / temperature, -1)).sum(-1).mean()
