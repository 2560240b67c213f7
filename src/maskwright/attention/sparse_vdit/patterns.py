"""The five patterns of a head over a grid of video tokens, and attention that runs them, the multi-diagonal permuted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from maskwright.attention import KeyPlan, Pieces, Rows, attend
from maskwright.core.errors import BadInput

PATTERNS = ("full", "diagonal", "multi", "stripe", "skip")


@dataclass(frozen=True)
class Grid:
    """frames x height x width video tokens in reading order, `words` text tokens before them (or behind)."""

    frames: int
    height: int
    width: int
    words: int = 0
    words_first: bool = True

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or self.words < 0:
            raise BadInput(f"sparse_vdit: a grid has at least one frame, row and column and no fewer than 0 words: {self}")

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.frame + self.words

    @property
    def start(self) -> int:
        """The first video token."""
        return self.words if self.words_first else 0

    @property
    def prompt(self) -> tuple[int, int]:
        """The text tokens [start, stop)."""
        first = 0 if self.words_first else self.tokens - self.words
        return first, first + self.words


@dataclass(frozen=True)
class Bands:
    """How wide the patterns are: `diagonal` neighbours in token order, `multi` places of a frame (both odd: they lie
    around the own token), `stripe` first frames that all tokens see."""

    diagonal: int = 65
    multi: int = 9
    stripe: int = 1

    def __post_init__(self) -> None:
        if self.diagonal % 2 != 1 or self.multi % 2 != 1 or min(self.diagonal, self.multi, self.stripe) < 1:
            raise BadInput(f"sparse_vdit: a band around the own token is odd, and a stripe is at least a frame: {self}")


USUAL = Bands()


@lru_cache(maxsize=64)
def runs(pattern: str, grid: Grid, bands: Bands) -> Tensor:
    """The keys every row sees: (tokens, n, 2) int64 ascending runs [start, stop), empty ones with start == stop.

    Text rows see everything and every row sees the text, but for "skip", where no row sees anything. Distances are
    taken on video tokens alone. Raises BadInput for an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise BadInput(f"sparse_vdit: unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    at, end = torch.arange(grid.frames * grid.frame), grid.frames * grid.frame
    if pattern == "skip":
        return torch.zeros(grid.tokens, 1, 2, dtype=torch.int64)
    if pattern == "full":
        return torch.tensor([0, grid.tokens]).expand(grid.tokens, 1, 2)
    if pattern == "diagonal":
        half = bands.diagonal // 2
        video = torch.stack([at - half, at + half + 1], -1)[:, None]
    elif pattern == "stripe":
        video = torch.tensor([0, bands.stripe * grid.frame]).expand(end, 1, 2)
    else:
        first = torch.arange(grid.frames)[:, None] * grid.frame  # every frame's own run(s) of places
        video = (places(grid, bands)[at % grid.frame][:, None] + first[:, :, None]).flatten(1, 2)
    video = video.clamp(0, end) + grid.start
    text = torch.tensor(grid.prompt).expand(end, 1, 2)
    video = torch.cat([text, video] if grid.words_first else [video, text], 1)
    out = torch.zeros(grid.tokens, video.shape[1], 2, dtype=torch.int64)
    out[grid.start : grid.start + end] = video
    out[slice(*grid.prompt), 0, 1] = grid.tokens
    return out


def places(grid: Grid, bands: Bands) -> Tensor:
    """(places, 2, 2): the places of a frame that a token at each place sees in every frame, two ascending runs.

    |i - j - c S| <= w for some whole c (S tokens a frame) is a distance of places around the frame's end; with one
    frame there is no such c but 0, and the band is the diagonal's.
    """
    at, half, size = torch.arange(grid.frame), bands.multi // 2, grid.frame
    low, high = at - half, at + half + 1
    if grid.frames == 1 or bands.multi >= size:
        one = torch.stack([low, high], -1).clamp(0, size) if grid.frames == 1 else torch.tensor([0, size]).expand(size, 2)
        return torch.stack([one, torch.full_like(one, size)], 1)
    wraps = (low < 0) | (high > size)
    one = torch.stack([torch.where(wraps, 0, low), torch.where(high > size, high - size, high)], -1)
    rest = torch.where(wraps, low % size, size)
    return torch.stack([one, torch.stack([rest, torch.full_like(rest, size)], -1)], 1)


def order(grid: Grid) -> Tensor:
    """(tokens,) the token at each position of the order place by place, text where it was: x[:, :, order(grid)]."""
    video = torch.arange(grid.frames * grid.frame).view(grid.frames, -1).T.flatten() + grid.start
    text = torch.arange(*grid.prompt)
    return torch.cat([text, video] if grid.words_first else [video, text])


@lru_cache(maxsize=64)
def turned(grid: Grid, bands: Bands) -> Tensor:
    """The multi-diagonal's runs in that order: (tokens, 3, 2), the text's and two of places; two where they touch."""
    text = torch.tensor(grid.prompt)
    seen = places(grid, bands) * grid.frames + grid.start  # (places, 2, 2)
    text_runs = text.expand(grid.frame, 1, 2)
    row = torch.cat([text_runs, seen] if grid.words_first else [seen, text_runs], 1)
    video = row.repeat_interleave(grid.frames, 0)
    out = torch.zeros(grid.tokens, 3, 2, dtype=torch.int64)
    out[grid.start : grid.start + len(video)] = video
    out[slice(*grid.prompt), 0, 1] = grid.tokens
    return out


def pairs(pattern: str, grid: Grid, bands: Bands) -> int:
    """Query-key pairs a head of this pattern computes; times 4 head widths, its multiplications and additions."""
    found = runs(pattern, grid, bands)
    return int((found[..., 1] - found[..., 0]).clamp(min=0).sum())


@lru_cache(maxsize=256)
def layer_plan(patterns: tuple[str, ...], grid: Grid, bands: Bands) -> KeyPlan:
    """One layer's heads as a KeyPlan in the model's own token order."""
    found = [runs(pattern, grid, bands) for pattern in patterns]
    if "multi" not in patterns:  # at most the text and one run: intervals, and no list of keys at all
        return KeyPlan(grid.tokens, grid.tokens, Rows(torch.stack([_two(x) for x in found])[None]))
    most = max(x.shape[1] for x in found)
    table = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in found])  # (heads, tokens, n, 2)
    kept = table[..., 0] < table[..., 1]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).flatten().cumsum(0)])
    starts, stops = (table[..., i][kept].int() for i in (0, 1))
    pieces = Pieces(offsets, starts, stops, (1, len(patterns), grid.tokens), 1, grid.tokens, grid.tokens)
    return KeyPlan(grid.tokens, grid.tokens, pieces=pieces)


