"""Statistics of a site's inputs, summed up while calibration batches stream through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.weights.sites import WeightSite

GATHERED = frozenset({"input_norm", "input_mean", "input_variance", "gram"})


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A module's input as (groups, rows, columns), columns in the order of `Layout.matrix` (conv: channels last).

    Linear-like modules have one group; a grouped convolution has its own columns per group.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(module, nn.Conv3d):
        raise BadInput(f"Conv3d with kernel {module.kernel_size}: no input statistics are offered for it")
    one = isinstance(module, nn.Conv1d)
    x = _padded(module, x if x.ndim == (3 if one else 4) else x.unsqueeze(0))
    x = x.unsqueeze(-2) if one else x
    kernel, dilation, stride = [(1, *s) if one else s for s in (module.kernel_size, module.dilation, module.stride)]
    cols = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (batch, in x kernel, places)
    batch, _, places = cols.shape
    groups, size = module.groups, kernel[0] * kernel[1]
    cols = cols.reshape(batch, groups, -1, size, places).permute(1, 0, 4, 3, 2)  # (groups, batch, places, kernel, in)
    return cols.reshape(groups, batch * places, -1)


def _padded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution's input with its padding put on, whatever its form ("same", a size; zeros, reflect, ...)."""
    sides: list[int] = []  # last dim first, as F.pad takes them
    for dim in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[dim] * (module.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if module.padding == "valid" else [int(module.padding[dim])] * 2
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


class InputStatistics:
    """Streaming sums over one input: norm, mean, variance and Gram matrix, whichever is asked for.

    Column sums are kept in float64; the Gram matrix X^T X in float32. `sample` holds up to `sample_rows` input
    rows, evenly spaced, for reconstruction errors. `rows` counts what was seen.
    """

    def __init__(self, needs: frozenset[str], batches: int, sample_rows: int = 512) -> None:
        self.needs, self.rows, self.sequences = needs, 0, 0
        self._take = max(min(sample_rows, 1), sample_rows // max(batches, 1))  # of each batch; 0 rows asked, 0 taken
        self._square: Any = 0.0
        self._sum: Any = 0.0
        self._gram: Tensor | None = None
        self._sample: list[Tensor] = []

    @torch.no_grad()
    def add(self, module: nn.Module, x: Tensor) -> None:
        """Take one batch of inputs. Raises BadInput for a Gram matrix of a grouped convolution."""
        rows = input_rows(module, x).float()
        self.rows += rows.shape[1]
        self.sequences += len(x) if x.ndim > 2 else 1
        self._square = self._square + rows.square().sum(1).double()
        if self.needs & {"input_mean", "input_variance"}:
            self._sum = self._sum + rows.sum(1).double()
        if self._take and len(rows) == 1 and rows.shape[1]:
            step = max(1, rows.shape[1] // self._take)
            self._sample.append(rows[0, ::step][: self._take].clone())
        if "gram" in self.needs:
            if len(rows) != 1:
                raise BadInput("a grouped convolution has no single Gram matrix; use a method without `gram`")
            if self._gram is None:
                self._gram = torch.zeros(rows.shape[2], rows.shape[2])
            self._gram.addmm_(rows[0].T, rows[0])

    def finish(self, site: WeightSite) -> dict[str, Tensor]:
        """Statistics by name, per column of the site's matrix (or per row and column for grouped convolutions).

        Raises BadInput naming the site when it saw no input, or its inputs hold NaN or infinity.
        """
        if not self.rows:
            raise BadInput(f"{site.name}: no calibration token reached this weight")
        if not bool(torch.isfinite(self._square).all()):
            raise BadInput(f"{site.name}: its calibration activations hold NaN or infinity")
        out = {"input_norm": self._square.sqrt()}
        if self.needs & {"input_mean", "input_variance"}:
            mean = self._sum / self.rows
            out["input_mean"] = mean
            out["input_variance"] = (self._square / self.rows - mean.square()).clamp(min=0)
        # Grouped: each block of output rows has its own input columns.
        outputs = site.matrix.shape[0]
        spread = {
            name: (v[0] if len(v) == 1 else v.repeat_interleave(outputs // len(v), 0)).float() for name, v in out.items()
        }
        if self._gram is not None:
            spread["gram"] = self._gram
        if self._sample:
            spread["sample"] = torch.cat(self._sample)
        spread |= {"rows": torch.tensor(self.rows), "sequences": torch.tensor(self.sequences)}
        return spread


def output_error(sample: Tensor, before: Tensor, after: Tensor) -> float:
    """||X (W - W')^T|| / ||X W^T|| in Frobenius norm. sample (rows, in), weights (out, in)."""
    dense = sample @ before.T
    scale = float(dense.norm())
    return float((sample @ (before - after).T).norm()) / scale if scale else 0.0
