"""The update of one weight: a kernel over the rows of two small matrices, of which the largest entries are kept."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import final

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import Unstructured
from maskwright.core.select import generator, select
from maskwright.updates.branch import Branch

KERNELS = ("mix", "distance", "lora")


def distance(P: Tensor, Q: Tensor, signs: Tensor) -> Tensor:
    """D_ij = sum over h of signs_h |P_h,i - Q_h,j|: (heads, inputs, r), (heads, outputs, r) -> (inputs, outputs).

    Differences, not the inner-product form: nearby points keep their digits, and equal rows have gradient 0.
    """
    return torch.einsum("h,hio->io", signs, torch.cdist(P, Q, compute_mode="donot_use_mm_for_euclid_dist"))


def gate_abs(K: Tensor, keep: Tensor) -> Tensor:
    """K |K| where kept, |K| without gradient: what the paper's code computes."""
    return K * torch.where(keep, K.detach().abs(), 0)


def gate_binary(K: Tensor, keep: Tensor) -> Tensor:
    """K where kept."""
    return torch.where(keep, K, 0)


def gate_relu(K: Tensor, keep: Tensor) -> Tensor:
    """K (|K| - tau) where kept, tau the largest |K| that is dropped (0 if none is): the paper's soft threshold."""
    size = K.detach().abs()
    tau = torch.where(keep, 0, size).max()
    return K * torch.where(keep, size - tau, 0)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"abs": gate_abs, "binary": gate_binary, "relu": gate_relu}


@final
class KernelUpdate(Branch):
    """S = gate(K, the `count` largest |K|), K from P (heads, inputs, rank / heads) and Q (heads, outputs, rank / heads).

    distance: K = D. mix: K = D + alpha softmax(D / gamma, over outputs) + beta. lora: K = sum of P_h Q_h'.
    `zero`: K is 0 at the start (the two heads of "distance" are copies; Q of "lora" is 0).
    Differs: gamma = exp(log_gamma), which cannot reach 0 or change its sign.
    """

    signs: Tensor

    def __init__(
        self, shape: tuple[int, int], *, rank: int, heads: int, kernel: str, gate: str, scale: float, count: int,
        zero: bool = False, seed: int = 0, name: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        outputs, inputs = shape
        self.name, self.kernel, self.gate, self.count = name, kernel, GATES[gate], count
        wide = rank // heads
        # Kaiming-uniform with a = sqrt(5) on the 3-d tensor, whose fan-in is all but its first dim.
        self.P = nn.Parameter(_draw((heads, inputs, wide), seed, f"{name}.P"))
        self.Q = nn.Parameter(_draw((heads, outputs, wide), seed, f"{name}.Q"))
        self.register_buffer("signs", scale * torch.tensor([(-1.0) ** head for head in range(heads)]))
        if kernel == "mix":
            self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
            self.log_gamma = nn.Parameter(torch.zeros(()))
        if zero and kernel == "lora":
            nn.init.zeros_(self.Q)
        elif zero:
            for part in (self.P, self.Q):
                part.data[1::2] = part.data[::2]

    def values(self) -> Tensor:
        """K, (inputs, outputs), dense and differentiable."""
        if self.kernel == "lora":
            return torch.einsum("hir,hor->io", self.P, self.Q)
        D = distance(self.P, self.Q, self.signs)
        if self.kernel == "distance":
            return D
        return D + self.alpha * torch.softmax(D / self.log_gamma.exp(), -1) + self.beta

    def keep(self, K: Tensor) -> Tensor:
        """The `count` largest |K|, exact; ties fall to the lower index. Raises BadInput when K is not finite."""
        try:
            return select(K.detach().abs(), Unstructured(), self.count).keep
        except BadInput as error:
            raise BadInput(f"{self.name}: the kernel's values cannot be ranked: {error}") from None

    def delta(self) -> Tensor:
        K = self.values()
        return self.gate(K, self.keep(K)).T

    @torch.no_grad()
    def mask(self) -> Mask:
        """The kept entries now, (outputs, inputs)."""
        return Mask(self.keep(self.values()).T.contiguous())


def _draw(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    draw = torch.rand(shape, generator=generator(seed, name), dtype=torch.float64)
    return ((2 * draw - 1) / sqrt(shape[1] * shape[2])).float()
