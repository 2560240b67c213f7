"""Every row's best keys, and blocks read whole or not at all, against counting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.attention.dma.running import running_top, smoothed
from maskwright.attention.dma.test_dma import by_hand
from maskwright.core.select import generator


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 90), st.integers(0, 40), st.integers(1, 4), st.integers(0, 99))
def test_running_top_is_every_rows_own_sort(queries, window, before, kinds, seed):
    rank = torch.randint(kinds, (1, 2, queries + before), generator=generator(seed)).float()  # many ties
    keep = running_top(rank, window, queries).check().keep()
    assert torch.equal(keep, by_hand(rank, window)[:, :, before:])
    assert torch.equal(keep.sum(-1)[0, 0], (torch.arange(queries) + before + 1).clamp(max=window))


def test_smoothing():
    rows = torch.tensor([7])
    given_ = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]]).bool()[:, None]
    kept = smoothed(given_, rows, 4)
    assert kept[0, 0].nonzero().flatten().tolist() == [7]  # no block has more than half: the row reads itself
    assert kept[1, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    ragged = smoothed(torch.tensor([[0, 0, 0, 0, 1]]).bool(), torch.tensor([4]), 4)
    assert ragged[0].nonzero().flatten().tolist() == [4]  # the last block is one key long
    rank = torch.rand(2, 2, 70, generator=generator(1))
    want = smoothed(by_hand(rank, 20), torch.arange(70), 4)
    assert torch.equal(running_top(rank, 20, 70, 4).check().keep(), want)
