"""Scores that several methods of this place share: what the last queries look at, block means, and how keys are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from maskwright.attention.site import AttentionSite
from maskwright.attention.structure import Causal, Padding
from maskwright.core.errors import BadInput
from maskwright.core.select import top

_ENTRIES = 1 << 18  # attention weights made at a time by the running scores: 1 MB, so that they stay in the cache
Running = Callable[[Tensor, Tensor, int, int], None]  # (out (keys,), weights (rows, lead + keys + 1), lead, first row)


def last_attention(
    q: Tensor, k: Tensor, window: int, scale: float, *, first: Tensor | None = None, last: Tensor | None = None
) -> Tensor:
    """The attention weights of the last `window` queries under a causal mask, in float32.

    q (batch, heads, queries, width), k (batch, kv_heads, keys, width), the last query standing at the last key.
    first, last (batch,): the real keys first <= p < last of padded samples; row i is then query last - window + i.
    -> (batch, heads, w, keys) with w = min(window, queries); rows that stand before `first` are zero.
    """
    batch, heads, queries, _ = q.shape
    keys, window = k.shape[2], min(window, queries)
    stop = torch.full((batch,), keys, device=q.device) if last is None else last.to(q.device)
    at = stop[:, None] - window + torch.arange(window, device=q.device)  # (batch, w)
    row = (at - keys + queries).clamp(min=0)[:, None, :, None].expand(-1, heads, -1, q.shape[3])
    scores = (q.gather(2, row).float() * scale) @ k.float().repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
    key = torch.arange(keys, device=q.device)
    seen = key <= at[..., None]
    if first is not None:
        seen &= key >= first.to(q.device)[:, None, None]
    scores.masked_fill_(~seen[:, None], float("-inf"))
    return torch.where(seen.any(-1)[:, None, :, None], scores.softmax(-1), 0.0)


def real_span(site: AttentionSite) -> tuple[Tensor, Tensor]:
    """The real keys first <= p < last of each sample: two (batch,) int64 tensors."""
    first = torch.zeros(site.batch, dtype=torch.int64) if site.first is None else site.first.cpu().long()
    last = torch.full((site.batch,), site.keys)
    for part in [] if site.structure is None else site.structure.parts():
        if isinstance(part, Padding) and part.last.ndim == 1:
            last = torch.minimum(last, part.last.cpu().long())
    return first, last


def window_scores(site: AttentionSite, window: int, *running: Running) -> list[Tensor]:
    """Scores (batch, heads, keys) float32 over the weights of each sample's last `window` real queries.

    The weights are those of `last_attention` within the model's own mask, made a few rows at a time and never held
    together; each of `running` adds them to its own score: `column_sum`, `column_peak`, `slash_sum`.
    """
    outs = [torch.zeros(site.batch, site.heads, site.keys, device=site.q.device) for _ in running]
    for b, h, at, lead, weights in _window_rows(site, window):
        for add, out in zip(running, outs, strict=True):
            add(out[b, h], weights, lead, at)
    return outs


def column_sum(out: Tensor, weights: Tensor, lead: int, at: int) -> None:
    """Sum over the rows of what each key receives."""
    out += weights.sum(0)[lead : lead + len(out)]


def column_peak(out: Tensor, weights: Tensor, lead: int, at: int) -> None:
    """Maximum over the rows of what each key receives."""
    torch.maximum(out, weights.amax(0)[lead : lead + len(out)], out=out)


def slash_sum(out: Tensor, weights: Tensor, lead: int, at: int) -> None:
    """Sum along the diagonals: out[o] receives the weights at distance o = row - key."""
    rows, wide = weights.shape
    far = at + rows  # distances 0 .. far - 1 occur; a step down and right keeps the distance
    along = weights.as_strided((rows, far), (wide + 1, 1)).sum(0)
    out[:far] += along.flip(0)


def _window_rows(site: AttentionSite, window: int) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """(sample, head, position of the first row, lead, weights (rows, lead + keys + 1)): zeros stand around the keys."""
    parts = [] if site.structure is None else site.structure.parts()
    plain = all(isinstance(part, Causal | Padding) for part in parts)
    bounds = None if plain else site.dense().bounds()
    keys = site.keys
    for b, (low, high) in enumerate(zip(*(x.tolist() for x in real_span(site)), strict=True)):
        rows = min(window, high - low, high - site.offset)
        step = max(1, min(rows, _ENTRIES // max(keys, 1)))
        corner = torch.ones(step, step, dtype=torch.bool, device=site.q.device).triu(1)
        buffer = torch.empty(step * (step + keys), device=site.q.device)
        for h in range(site.heads):
            key = site.k[b, h // site.group].float().T  # (width, keys)
            for at in range(high - rows, high, step):
                n = min(step, high - at)
                row = slice(at - site.offset, at - site.offset + n)
                padded = buffer[: n * (n + keys)].view(n, n + keys)
                scores = padded[:, n - 1 : -1]
                torch.mm(site.q[b, h, row].float() * site.scale, key, out=scores)
                padded[:, : n - 1 + low] = float("-inf")
                padded[:, n - 1 + at + n :] = float("-inf")
                scores[:, at : at + n].masked_fill_(corner[:n, :n], float("-inf"))
                if bounds is not None:
                    mine = bounds[b % bounds.shape[0], 0, row].to(key.device)  # (rows, 2, 2)
                    place = torch.arange(keys, device=key.device)
                    seen = ((mine[:, :, :1] <= place) & (place < mine[:, :, 1:])).any(1)
                    scores.masked_fill_(~seen, float("-inf"))
                yield b, h, at, n - 1, torch.softmax(padded, -1, out=padded)


def window_rows(site: AttentionSite, window: int) -> Tensor:
    """How many rows `window_scores` summed over in each sample. (batch,) int64."""
    first, last = real_span(site)
    return torch.minimum(last - torch.maximum(first, torch.tensor(site.offset)), torch.tensor(window)).clamp(min=0)


def block_means(x: Tensor, size: int, first: Tensor, last: Tensor) -> Tensor:
    """Means of neighbouring rows, padding left out. x (batch, heads, rows, width) -> (batch, heads, blocks, width) float32.

    The last block may be ragged; it and blocks with padding are means over their real rows, blocks without any are zero.
    """
    short = -x.shape[2] % size
    at = torch.arange(x.shape[2], device=x.device)
    real = (at >= first.to(x.device)[:, None]) & (at < last.to(x.device)[:, None])  # (batch, rows)
    clean = x.float() if bool(real.all()) else torch.where(real[:, None, :, None], x.float(), 0.0)
    total = torch.nn.functional.pad(clean, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3)
    many = torch.nn.functional.pad(real.float(), (0, short)).view(x.shape[0], -1, size).sum(2)
    return total / many.clamp(min=1)[:, None, :, None]


def force(score: Tensor, keep: Tensor, drop: Tensor) -> Tensor:
    """+inf where `keep`, -inf where `drop` (which wins); score (batch, heads, keys), the others broadcast to it."""
    return score.masked_fill(keep, float("inf")).masked_fill(drop, float("-inf"))


def best(who: str, site: AttentionSite, score: Tensor, counts: Tensor) -> Tensor:
    """The `counts` best units of each row: exact, ties to the lower index. score (..., units), counts (...) -> bool.

    Raises BadInput naming the method and the layer where a score is NaN, which only queries or keys that are not finite
    give.
    """
    try:
        return top(score.flatten(0, -2), counts.expand(score.shape[:-1]).flatten(), tuple(score.shape)).view(score.shape)
    except BadInput as error:
        about = f"q {tuple(site.q.shape)}, k {tuple(site.k.shape)}"
        raise BadInput(f"{who}, layer {site.layer}: {about}: {error} (are q and k finite?)") from None


def best_few(who: str, site: AttentionSite, score: Tensor, count: int) -> Tensor:
    """The same choice as `best` with one count, as ascending indices. score (..., units) float32 -> (..., count) int64.

    Fast for few rows: numpy's calls cost less than torch's, and where nothing ties with the best unit left out, the
    border between the two is all there is to find.
    """
    units = score.shape[-1]
    if count < units:
        value, at = score.numpy(force=True), units - count - 1
        border = np.partition(value, at, axis=-1)[..., at : at + 1]
        index = np.flatnonzero(value > border)  # `count` a row; fewer with a tie or a NaN, which is above nothing
        if len(index) * units == count * value.size:
            return torch.from_numpy(index % units).view(*score.shape[:-1], count).to(score.device)
    return best(who, site, score, torch.tensor(count)).nonzero()[:, -1].view(*score.shape[:-1], count)
