from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.attention import AttentionSite, Causal, Padding, State, attend, use
from maskwright.attention.block_sparse import BlockSparse
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama


def site(n: int = 64, heads: int = 4, kv: int = 2, first: Tensor | None = None, seed: int = 0) -> AttentionSite:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (heads, kv, kv))
    seen = Causal() if first is None else Causal() & Padding(first, torch.full_like(first, n))
    return AttentionSite(0, 1, q, k, v, 8**-0.5, seen, 0, first=first)


def grid(method: BlockSparse, here: AttentionSite) -> Tensor:
    pieces = method.plan(here, State()).pieces
    assert pieces is not None and pieces.rows == method.chunk_size
    return pieces.check().keep()[..., :: method.chunk_size]  # one key of each block


def brute(here: AttentionSite, b: int, h: int, size: int, most: int) -> list[list[int]]:
    """Blocks kept by each row block, in plain loops over real rows."""
    low, n = 0 if here.first is None else int(here.first[b]), here.keys
    q, k = here.q[b, h], here.k[b, h // here.group]
    rows = []
    for m in range(-(-n // size)):
        if (m + 1) * size <= low:
            rows.append([])
            continue
        pooled = q[max(m * size, low) : (m + 1) * size].mean(0)
        worth = {}
        for j in range(low // size, m + 1):
            forced = j in (m, m - 1, low // size)
            worth[j] = torch.inf if forced else float(pooled @ k[max(j * size, low) : (j + 1) * size].mean(0))
        rows.append(sorted(sorted(worth, key=lambda j: (-worth[j], j))[:most]))
    return rows


@settings(max_examples=20, deadline=None)
@given(st.integers(33, 90), st.sampled_from([None, (0, 5), (16, 31)]), st.integers(3, 5), st.integers(0, 50))
def test_blocks_are_those_of_the_loops(n: int, first: tuple[int, int] | None, most: int, seed: int) -> None:
    here = site(n, first=None if first is None else torch.tensor(first), seed=seed)
    method = BlockSparse(8, most)
    if n <= 8 * most:
        return
    kept = grid(method, here)
    for b in range(2):
        for h in range(4):
            assert [row.nonzero().flatten().tolist() for row in kept[b, h]] == brute(here, b, h, 8, most)


def test_eight_blocks_keep_21_of_36() -> None:
    kept = grid(BlockSparse(8, 3), site(64))
    assert kept.sum((-1, -2)).eq(6 + 5 * 3).all()
    for m in range(8):
        assert kept[:, :, m, sorted({0, max(m - 1, 0), m})].all()


def test_enough_blocks_are_dense_to_the_bit() -> None:
    here = site(60)
    plan = BlockSparse(8, 8).plan(here, State())
    assert plan.pieces is None
    assert torch.equal(attend(here.q, here.k, here.v, plan), attend(here.q, here.k, here.v, here.dense()))
    seen = BlockSparse(8, 7).plan(site(57), State()).dense()
    assert seen[..., :56, :].sum() == seen.shape[0] * seen.shape[1] * 56 * 57 // 2


@pytest.mark.parametrize("n", [1, 5])
def test_short_prompts(n: int) -> None:
    assert BlockSparse().plan(site(n), State()).pieces is None


def test_the_mean_of_a_ragged_block_is_over_its_real_rows() -> None:
    n = 8 * 8 + 1  # one row in the last block: zero padding would shrink its pooled query, not turn it
    here = site(n)
    q = here.q.clone()
    q[:, :, 64] *= 100.0
    k = here.k.clone()
    more = AttentionSite(0, 1, q, k, here.v, here.scale, Causal(), 0)
    assert torch.equal(grid(BlockSparse(8, 4), more)[:, :, -1], grid(BlockSparse(8, 4), here)[:, :, -1])


def test_one_query_head_a_key_head_takes_the_same_path() -> None:
    here = site()
    k, v = (x.repeat_interleave(2, 1) for x in (here.k, here.v))
    apart = AttentionSite(0, 1, here.q, k, v, here.scale, Causal(), 0)
    assert torch.equal(grid(BlockSparse(8, 3), here), grid(BlockSparse(8, 3), apart))


def test_equal_products_keep_the_lower_blocks() -> None:
    here = site()
    flat = AttentionSite(0, 1, torch.zeros_like(here.q), here.k, here.v, here.scale, Causal(), 0)
    assert grid(BlockSparse(8, 4), flat)[0, 0, 7].nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_later_calls_are_dense_and_bad_settings_refused() -> None:
    here = site()
    later = AttentionSite(0, 1, here.q[:, :, -40:], here.k, here.v, here.scale, Causal(), 24, begins=False)
    assert BlockSparse(8, 3).plan(later, State()).pieces is None
    for bad in ((0, 3), (8, 2)):
        with pytest.raises(BadInput, match="block_sparse"):
            BlockSparse(*bad)
    here.q[0, 0, 50, 0] = torch.nan
    with pytest.raises(BadInput, match="block_sparse, layer 0"):
        BlockSparse(8, 3).plan(here, State())


@torch.no_grad()
def test_in_a_model_with_padding() -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    words = torch.randint(2, 64, (2, 90), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(words)
    real[1, :25] = 0
    dense = model.generate(words, attention_mask=real, max_new_tokens=5)
    with use(model, BlockSparse(8, 12)):
        assert torch.equal(model.generate(words, attention_mask=real, max_new_tokens=5), dense)
    with use(model, BlockSparse(8, 3), record=True) as run:
        logits = model(words, attention_mask=real).logits
        alone = model(words[:1]).logits
    torch.testing.assert_close(logits[:1], alone)
    assert all(float(record.kept.mean()) < 0.5 * record.allowed for record in run.records)
