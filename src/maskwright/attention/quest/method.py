"""Quest: at every decoded token, read only the pages of the cache whose bound on the scores is highest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from maskwright.attention import AttentionMethod, AttentionSite, KeyPlan, Pieces, State
from maskwright.attention.scores import best, best_few
from maskwright.core.errors import BadInput


@final
@dataclass(frozen=True)
class Quest(AttentionMethod):
    """Read `token_budget` keys of the cache and the current page at every decoded token (arXiv 2406.10774).

    A page of `page_size` keys is known by the elementwise minimum and maximum of its keys, which bound the score of any
    key in it: u = sum_c max(q_c min_c, q_c max_c). The best token_budget / page_size pages before the current one are
    read. With `share_pages` the bounds are summed over the query heads of a group, which then read the same pages. The
    whole cache is kept. Prompts, and calls of more than one query, are dense, as is a cache no longer than the budget.
    Raises BadInput when the budget is not a positive multiple of the page, and for bounds that are not finite.
    """

    token_budget: int = 512
    page_size: int = 16
    share_pages: bool = True

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.token_budget < 1 or self.token_budget % self.page_size:
            raise BadInput(
                f"quest: token_budget is a positive multiple of page_size, got {self.token_budget} and {self.page_size}"
            )

    @torch.no_grad()
    def plan(self, site: AttentionSite, state: State) -> KeyPlan:
        size, current = self.page_size, (site.keys - 1) // self.page_size
        if site.begins:
            state["prompt"] = site.keys
        elif state.get("known", 0) > site.offset:
            # Keys were cut off, or moved in a sliding cache: the table is no longer theirs.
            state["known"] = 0
        begin = None if site.first is None else site.first.cpu() // size  # the page of each sample's first key
        many = current if begin is None else current - int(begin.min())
        if site.begins or site.evicted or site.queries > 1 or many * size <= self.token_budget:
            return site.dense()
        bounds = self._bounds(site, state)[..., : current + 1]  # (batch, kv_heads, 2 width, pages)
        q = site.q.float().reshape(site.batch, site.kv_heads, site.group, -1)
        both = torch.cat([q, -q], -1).relu_()  # max(q a, q b) = relu(q) max(a, b) + relu(-q) max(-a, -b)
        both = both.sum(2, keepdim=True) if self.share_pages and site.group > 1 else both
        score = (both @ bounds).flatten(1, 2)  # (batch, kv_heads | heads, pages)
        score[..., current] = float("inf")
        most = self.token_budget // size
        if begin is None:
            pieces = _pages(best_few("quest", site, score, most + 1), size, site.keys)
        else:
            score = score.masked_fill(torch.arange(current + 1) < begin[:, None, None], float("-inf"))
            keep = best("quest", site, score, (current - begin).clamp(max=most)[:, None] + 1)
            pieces = Pieces.from_blocks(keep[:, :, None], 1, size, 1, site.keys)
        return KeyPlan(1, site.keys, site.structure, pieces, offset=site.offset)

    def _bounds(self, site: AttentionSite, state: State) -> Tensor:
        """[max, -min] of every whole page, (batch, kv_heads, 2 width, pages with room); new pages alone are computed."""
        size, pages = self.page_size, site.keys // self.page_size
        table: Tensor | None = state.get("bounds")
        known: int = state.get("known", 0)
        if table is None or table.shape[:2] != site.k.shape[:2]:
            known = 0
        # A beam search exchanges the samples of a prompt behind it: with a batch, all that was decoded is read again.
        start = (min(known, state.get("prompt", 0)) if site.batch > 1 else known) // size
        frozen = table is not None and table.is_inference() and not torch.is_inference_mode_enabled()
        if table is None or known == 0 or table.shape[3] <= pages or frozen:
            room = site.k.new_empty(*site.k.shape[:2], 2 * site.k.shape[3], pages + pages // 8 + 8, dtype=torch.float32)
            if table is not None and start:
                room[..., :start] = table[..., :start]
            table = state["bounds"] = room
        if start < pages:
            new = site.k[:, :, start * size : pages * size]
            table[..., start:pages] = page_bounds(new, size, site.first, start * size).mT
        state["known"] = site.keys
        return table


def page_bounds(k: Tensor, size: int, first: Tensor | None = None, at: int = 0) -> Tensor:
    """[max, -min] over each `size` keys, padding left out. k (batch, kv_heads, keys, width) -> (.., pages, 2 width) float32.

    `size` divides the keys. Keys before `first` (batch,), counted from `at` in front of k, are padding; pages of nothing
    else are zero.
    """
    high = low = k.float().unflatten(2, (-1, size))  # (batch, kv_heads, pages, size, width)
    if first is not None and int(first.max()) > at:
        gone = (torch.arange(at, at + k.shape[2], device=k.device) < first.to(k.device)[:, None]).view(
            len(k), 1, -1, size, 1
        )
        high, low = high.masked_fill(gone, float("-inf")), low.masked_fill(gone, float("inf"))
    found = torch.cat([high.amax(3), -low.amin(3)], -1)
    return found if first is None else found.masked_fill(found.isinf(), 0.0)


def _pages(pages: Tensor, size: int, keys: int) -> Pieces:
    """Lists of ascending pages (batch, lists, n) for one row. Neighbours stay apart: joining costs more than it saves."""
    starts = pages.flatten().int().mul_(size)
    offsets = _offsets(pages.shape[0] * pages.shape[1], pages.shape[2])
    return Pieces(offsets, starts, (starts + size).clamp_(max=keys), (pages.shape[0], pages.shape[1], 1), 1, 1, keys)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what one request made serves the next one, which may ask for gradients
def _offsets(lists: int, pages: int) -> Tensor:
    return torch.arange(lists + 1) * pages
