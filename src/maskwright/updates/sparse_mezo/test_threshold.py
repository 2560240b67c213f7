"""The threshold found in pieces keeps what `select` keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskwright.core.pattern import Unstructured
from maskwright.core.select import generator, select
from maskwright.updates.sparse_mezo import sites
from maskwright.updates.sparse_mezo.threshold import CHUNK, threshold


@pytest.mark.parametrize("kind", ["small", "large"])
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_the_threshold_is_select_whatever_the_ties(kind, data):
    total = data.draw(st.integers(2, 60))
    values = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 0.50000006, 1.0, 7.5]), min_size=total, max_size=total))
    )
    count = data.draw(st.integers(1, total - 1))
    found = threshold(lambda start, stop: values[start:stop], total, count, kind == "large")
    want = select(values if kind == "large" else -values, Unstructured(), count).keep
    assert torch.equal(found.keep(values, 0), want)
    cut = data.draw(st.integers(0, total))
    assert torch.equal(torch.cat([found.keep(values[:cut], 0), found.keep(values[cut:], cut)]), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["small", "large", "random"])
def test_exact_counts_over_many_pieces(kind, dtype):
    module = nn.Linear(500, 300, bias=False, dtype=dtype)  # 150,000 entries: three pieces
    assert module.weight.numel() > 2 * CHUNK
    with torch.no_grad():
        module.weight.copy_(torch.randn(300, 500, generator=generator(1), dtype=torch.float64))
    (site,) = sites.find(module, kind, 0.3, "full", ())
    site.settle(0)
    assert site.kept == site.mask().count == 45_000
    if kind != "random":
        score = module.weight.detach().abs() * (1 if kind == "large" else -1)
        assert torch.equal(site.mask().keep, select(score, Unstructured(), 45_000).keep)
