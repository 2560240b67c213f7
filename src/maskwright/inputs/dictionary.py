"""Dictionary learning: settings that every sparse coder has, and the coder they make from patches."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.method import get
from maskwright.core.select import generator
from maskwright.core.store import replacing
from maskwright.inputs.coding import infer
from maskwright.inputs.method import InputMethod
from maskwright.inputs.thresholded import Proximal, Thresholded

FORMAT, VERSION = "maskwright.dictionary", 1


@dataclass(frozen=True)
class Coding(InputMethod):
    """Fields every sparse coder has.

    lam: strength of the penalty. atoms: columns of the dictionary. iterations: of a code. epochs, batch, eta: passes over
    the patches, rows a dictionary step, its size. non_negative: codes of 0 or more. ridge: patches are whitened with it, in
    units of their mean variance a direction; None codes them as they are.
    """

    lam: float = 1.0
    atoms: int = 288
    iterations: int = 150
    epochs: int = 30
    batch: int = 250
    eta: float = 0.5
    non_negative: bool = False
    ridge: float | None = 0.01

    def validate(self) -> None:
        for name in ("atoms", "iterations", "epochs", "batch"):
            if getattr(self, name) < (0 if name == "epochs" else 1):
                raise BadInput(f"sparse coding needs {name} of 1 or more, got {getattr(self, name)}")
        if not (isfinite(self.eta) and self.eta > 0):
            raise BadInput(f"sparse coding needs an eta above 0, got {self.eta}")
        if self.ridge is not None and not (isfinite(self.ridge) and self.ridge > 0):
            raise BadInput(f"whitening needs a ridge above 0, got {self.ridge}")
        _ = self.operator

    @property
    @abstractmethod
    def operator(self) -> Proximal:
        """The penalty with its threshold."""

    def keep(self, x: Tensor, *, rng: torch.Generator | None = None) -> Mask:
        """What one threshold at step 1 leaves of x (batch, *grid), correlations with columns of length 1.

        Where the columns are orthonormal this is the support of the code itself. Raises BadInput for entries not finite.
        """
        return self.operator.prox(x).mask

    def fit(self, patches: Tensor, *, seed: int = 0) -> Coder:
        """Learn a dictionary from patches (count, m): codes from 0, D <- D + eta (X - D A) A^T / batch, columns of length 1.

        Columns start as patches drawn by chance; one that no patch of an epoch used is drawn anew. Raises BadInput for
        patches that are not finite rows, or fewer rows that are not flat than `atoms`.
        """
        if patches.ndim != 2 or not patches.dtype.is_floating_point or not bool(torch.isfinite(patches).all()):
            raise BadInput(f"fit takes finite patches (count, entries), got {patches.dtype} of shape {tuple(patches.shape)}")
        white = None if self.ridge is None else whitening(patches, self.ridge)
        rows = _prepared(patches.detach(), white)
        rng = generator(seed, "dictionary")
        lively = (rows.norm(dim=1) > 1e-6 * rows.norm(dim=1).amax()).nonzero().flatten() if len(rows) else rows.new_zeros(0)
        if len(lively) < self.atoms:
            raise BadInput(f"{len(lively)} patches that are not flat cannot start {self.atoms} columns")

        def drawn(count: int) -> Tensor:
            return rows[lively[torch.randperm(len(lively), generator=rng)[:count]]].T

        columns = _unit(drawn(self.atoms))
        for _ in range(self.epochs):
            used = torch.zeros(self.atoms, dtype=torch.bool)
            for index in torch.randperm(len(rows), generator=rng).split(self.batch):
                x = rows[index]
                code = infer(columns, x, self.operator, self.iterations)
                columns = _unit(columns + self.eta / len(x) * (x - code @ columns.T).T @ code)
                used |= (code != 0).any(0)
            columns[:, ~used] = _unit(drawn(int((~used).sum())))
        return Coder(columns.contiguous(), self, white, seed)


@final
@dataclass(frozen=True, eq=False)
class Coder:
    """A dictionary (m, atoms) of unit columns with the settings it was learned by; `whitening` (m, m) or None."""

    dictionary: Tensor
    method: Coding
    whitening: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shape, norms = tuple(self.dictionary.shape), self.dictionary.norm(dim=0)
        if self.dictionary.ndim != 2 or shape[1] != self.method.atoms:
            raise BadInput(f"a dictionary of shape {shape} does not have {self.method.atoms} columns")
        if not bool(((norms - 1).abs() < 1e-3).all()):
            raise BadInput(
                f"a dictionary of shape {shape} has columns of lengths {norms.min():.4g}..{norms.max():.4g}, not 1"
            )
        if self.whitening is not None and tuple(self.whitening.shape) != (shape[0], shape[0]):
            raise BadInput(f"a whitening of shape {tuple(self.whitening.shape)} does not fit patches of {shape[0]} entries")

    def prepared(self, patches: Tensor) -> Tensor:
        """Patches (batch, m) as they are coded: each less its mean, whitened. What `decode` comes near to."""
        if patches.ndim != 2 or patches.shape[1] != len(self.dictionary):
            raise BadInput(f"patches of shape {tuple(patches.shape)} are no rows of {len(self.dictionary)} entries")
        return _prepared(patches, self.whitening)

    def encode(self, patches: Tensor) -> Thresholded:
        """Codes (batch, atoms) of patches (batch, m), and their support as a mask. Raises BadInput as `infer` does."""
        code = infer(self.dictionary, self.prepared(patches), self.method.operator, self.method.iterations)
        return Thresholded(code, Mask(code != 0))

    def decode(self, code: Tensor) -> Tensor:
        """(batch, atoms) -> (batch, m), in the space of `prepared`."""
        return code @ self.dictionary.T

    def unwhitened(self, rows: Tensor) -> Tensor:
        """Rows of that space as patches less their mean: the inverse of the whitening."""
        return rows if self.whitening is None else torch.linalg.solve(self.whitening, rows.T).T

    def save(self, path: Path | str) -> None:
        """One .safetensors: dictionary, whitening and settings. Equal coders give equal bytes."""
        tensors = {"dictionary": self.dictionary.detach().cpu().contiguous()}
        if self.whitening is not None:
            tensors["whitening"] = self.whitening.detach().cpu().contiguous()
        told = {"format": FORMAT, "version": VERSION, "made_by": self.method.made_by(self.seed)}
        manifest = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
        with replacing(Path(path)) as partial:
            # One key: the library's writer puts several in a random order.
            save_file(tensors, partial, metadata={"maskwright": f"{_digest(manifest, tensors)} {manifest}"})

    @staticmethod
    def load(path: Path | str) -> Coder:
        """Read such a file. Raises BadInput, one line naming it, for anything that is not exactly one."""
        try:
            return _load(Path(path))
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file") from None
        except Exception as error:  # whatever a hostile file provokes in json, torch or safetensors
            said = " ".join(str(error).split())[:300]
            raise BadInput(f"{path}: not a readable dictionary ({type(error).__name__}: {said})") from None


def whitening(patches: Tensor, ridge: float) -> Tensor:
    """(m, m) symmetric W with W C W near 1, C the covariance of patches (count, m) less their own means (ZCA).

    W = V (l + ridge * mean l)^(-1/2) V^T over the eigenvalues l of C: the ridge keeps noise in faint directions small.
    """
    rows = patches.double() - patches.double().mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows), 1))
    values = values.clamp(min=0)
    if not float(values.sum()):
        raise BadInput(f"patches of shape {tuple(patches.shape)} are all flat: there is nothing to whiten")
    return ((vectors * (values + ridge * values.mean()).rsqrt()) @ vectors.T).to(patches.dtype)


def _prepared(patches: Tensor, white: Tensor | None) -> Tensor:
    return patches if white is None else (patches - patches.mean(1, keepdim=True)) @ white


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=1e-12)


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path) -> Coder:
    with safe_open(path, framework="pt") as handle:
        digest, _, manifest = (handle.metadata() or {}).get("maskwright", "").partition(" ")
        tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}
    told: dict[str, Any] = json.loads(manifest) if manifest.startswith("{") else {}
    if told.get("format") != FORMAT or told.get("version") != VERSION:
        raise BadInput(f"no manifest of a dictionary, version {VERSION}")
    if _digest(manifest, tensors) != digest:
        raise BadInput("the digest does not match: the file was changed or damaged")
    made = told["made_by"]
    kind = get(made["method"])
    if not (isinstance(kind, type) and issubclass(kind, Coding)):
        raise BadInput(f"{made['method']} is no sparse coder")
    return Coder(tensors["dictionary"], kind(**made["settings"]), tensors.get("whitening"), made["seed"])
