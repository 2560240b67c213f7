"""A SparsePO run: the loss of a batch, and afterwards the mask of one and how sparse it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from maskwright.core import store
from maskwright.core.errors import BadInput
from maskwright.core.mask import SoftMask
from maskwright.core.maskset import SoftMaskSet
from maskwright.core.select import generator
from maskwright.inputs.pairs import Pairs, PreferenceRun, TokenWeights, logits_of
from maskwright.inputs.preference import Preference
from maskwright.inputs.sparsepo.activations import Watch
from maskwright.inputs.sparsepo.masknet import TokenMaskNet

if TYPE_CHECKING:
    from maskwright.inputs.sparsepo.method import SparsePo

Batch = Pairs | Mapping[str, Any]


@dataclass(frozen=True)
class Sparsity:
    """Of a mask over the response tokens of a batch: the share that is exactly 0, the mean, the greatest weight, and the
    share of responses whose tokens are all 0 (dead: they teach nothing)."""

    zeros: float
    mean: float
    greatest: float
    dead: float


@final
class SparsePoRun:
    """`loss(batch)` for the user's own loop; `groups` for the optimiser; `masks`, `sparsity` and `save_masks` for a look."""

    def __init__(
        self, method: SparsePo, policy: nn.Module, reference: nn.Module, nets: tuple[TokenMaskNet, ...], seed: int
    ) -> None:
        self.method, self.policy, self.reference, self.nets, self.seed = method, policy, reference, nets, seed
        self.rng = generator(seed, "token mask")
        self._run = PreferenceRun(policy, self._read, method.beta)

    def loss(self, batch: Batch) -> tuple[Tensor, Preference]:
        """The mean loss of a batch (see `Pairs.of`) with its graph, penalties included, and what it was made of."""
        return self._run.loss(batch)

    @property
    def mask_parameters(self) -> list[nn.Parameter]:
        """What the mask network learns; empty where nothing is learned."""
        return [parameter for net in self.nets for parameter in net.parameters()]

    def groups(
        self, lr: float, *, mask_lr: float | None = None, mask_decay: float = 0.01, **policy: Any
    ) -> list[dict[str, Any]]:
        """Parameter groups for one optimiser: the policy's, and the mask network's with a rate and decay of its own."""
        found = [{"params": [p for p in self.policy.parameters() if p.requires_grad], "lr": lr, **policy}]
        if self.nets:
            rate = lr if mask_lr is None else mask_lr
            found.append({"params": self.mask_parameters, "lr": rate, "weight_decay": mask_decay})
        return found

    @torch.no_grad()
    def masks(self, batch: Batch) -> SoftMaskSet:
        """The weights of a batch without dropout: "chosen.reward", "rejected.reward", "chosen.kl" and "rejected.kl".

        Each (n, length - 1), a token one column before its place, 0 outside the response. A random mask is drawn anew.
        """
        pairs = Pairs.of(batch)
        modes = [net.training for net in self.nets]
        for net in self.nets:
            net.eval()
        weights = self._read(pairs)[1]
        for net, mode in zip(self.nets, modes, strict=True):
            net.train(mode)
        half = len(pairs.ids) // 2
        found: dict[str, SoftMask] = {}
        for name, told in (("reward", weights.reward), ("kl", weights.kl)):
            values = torch.where(pairs.response, torch.as_tensor(told, dtype=torch.float32, device=pairs.ids.device), 0.0)
            found |= {f"chosen.{name}": SoftMask(values[:half]), f"rejected.{name}": SoftMask(values[half:])}
        return SoftMaskSet(found, made_by=self.method.made_by(self.seed))

    def save_masks(self, batch: Batch, path: Path | str) -> None:
        """Write `masks(batch)` as one .safetensors file, read by `core.store.load`."""
        store.save(self.masks(batch), Path(path))

    def sparsity(self, batch: Batch) -> dict[str, Sparsity]:
        """How sparse the "reward" and the "kl" mask of a batch are, measured without dropout."""
        pairs, found = Pairs.of(batch), self.masks(batch)
        told = {}
        for name in ("reward", "kl"):
            values = torch.cat([found[f"{side}.{name}"].values for side in ("chosen", "rejected")])
            used = values[pairs.response]
            dead = (values.amax(1) == 0).double().mean()
            told[name] = Sparsity(float((used == 0).double().mean()), float(used.mean()), float(used.max()), float(dead))
        return told

    def _read(self, pairs: Pairs) -> tuple[Tensor, TokenWeights]:
        """The reference's logits and the weights: a token's from what the reference says before it."""
        method = self.method
        if method.mask == "mapo":
            with torch.no_grad(), Watch(self.reference, method.hooks) as watch:
                logits = logits_of(self.reference, pairs).logits
            return logits, self._laid(*[watch.mask(logits, pairs.response)] * 2)
        with torch.no_grad():
            out = logits_of(self.reference, pairs, output_hidden_states=bool(self.nets))
        if not self.nets:
            drawn = torch.rand(pairs.response.shape, generator=self.rng).to(out.logits) if method.mask == "random" else 1.0
            return out.logits, self._laid(drawn, drawn)
        states = [layer[:, :-1].detach() for layer in out.hidden_states[1:]]  # the first is the embedding's output
        weights = [net(states[-1:] if method.last else states) for net in self.nets]
        if method.ceiling is not None:
            weights = [weight.clamp(max=method.ceiling) for weight in weights]
        return out.logits, self._laid(weights[0], weights[-1], pairs.response)

    def _laid(self, m_u: Tensor | float, m_d: Tensor | float, learned: Tensor | None = None) -> TokenWeights:
        """Weights where the method lays them, and for learned ones the penalty: the l1 norms of a pair's two responses."""
        method, penalty = self.method, None
        m_u, m_d = m_u if method.on_reward else 1.0, m_d if method.on_kl else 1.0
        for weight, price in ((m_u, method.l1_u), (m_d, method.l1_d)):
            if price and learned is not None and isinstance(weight, Tensor):
                chosen, rejected = torch.where(learned, weight, 0.0).sum(1).chunk(2)
                penalty = price * (chosen + rejected) + (0.0 if penalty is None else penalty)
        return TokenWeights(m_u, m_d, penalty)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Width and number of layers of a causal model, by its config. Raises BadInput."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not width or not layers:
        raise BadInput(f"{type(model).__name__} has no config with hidden_size and num_hidden_layers to build a mask on")
    return int(width), int(layers)
