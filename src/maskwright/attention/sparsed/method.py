"""SparseD: a diffusion language model's per-head block masks, made once a generation and then reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Padding, State
from maskwright.attention.method import Direction
from maskwright.attention.sparsed.scores import block_scores
from maskwright.core.errors import BadInput
from maskwright.core.select import top


@final
@dataclass(frozen=True)
class SparseD(AttentionMethod):
    """Full attention for int(steps * skip) + 1 denoising steps and the next, which fixes every head's key blocks.

    Each block of `block` query rows keeps its int(n * select) + 1 best of n key blocks by mean attention. Isolated
    selection (arXiv 2509.24014): the keys being generated have a count of their own, since they score low early and
    grow. isolated="reference": the prompt's blocks are those of the best n that are not generated (the code);
    "paper": the prompt has its own count too (the text); "none": one count for all.
    The sampler says `run.tell(step=, steps=, new_tokens=)` before every step; the last `new_tokens` keys are generated.
    Differs: logits are scaled as the model's attention and a ragged block is averaged over its real keys; `parity`
    scales by 1 / sqrt(heads) and divides by the whole block, as the LLaDA code does.
    Raises BadInput for settings out of range, for a sampler that tells nothing or jumps over the step that makes the
    masks, and for a length or batch that changes within a run.
    """

    skip: float = 0.2
    select: float = 0.5
    block: int = 128
    isolated: Literal["reference", "paper", "none"] = "reference"
    parity: bool = False
    direction: ClassVar[Direction] = "bidirectional"

    def __post_init__(self) -> None:
        if not 0 <= self.skip <= 1 or not 0 < self.select <= 1 or self.block < 1:
            raise BadInput(
                f"sparsed: skip in 0..1, select in (0, 1], block >= 1, got {self.skip}, {self.select}, {self.block}"
            )
        if self.isolated not in ("reference", "paper", "none"):
            raise BadInput(f'sparsed: isolated is "reference", "paper" or "none", not {self.isolated!r}')

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        step, steps, new = _told(site)
        if step == 0:
            state.clear()
        run = (site.batch, site.heads, site.queries, site.keys, steps, new)
        if state.setdefault("run", run) != run:
            raise BadInput(
                f"sparsed, layer {site.layer}: (batch, heads, queries, keys, steps, new) was {state['run']}, now {run}"
            )
        last = _floor(steps, self.skip) + 1
        if step > last and "plan" not in state:
            raise BadInput(f"sparsed, layer {site.layer}: step {step} has no masks; they are made at step {last} of {steps}")
        if step == last:
            state["plan"] = self.freeze(site, new)
        return state["plan"] if step > last else site.dense()

    def freeze(self, site: AttentionSite, new: int) -> KeyPlan:
        """The masks of one layer from its queries and keys now; the last `new` keys are being generated."""
        keep = self.blocks(site, new)
        return KeyPlan.of_grid(
            keep, (self.block, self.block), site.queries, site.keys, structure=site.structure, offset=site.offset
        )

    def blocks(self, site: AttentionSite, new: int) -> Tensor:
        """(batch, heads, n, n) bool: the key blocks every query block keeps."""
        many = -(-site.keys // self.block)
        first = min(-(-(site.keys - new) // self.block), many - 1)  # the first block of generated keys
        every = self._scores(site, 0)
        if self.isolated == "none":
            return _best(every, self.select)
        own = _best(self._scores(site, first), self.select)
        if self.isolated == "reference":
            return torch.cat([_best(every, self.select)[..., :first], own], -1)
        return torch.cat([_best(every[..., :first], self.select), own], -1)

    def _scores(self, site: AttentionSite, first: int) -> Tensor:
        bounds = site.dense().bounds()
        scale = site.heads**-0.5 if self.parity else site.scale
        return block_scores(site.q, site.k, self.block, scale, bounds, first=first, whole=self.parity)


def _best(scores: Tensor, share: float) -> Tensor:
    """The best floor(n * share) + 1 of the last dimension's n, at most all of them."""
    many = scores.shape[-1]
    flat = scores.flatten(0, -2)
    count = min(_floor(many, share) + 1, many)
    return top(flat, torch.full((len(flat),), count), tuple(scores.shape)).view(scores.shape)


def _floor(count: int, share: float) -> int:
    return int(count * share + 1e-9)  # 100 * 0.29 is 28.999999999999996 in floats


def _told(site: AttentionSite) -> tuple[int, int, int]:
    told = [site.told.get(name) for name in ("step", "steps", "new_tokens")]
    if not all(isinstance(value, int) for value in told):
        raise BadInput("sparsed needs run.tell(step=, steps=, new_tokens=) before every denoising step, whole numbers each")
    step, steps, new = (int(value) for value in told if value is not None)
    if not (0 <= step < steps and 1 <= new <= site.keys):
        raise BadInput(f"sparsed: step {step} of {steps} with {new} new tokens does not fit {site.keys} keys")
    if site.queries != site.keys:
        raise BadInput(f"sparsed masks whole sequences without a cache: {site.queries} queries and {site.keys} keys")
    parts = [] if site.structure is None else site.structure.parts()
    if any(isinstance(part, Padding) and bool((part.last < site.keys).any()) for part in parts):
        raise BadInput("sparsed takes the last keys for the generated ones: pad a batch of prompts on the left")
    return step, steps, new