def _two(found: Tensor) -> Tensor:
    return found if found.shape[1] == 2 else torch.nn.functional.pad(found, (0, 0, 0, 2 - found.shape[1]))


def attend_heads(
    q: Tensor, k: Tensor, v: Tensor, patterns: tuple[str, ...], grid: Grid, bands: Bands, *, scale: float | None = None,
    impl: str = "auto", fuse: bool = True,
) -> Tensor:  # fmt: skip
    """Attention with one pattern a head, q, k, v (batch, heads, tokens, width) -> the same shape.

    fuse: heads of the same pattern go through one call (the paper's head fusion), else one call a head; the outcome
    is the same. The multi-diagonal runs as a plain band on tokens put in order place by place.
    """
    if k.shape[1] != q.shape[1]:
        raise BadInput(f"sparse_vdit runs heads apart: {q.shape[1]} query heads need as many key heads, not {k.shape[1]}")
    if len(patterns) != q.shape[1] or grid.tokens != q.shape[2]:
        raise BadInput(
            f"sparse_vdit: {len(patterns)} patterns over {grid.tokens} tokens do not fit q of shape {tuple(q.shape)}"
        )
    out = torch.zeros_like(q)
    groups = [[h for h, p in enumerate(patterns) if p == name] for name in dict.fromkeys(patterns)]
    for heads in groups if fuse else [[h] for h in range(len(patterns))]:
        name = patterns[heads[0]]
        if name == "skip":
            continue
        mine = q[:, heads], k[:, heads], v[:, heads]
        if name == "multi":
            there = order(grid)
            plan = KeyPlan(grid.tokens, grid.tokens, Rows(turned(grid, bands)[None, None]))
            a, b, c = (x[:, :, there] for x in mine)
            mixed = attend(a, b, c, plan, scale=scale, impl=impl)
            out[:, heads] = mixed[:, :, there.argsort()]
        else:
            out[:, heads] = attend(*mine, layer_plan((name,), grid, bands), scale=scale, impl=impl)
    return out
