"""SparsePO: preference optimisation in which a mask says how much each response token counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import SoftMask
from maskwright.inputs.method import InputMethod
from maskwright.inputs.pairs import still
from maskwright.inputs.sparsepo.activations import rescaled, types
from maskwright.inputs.sparsepo.masknet import TokenMaskNet
from maskwright.inputs.sparsepo.run import SparsePoRun, sizes

Source = Literal["none", "mapo", "common", "independent", "random"]
LEARNED = ("common", "independent")


@final
@dataclass(frozen=True)
class SparsePo(InputMethod):
    """-log sigmoid(beta (u - delta)): TDPO1 whose token rewards count m_u times, and token divergences m_d times.

    mask: where the weights come from. "common": one network over the reference's hidden states, trained with the
    policy, gives m_u = m_d; "independent": one network each; "mapo": how active the reference is (`hooks`), nothing
    learned; "random": uniform on [0, 1), drawn for every batch; "none": 1, which is TDPO1.
    on_reward, on_kl: whether the mask lies there; where not, tokens count once.
    l1_u, l1_d: penalty on the sum of a pair's weights, on learned masks. last: the network sees only the last layer.
    inner, dropout, start: of the network (TokenMaskNet). ceiling: learned weights above it count as it (None: no bound,
    as in the paper).
    Raises BadInput for settings that cannot be. arXiv 2410.05102; code huawei-noah/HEBO, SparsePO.
    """

    mask: Source = "common"
    beta: float = 0.1
    l1_u: float = 0.0
    l1_d: float = 0.0
    on_reward: bool = True
    on_kl: bool = True
    last: bool = False
    inner: int = 0
    dropout: float = 0.01
    start: float = 1.0
    ceiling: float | None = None
    hooks: tuple[str, ...] = ("all",)

    def validate(self) -> None:
        object.__setattr__(self, "hooks", (self.hooks,) if isinstance(self.hooks, str) else tuple(self.hooks))
        types(self.hooks)
        if self.mask not in get_args(Source):
            raise BadInput(f"sparsepo has the masks {', '.join(get_args(Source))}, not {self.mask!r}")
        if not 0 < self.beta < float("inf") or not (self.ceiling is None or 0 < self.ceiling < float("inf")):
            raise BadInput(f"sparsepo needs beta and ceiling above 0 and finite, got {self.beta} and {self.ceiling}")
        if not (0 <= self.l1_u < float("inf") and 0 <= self.l1_d < float("inf")):
            raise BadInput(f"sparsepo needs penalties of at least 0, got l1_u {self.l1_u} and l1_d {self.l1_d}")
        if max(self.l1_u, self.l1_d) > 0 and self.mask not in LEARNED:
            raise BadInput(f"a penalty acts on learned masks ({', '.join(LEARNED)}), not on {self.mask!r}")
        TokenMaskNet(1, 1, inner=self.inner, dropout=self.dropout, start=self.start)

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> SoftMask:
        """The mask of x (batch, tokens, ...), activations before each token, where nothing is learned.

        "mapo": the mean over the features, brought to [0, 1] over the tokens; "random" draws from `rng`. Raises BadInput
        for learned masks, which a run gives (`run.masks(batch)`), and for activations that are not finite.
        """
        if self.mask in LEARNED:
            raise BadInput(f"a {self.mask} mask is learned with a policy: attach it, and ask its run for masks(batch)")
        if self.mask == "random":
            drawn = torch.rand(x.shape[:2], generator=rng)
            return SoftMask(drawn.to(x.device))
        every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return SoftMask(rescaled(x.flatten(2).mean(2), every) if self.mask == "mapo" else every.float())

    @contextmanager
    def attach(self, policy: nn.Module, reference: nn.Module, *, seed: int = 0) -> Iterator[SparsePoRun]:
        """A run whose `loss(batch)` trains the policy and the mask network, for causal models of transformers' form.

        The reference is another copy, frozen; it stands in eval mode meanwhile. seed: of random masks and the network.
        Raises BadInput where they share weights, and where the reference's config does not tell its sizes.
        """
        with still(reference, policy):
            nets: tuple[TokenMaskNet, ...] = ()
            if self.mask in LEARNED:
                width, layers = sizes(reference)
                place = next(reference.parameters()).device
                nets = tuple(self._net(width, layers, seed + i).to(place) for i in range(1 + (self.mask == "independent")))
            yield SparsePoRun(self, policy, reference, nets, seed)

    def _net(self, width: int, layers: int, seed: int) -> TokenMaskNet:
        layers = 1 if self.last else layers
        return TokenMaskNet(width, layers, inner=self.inner, dropout=self.dropout, start=self.start, seed=seed)
