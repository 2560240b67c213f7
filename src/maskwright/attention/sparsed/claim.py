"""SparseD's claim on a small masked-diffusion model: masks made once serve the rest of the generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, State, use
from maskwright.attention.method import Direction
from maskwright.attention.sparsed import SparseD
from maskwright.core.method import Claim, Effect, get
from maskwright.core.select import generator
from maskwright.lab import diffusion, text
from maskwright.lab.made import made
from maskwright.lab.train import loss_of

BLOCK = 16
Figures = Mapping[str, float]
Change = Callable[[SparseD, AttentionSite, int, State], Tensor]  # (method, site, new, state) -> the blocks to keep


def _own(method: SparseD, site: AttentionSite, new: int, state: State) -> Tensor:
    return method.blocks(site, new)


def _lowest(method: SparseD, site: AttentionSite, new: int, state: State) -> Tensor:
    """The broken twin: the sign of the scores is wrong."""
    return method.blocks(replace(site, q=-site.q), new)


def _other_head(method: SparseD, site: AttentionSite, new: int, state: State) -> Tensor:
    return method.blocks(site, new).roll(1, 1)


def _random(method: SparseD, site: AttentionSite, new: int, state: State) -> Tensor:
    """As many blocks of the prompt and of the generated part in every row, but any."""
    first, draw = (site.keys - new) // BLOCK, generator(site.seed, f"layer {site.layer}")
    parts = method.blocks(site, new).split([first, site.keys // BLOCK - first], -1)
    return torch.cat([x.gather(-1, torch.rand(x.shape, generator=draw).argsort(-1)) for x in parts], -1)


@final
@dataclass(frozen=True)
class Arm(AttentionMethod):
    """SparseD's schedule with its blocks changed, made anew at every step, or replaced by another method.

    `overlap` collects, per later step looked at, the Jaccard index of the frozen blocks and those SparseD would take now.
    """

    inner: SparseD
    change: Change = _own
    anew: bool = False
    other: AttentionMethod | None = None
    overlap: list[float] = field(default_factory=list)
    direction: ClassVar[Direction] = "bidirectional"

    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        made_before = "plan" in state
        plan = self.inner.plan(site, state)
        if "plan" not in state:
            return plan
        step, steps, new = (int(site.told[name]) for name in ("step", "steps", "new_tokens"))
        if self.other is not None:
            return self.other.plan(site, state) if made_before else plan
        if not made_before or self.anew:
            state["blocks"] = self.change(self.inner, site, new, state)
            state["plan"] = KeyPlan.of_grid(
                state["blocks"], (BLOCK, BLOCK), site.queries, site.keys, structure=site.structure
            )
        elif step in (steps // 2, steps - 1):
            now = self.inner.blocks(site, new)
            both, either = (now & state["blocks"]).sum((-1, -2)), (now | state["blocks"]).sum((-1, -2))
            self.overlap.append(float((both / either).mean()))
        return state["plan"] if made_before else plan


@dataclass(frozen=True, eq=False)
class Setting:
    """What all arms of a seed share."""

    model: diffusion.MaskedLM
    asked: diffusion.Retrieval
    steps: int
    rows: tuple[Tensor, Tensor, Tensor]  # text with its end hidden; with half of that seen; what is hidden then (else -1)


@cache
def _setting(seed: int, scale: str) -> Setting:
    chars, draw, full = text.python_chars(), torch.Generator().manual_seed(1000 + seed), scale == "full"
    size = len(chars.vocabulary)
    if full:
        model = made("masked_lm", seed)
    else:
        model = diffusion.MaskedLM(size, layers=1, width=32, heads=2, seed=seed).eval()
    rows = diffusion.text_rows(chars.val, 32 if full else 2, draw)
    seen = rows.clone()
    seen[:, diffusion.PROMPT :] = size  # the number of a hidden character
    half = diffusion.hidden_rows(rows, diffusion.PROMPT, size, draw, 0.5)
    asked = diffusion.retrieval(chars, chars.val, 24 if full else 2, draw)
    return Setting(model, asked, diffusion.ANSWER if full else 8, (seen, *half))  # type: ignore[arg-type]


@cache
def _dense(seed: int, scale: str) -> Tensor:
    told = _setting(seed, scale)
    return diffusion.generate(told.model, told.asked.prompt, diffusion.ANSWER, told.steps)


@torch.no_grad()
def _figures(method: AttentionMethod, seed: int, scale: str) -> dict[str, float]:
    told = _setting(seed, scale)
    with use(told.model, method, seed=seed) as run:
        out = diffusion.generate(told.model, told.asked.prompt, diffusion.ANSWER, told.steps, tell=run.tell)
    dense = _dense(seed, scale)
    same = float((out == dense).double().mean())
    return {"retrieval": diffusion.right(told.asked, out), "agreement": same, **_text(method, told)}


def _text(method: AttentionMethod, told: Setting) -> dict[str, float]:
    """Density of a sparse step, and the loss of hidden text in it; the masks were made with all of the end hidden."""
    seen, half, target = told.rows
    made_at = int(told.steps * getattr(getattr(method, "inner", None), "skip", 0.0)) + 1
    with use(told.model, method) as run:
        run.tell(step=0, steps=told.steps, new_tokens=diffusion.ANSWER)
        run.tell(step=made_at)
        told.model(seen)
        run.tell(step=made_at + 1)
        loss = loss_of(told.model, half, target, batch=len(half), loss_fn=diffusion.denoising_loss)
        run.record = True
        told.model(half)
    density = sum(float(r.kept.mean()) / (r.queries * r.keys) for r in run.records) / len(run.records)
    return {"text_loss": loss, "density": density}


def _arm(change: Change = _own, *, anew: bool = False, **settings: object) -> Callable[[int, str], Figures]:
    def run(seed: int, scale: str) -> Figures:
        method = Arm(SparseD(block=BLOCK, **settings), change, anew)  # type: ignore[arg-type]
        figures = _figures(method, seed, scale)
        if method.overlap:
            figures["overlap"] = sum(method.overlap) / len(method.overlap)
        return figures

    return run


def _window(select: float) -> Callable[[int, str], Figures]:
    """A window and one block of sinks with as many keys a row as SparseD reads, after the same dense steps."""

    def run(seed: int, scale: str) -> Figures:
        inner = SparseD(block=BLOCK, select=select)
        pairs, at = _text(Arm(inner), _setting(seed, scale))["density"] * diffusion.LENGTH**2, torch.arange(diffusion.LENGTH)
        apart = (at - at[:, None]).abs()
        wide = next(w for w in range(1, diffusion.LENGTH + 1) if int(((apart < w) | (at < BLOCK)).sum()) >= pairs)
        return _figures(Arm(inner, other=get("sliding_window")(window=wide, sink=BLOCK)), seed, scale)

    return run


def _full(seed: int, scale: str) -> Figures:
    return _figures(SparseD(block=BLOCK, skip=1.0), seed, scale)


def _bound(seed: int, scale: str) -> Figures:
    return {"overlap": 0.7}


CLAIM = Claim(
    arms={
        "dense": _full,
        "sparsed": _arm(),
        "no_dense_phase": _arm(skip=0.0),
        "not_isolated": _arm(isolated="none"),
        "paper_isolated": _arm(isolated="paper"),
        "anew": _arm(anew=True),
        "window": _window(0.5),
        "random": _arm(_random),
        "other_head": _arm(_other_head),
        "lowest": _arm(_lowest),
        "sparsed_30": _arm(select=0.3),
        "window_30": _window(0.3),
        "random_30": _arm(_random, select=0.3),
        "bound": _bound,
    },
    method="sparsed",
    twin="lowest",
    effects=(
        Effect("retrieval within 3 points of dense at select 0.5", "sparsed", "dense", "retrieval", margin=-0.03),
        Effect("20 points above a window of as many keys", "sparsed", "window", "retrieval", margin=0.2),
        Effect("its blocks overlap by 0.7 with those of later steps", "sparsed", "bound", "overlap"),
        Effect("a head's blocks are its own", "sparsed", "other_head", "overlap"),
        Effect("above random blocks by 3 points", "sparsed", "random", "retrieval", "quality", 0.03),
        Effect("masks made anew at every step gain at most a point", "sparsed", "anew", "retrieval", "quality", -0.01),
        Effect("the dense phase costs nothing", "sparsed", "no_dense_phase", "retrieval", "quality", -0.01),
        Effect("the dense phase helps", "sparsed", "no_dense_phase", "agreement", "quality"),
        Effect("isolated selection helps", "sparsed", "not_isolated", "agreement", "quality"),
        Effect("text loss within 0.02 nats of dense", "sparsed", "dense", "text_loss", "quality", -0.02, higher=False),
        Effect("text loss below random blocks", "sparsed", "random", "text_loss", "quality", higher=False),
        Effect("select 0.3: within 3 points of dense", "sparsed_30", "dense", "retrieval", "quality", -0.03),
        Effect("select 0.3: above a window", "sparsed_30", "window_30", "retrieval", "quality"),
        Effect("select 0.3: above random blocks", "sparsed_30", "random_30", "retrieval", "quality"),
    ),
    seeds=(0, 1, 2),
    needs=("lab:masked_lm",),
    paper="LLaDA: accuracy within 0.1-0.5 points of dense at skip 0.2, select 0.3; windows fall to about 40 on RULER-4K",
)
