from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskwright.attention import AttentionSite, Causal, Padding, State, Window, attend, use
from maskwright.attention.sliding_window import SlidingWindow
from maskwright.core.errors import BadInput
from maskwright.lab.decoder import llama


def site(n: int = 40, rows: int | None = None, causal: bool = True, first: Tensor | None = None) -> AttentionSite:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (4, 2, 2))
    rows = n if rows is None else rows
    seen = Causal() if causal else None
    if first is not None:
        real = Padding(first, torch.full_like(first, n))
        seen = real if seen is None else seen & real
    return AttentionSite(0, 1, q[:, :, -rows:], k, v, 8**-0.5, seen, n - rows, begins=rows == n, first=first)


@pytest.mark.parametrize("rows", [40, 7, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [None, (0, 9), (3, 38)])
def test_mask_is_window_and_sinks(rows: int, causal: bool, first: tuple[int, int] | None) -> None:
    here = site(rows=rows, causal=causal, first=None if first is None else torch.tensor(first))
    seen = SlidingWindow(window=5, sink=3).plan(here, State()).dense().expand(2, 1, rows, 40)
    for b in range(2):
        low = 0 if first is None else first[b]
        for r in range(rows):
            i = 40 - rows + r
            want = [
                j >= low and (j <= i or not causal) and (abs(i - j) < 5 or j < low + 3) for j in range(40)
            ]  # fmt: skip
            assert seen[b, 0, r].tolist() == want


def test_a_window_beyond_the_prompt_is_dense() -> None:
    for causal in (True, False):
        here = site(causal=causal)
        plan = SlidingWindow(window=40, sink=0).plan(here, State())
        torch.testing.assert_close(attend(here.q, here.k, here.v, plan), attend(here.q, here.k, here.v, here.dense()))


def test_no_sink_is_the_window_alone_and_an_evicted_cache_is_read_whole() -> None:
    here = site()
    assert torch.equal(SlidingWindow(5, 0).plan(here, State()).dense(), (Causal() & Window(5)).keep(40, 40))
    left = AttentionSite(0, 1, here.q[:, :, -1:], here.k, here.v, 1.0, Causal(), 39, begins=False, evicted=True)
    assert SlidingWindow(5, 0).plan(left, State()).dense().all()


def test_what_is_refused() -> None:
    for bad in ((0, 4), (4, -1)):
        with pytest.raises(BadInput, match="sliding_window"):
            SlidingWindow(*bad)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = lambda q, k, v, causal: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return self.attend(q, q, q, False).transpose(1, 2).flatten(2)


def test_a_bidirectional_module_sees_both_sides() -> None:
    host, x = Host(), torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))
    dense = host(x)
    with use(host, SlidingWindow(window=30, sink=0)):
        torch.testing.assert_close(host(x), dense, atol=1e-5, rtol=1e-4)
    with use(host, SlidingWindow(window=3, sink=1)):
        narrow, far = host(x), x.clone()
        far[0, 20] += 1.0
        changed = (host(far) != narrow).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [18, 19, 20, 21, 22]


@torch.no_grad()
def test_generate_step_by_step_is_one_masked_pass() -> None:
    model = llama(64, layers=2, width=32, heads=4, kv_heads=2, hidden=32)
    words = torch.randint(2, 64, (2, 60), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(words)
    real[1, :25] = 0
    dense = model.generate(words, attention_mask=real, max_new_tokens=6)
    with use(model, SlidingWindow(100, 0)):
        assert torch.equal(model.generate(words, attention_mask=real, max_new_tokens=6), dense)
    with use(model, SlidingWindow(8, 2)):
        grown = model.generate(words, attention_mask=real, max_new_tokens=6)
        longer = nn.functional.pad(real, (0, 6), value=1)
        at = (longer.cumsum(1) - 1).clamp(min=0)
        logits = model(grown, attention_mask=longer, position_ids=at).logits
        assert torch.equal(logits[:, 59:-1].argmax(-1), grown[:, 60:])
