"""The tensors that are trained: their masks at one bit an entry, and how noise is added to them in place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from maskwright.core.budget import whole
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.kernels import noise as kernel
from maskwright.updates.noise import normal, stream, table, uniform_bits
from maskwright.updates.sparse_mezo.threshold import CHUNK, Threshold, Values, pieces, threshold
from maskwright.weights.sites import matches


@dataclass(eq=False)
class Site:
    """One trained tensor. `bits` holds its mask, entry i in bit i % 8 of byte i // 8; None where all of it is trained."""

    name: str
    parameter: nn.Parameter
    kind: str
    count: int
    rule: Threshold | None = None
    bits: np.ndarray | None = None
    saved: list[Tensor] = field(default_factory=list)

    @property
    def flat(self) -> Tensor:
        """The live values, in one row."""
        return self.parameter.detach().view(-1)

    def values(self, seed: int) -> Values:
        """What the mask goes by: |w| as it is now, or chance. `(start, stop) -> (stop - start,)`, finite, >= 0."""
        if self.kind == "random":
            name = f"{self.name}/mask"
            return lambda start, stop: torch.from_numpy(uniform_bits(seed, name, start, stop).astype(np.float64))
        return lambda start, stop: self.flat[start:stop].abs().cpu()

    def settle(self, seed: int) -> None:
        """Fix the threshold from the weights as they are (or from chance), with exactly `count` entries kept."""
        if 0 < self.count < self.parameter.numel():
            self.rule = threshold(self.values(seed), self.parameter.numel(), self.count, self.kind == "large")
        self.write(seed)

    def write(self, seed: int) -> None:
        """Write the bits by the threshold and the weights as they are now."""
        total = self.parameter.numel()
        if self.count == total:
            return
        if self.bits is None:
            self.bits = np.zeros(-(-total // 8), np.uint8)
        if self.rule is not None:
            values = self.values(seed)
            for start, stop in pieces(total):
                kept = self.rule.keep(values(start, stop), start)
                self.bits[start // 8 : -(-stop // 8)] = np.packbits(kept.numpy(), bitorder="little")

    def keep(self, start: int, stop: int) -> Tensor | None:
        """The mask of one piece, or None where all is kept."""
        if self.bits is None:
            return None
        part = self.bits[start // 8 : -(-stop // 8)]
        return torch.from_numpy(np.unpackbits(part, count=stop - start, bitorder="little").view(np.bool_))

    def mask(self) -> Mask:
        """The whole mask, a byte an entry."""
        total = self.parameter.numel()
        kept = self.keep(0, total)
        return Mask((torch.ones(total, dtype=torch.bool) if kept is None else kept).view(self.parameter.shape))

    @property
    def kept(self) -> int:
        """Number of entries trained now."""
        if self.bits is None:
            return self.parameter.numel()
        return int(np.bitwise_count(self.bits).sum())

    def move(self, seed: int, scales: Sequence[float], decay: float = 0.0) -> None:
        """w += mask * (scale * z) for each scale in turn, in place and piece by piece; z is the seed's noise here.

        With the last, mask * (decay * w) is added too. Entries that the mask drops keep every bit.
        """
        flat = self.flat
        if not self.count:
            return
        if kernel.fits(flat):
            bits = None if self.bits is None else torch.from_numpy(self.bits)
            kernel.move(flat, stream(seed, self.name), table(), bits, scales, decay)
        else:
            self._passes(flat, seed, scales, decay)

    def _passes(self, flat: Tensor, seed: int, scales: Sequence[float], decay: float) -> None:
        """The kernel's twin, with the same bits: for other dtypes and devices, and where nothing native runs."""
        room = min(CHUNK, len(flat))
        noise, term = torch.empty(room), torch.empty(room)
        for start, stop in pieces(len(flat)):
            z, part, keep = noise[: stop - start], flat[start:stop], self.keep(start, stop)
            normal(seed, self.name, start, stop, out=z)
            drop = None if keep is None else keep.logical_not_()
            for at, scale in enumerate(scales):
                step = torch.mul(z, scale, out=term[: stop - start]).to(part.device)
                if decay and at == len(scales) - 1:
                    # Not `alpha`: torch rounds that once or twice, by the place in a vector.
                    step.add_(part.to(step) * decay)
                if drop is not None:
                    step.masked_fill_(drop.to(part.device), -0.0)  # x + -0.0 is x for both zeros; 0.0 would turn -0.0
                part.add_(step)

    def save(self) -> None:
        """Keep a copy of what is trained."""
        flat = self.flat
        masked = [(flat[start:stop], self.keep(start, stop)) for start, stop in pieces(len(flat))]
        self.saved = [part.clone() if keep is None else part[keep.to(part.device)] for part, keep in masked]

    def restore(self) -> None:
        """Put the copy back."""
        flat = self.flat
        for (start, stop), saved in zip(pieces(len(flat)), self.saved, strict=True):
            keep, part = self.keep(start, stop), flat[start:stop]
            if keep is None:
                part.copy_(saved)
            else:
                part[keep.to(part.device)] = saved


def find(model: nn.Module, kind: str, density: float, vectors: str, where: Sequence[str]) -> list[Site]:
    """The trained tensors of a model, tied ones once, in its order. Raises BadInput for what cannot be trained."""
    named: dict[tuple[int, torch.Size], tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # By memory, so that two Parameters on one storage are not moved twice. No memory (meta, empty): by object.
        key = (parameter.data_ptr() or id(parameter), parameter.shape)
        named.setdefault(key, (parameter, []))[1].append(name)
    for pattern in where:
        every = [name for _, names in named.values() for name in names]
        if not any(matches(name, pattern) for name in every):
            raise BadInput(f"where {pattern!r} matches no parameter; names look like {', '.join(every[:3])}")
    found = []
    for parameter, names in named.values():
        if where and not any(matches(name, pattern) for name in names for pattern in where):
            continue
        if not parameter.is_floating_point() and (where or parameter.requires_grad):
            raise BadInput(f"{names[0]}: {parameter.dtype} of shape {tuple(parameter.shape)} is no floating dtype")
        total, masked = parameter.numel(), parameter.ndim >= 2 or vectors == "masked"
        count = whole(density, total) if masked and kind != "dense" else total
        if not parameter.requires_grad or not total or (not masked and vectors == "skipped"):
            continue
        _refuse(names[0], parameter)
        found.append(Site(names[0], parameter, kind, count))
    if not sum(site.count for site in found):
        what = f"where {', '.join(map(repr, where))}" if where else type(model).__name__
        raise BadInput(f"{what}: nothing to train at density {density} (frozen, empty or no such tensors)")
    return found


def _refuse(name: str, parameter: nn.Parameter) -> None:
    shape = tuple(parameter.shape)
    if parameter.is_meta:
        raise BadInput(f"{name}: the weight of shape {shape} has no data (meta device)")
    if not parameter.is_contiguous():
        raise BadInput(f"{name}: the weight of shape {shape} is not contiguous; it is trained in place, in one row")
    flat = parameter.detach().view(-1)
    if not all(bool(flat[start:stop].isfinite().all()) for start, stop in pieces(len(flat))):
        raise BadInput(f"{name}: the weight of shape {shape} holds NaN or infinite values")


def fingerprint(found: Iterable[Site]) -> str:
    """Hash of the trained tensors' names, dtypes, shapes and bytes, read in pieces."""
    digest = hashlib.sha256()
    for site in found:
        flat = site.flat
        digest.update(f"{site.name}\0{flat.dtype}{tuple(site.parameter.shape)}\n".encode())
        for start, stop in pieces(len(flat)):
            digest.update(flat[start:stop].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
