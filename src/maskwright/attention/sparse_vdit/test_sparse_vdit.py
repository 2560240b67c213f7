from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskwright.attention import AttentionSite, ModelShape, State, attend, use
from maskwright.attention.heads import HeadPlan
from maskwright.attention.sparse_vdit import SparseVDiT, profile, search
from maskwright.attention.sparse_vdit.patterns import (
    PATTERNS,
    Bands,
    Grid,
    attend_heads,
    layer_plan,
    order,
    pairs,
    runs,
    turned,
)
from maskwright.attention.sparse_vdit.plan import plan_of, read
from maskwright.attention.sparse_vdit.search import choose, measure
from maskwright.core.errors import BadInput

SMALL = Grid(3, 2, 3, words=2)
NARROW = Bands(diagonal=5, multi=3, stripe=1)
grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.booleans())
bands = st.builds(Bands, st.sampled_from([1, 3, 5, 9]), st.sampled_from([1, 3, 5, 7]), st.integers(1, 3))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, heads: int, width: int = 8) -> list[Tensor]:
    return [drawn(2, heads, tokens, width, seed=seed) for seed in range(3)]


def brute(name: str, grid: Grid, wide: Bands) -> Tensor:
    """(tokens, tokens) bool from the sheet's words."""
    size, out = grid.frame, torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    for i, j in product(range(grid.tokens), repeat=2):
        a, b = i - grid.start, j - grid.start
        text = any(not 0 <= x < grid.frames * size for x in (a, b))
        shifts = range(-grid.frames, grid.frames + 1) if grid.frames > 1 else (0,)
        out[i, j] = name != "skip" and (
            text
            or name == "full"
            or (name == "diagonal" and abs(a - b) <= wide.diagonal // 2)
            or (name == "multi" and any(abs(a - b - c * size) <= wide.multi // 2 for c in shifts))
            or (name == "stripe" and b < wide.stripe * size)
        )
    return out


class Video(nn.Module):
    """One layer apart from its projections, as a host."""

    def __init__(self, grid: Grid = SMALL, layers: int = 2, heads: int = 5) -> None:
        super().__init__()
        self.grid = (grid.frames, grid.height, grid.width, grid.words)
        self.layers = nn.ModuleList(Layer(heads, seed) for seed in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, heads: int, seed: int) -> None:
        super().__init__()
        self.heads, width = heads, 8 * heads
        self.maps = nn.ParameterList(
            drawn(width, width, seed=10 * seed + i) / width**0.5 * (1.5 if i < 2 else 1) for i in range(4)
        )
        self.attend = lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        self.causal = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x @ m).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in list(self.maps)[:3])
        return self.attend(q, k, v, self.causal).transpose(1, 2).flatten(2) @ self.maps[3]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATTERNS), grids, bands)
def test_patterns_are_the_sheets_words(name: str, grid: Grid, wide: Bands) -> None:
    want = brute(name, grid, wide)
    assert torch.equal(layer_plan((name,), grid, wide).dense()[0, 0], want)
    assert pairs(name, grid, wide) == int(want.sum())
    if name != "skip":
        assert want.diagonal().all() or (name == "stripe" and want.any(1).all())


@settings(max_examples=30, deadline=None)
@given(grids, bands)
def test_the_permuted_band_is_the_multi_diagonal(grid: Grid, wide: Bands) -> None:
    there = order(grid)
    assert torch.equal(there[there.argsort()], torch.arange(grid.tokens))
    found = turned(grid, wide)
    at = torch.arange(grid.tokens)
    keep = ((found[..., :1] <= at) & (at < found[..., 1:])).any(1)
    assert torch.equal(keep[there.argsort()][:, there.argsort()], brute("multi", grid, wide))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_attend_heads_equals_the_dense_masks(fuse: bool, first: bool) -> None:
    grid = Grid(3, 2, 3, words=2, words_first=first)
    names = ("multi", "full", "diagonal", "multi", "skip", "stripe")
    q, k, v = qkv(grid.tokens, len(names))
    out = attend_heads(q, k, v, names, grid, NARROW, impl="reference", fuse=fuse)
    keep = torch.stack([brute(name, grid, NARROW) for name in names])
    want = ((q @ k.mT) * 8**-0.5).masked_fill(~keep, -inf).softmax(-1).nan_to_num(0.0) @ v
    assert torch.allclose(out, want, atol=1e-5)
    whole = attend(q, k, v, layer_plan(names, grid, NARROW), impl="reference")
    assert torch.allclose(whole, want, atol=1e-5) and (whole[:, 4] == 0).all()


def test_fusing_heads_changes_nothing() -> None:
    names = ("multi", "full", "multi", "diagonal", "full", "diagonal")
    parts = qkv(SMALL.tokens, len(names))
    fused, apart = (attend_heads(*parts, names, SMALL, NARROW, impl="reference", fuse=fuse) for fuse in (True, False))
    assert torch.allclose(fused, apart, atol=1e-6)


def test_one_frame_makes_multi_a_diagonal_and_a_wide_diagonal_is_full() -> None:
    grid = Grid(1, 3, 4, words=2)
    wide = Bands(diagonal=5, multi=5)
    assert torch.equal(layer_plan(("multi",), grid, wide).dense(), layer_plan(("diagonal",), grid, wide).dense())
    assert layer_plan(("diagonal",), SMALL, Bands(diagonal=2 * SMALL.tokens + 1)).dense().all()


def test_a_text_key_reaches_every_row_of_every_head_that_is_not_skipped() -> None:
    q, k, v = qkv(SMALL.tokens, 5)
    plan = layer_plan(PATTERNS, SMALL, NARROW)
    before = attend(q, k, v, plan, impl="reference")
    v = v.clone()
    v[:, :, 1] += 1.0
    moved = (attend(q, k, v, plan, impl="reference") != before).any(-1).all(-1)
    assert moved.all(0).tolist() == [True, True, True, True, False]


LOSS, COST = [0.0, 0.02, 0.05, 0.04, 0.2], (1.0, 0.1, 0.2, 0.15, 0.0)


@pytest.mark.parametrize(
    "weight,epsilon,rule,want",
    [
        (0.1, inf, "argmin", "diagonal"),
        (1.0, inf, "argmin", "diagonal"),
        (3.0, inf, "argmin", "skip"),
        (3.0, 0.1, "argmin", "full"),
        (3.0, 0.1, "cheapest", "diagonal"),
        (0.0, 0.0, "argmin", "full"),
        (0.0, 0.0, "cheapest", "full"),
    ],
)
def test_the_hand_example(weight: float, epsilon: float, rule: str, want: str) -> None:
    assert PATTERNS[choose(LOSS, COST, weight, epsilon, rule)] == want  # type: ignore[arg-type]


def test_a_tie_falls_to_the_cheaper_pattern() -> None:
    assert PATTERNS[choose([0.0, 0.1, 0.1, 0.1, 0.1], COST, 0.0, inf)] == "skip"


def test_search_on_a_model() -> None:
    model, x = Video(), drawn(2, SMALL.tokens, 40)
    table = measure(model, [x], SMALL, NARROW)
    assert table.mse.shape == (2, 5, 5) and (table.mse[..., 0] == 0).all()
    assert torch.allclose(table.mse[..., 4], table.size, rtol=1e-6)  # what a skipped head loses is all it gives
    layer = model.layers[0]
    q, k, v = ((x @ m).unflatten(-1, (5, -1)).transpose(1, 2) for m in list(layer.maps)[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    band = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=brute("multi", SMALL, NARROW))
    assert torch.allclose(table.mse[0, :, 2].float(), (band - dense).square().mean((0, 2, 3)), atol=1e-6)
    assert table.cost == tuple(brute(name, SMALL, NARROW).double().mean().item() for name in PATTERNS)
    twice = measure(model, [(x,), {"x": x}], SMALL, NARROW)
    assert torch.allclose(twice.mse, table.mse, rtol=1e-9)
    assert read(table.choose(0.0, 0.0)).counts["full"] == 10 and read(table.choose(1e9)).counts["skip"] == 10
    shares = [read(table.choose(weight, relative=True)).share for weight in (0.0, 0.5, 1.0, 5.0)]
    assert shares == sorted(shares, reverse=True)


def test_full_everywhere_is_dense_and_skip_gives_nothing() -> None:
    model, x = Video(), drawn(2, SMALL.tokens, 40)
    before = model(x)
    with use(model, SparseVDiT(search(model, [x], weight=0.0, epsilon=0.0)), impl="reference"):
        assert torch.allclose(model(x), before, atol=1e-4)
    with use(model, SparseVDiT(pattern="skip"), impl="reference"):
        assert torch.equal(model(x), x)
    assert torch.equal(model(x), before)


def test_warmup_steps_are_dense() -> None:
    model, x = Video(), drawn(2, SMALL.tokens, 40)
    before = model(x)
    with use(model, SparseVDiT(pattern="diagonal", grid=SMALL, bands=NARROW, warmup=2), impl="reference") as run:
        outs = []
        for step in range(3):
            run.tell(step=step, steps=3, new_tokens=18)
            outs.append(torch.allclose(model(x), before, atol=1e-4))
    assert outs == [True, True, False]


def test_plan_file_and_other_models(tmp_path: Path) -> None:
    model, x = Video(), drawn(1, SMALL.tokens, 40)
    plan = profile(model, [x], seed=3)
    plan.save(tmp_path / "plan.json")
    saved = SparseVDiT(str(tmp_path / "plan.json"))
    assert saved.found == read(plan) and HeadPlan.load(tmp_path / "plan.json").table["mse"] == plan.table["mse"]
    assert 0 <= read(plan).share <= 1 and sum(read(plan).counts.values()) == 10
    for other in (Video(heads=4), Video(layers=3)):
        with use(other, SparseVDiT(plan)), pytest.raises(BadInput, match=r"plan is for 2 layers, 5 heads"):
            other(drawn(1, SMALL.tokens, 8 * other.layers[0].heads))
    with use(model, SparseVDiT(plan)), pytest.raises(BadInput, match="do not fit the 20 tokens"):
        model(drawn(1, SMALL.tokens + 1, 40))
    with pytest.raises(BadInput, match="not for"):
        SparseVDiT(plan, grid=Grid(1, 2, 3))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BadInput, match=r"bad\.json"):
        SparseVDiT(str(tmp_path / "bad.json"))
    with pytest.raises(BadInput, match="made for moa"):
        SparseVDiT(replace(plan, method="moa"))
    with pytest.raises(BadInput, match="frames, height"):
        SparseVDiT(replace(plan, grid={"width": 2}))


def test_bad_settings_and_sites() -> None:
    for bad in ({"pattern": "spiral"}, {"warmup": -1}):
        with pytest.raises(BadInput, match="sparse_vdit"):
            SparseVDiT(**bad)  # type: ignore[arg-type]
    for build in (lambda: Bands(diagonal=4), lambda: Bands(multi=0), lambda: Bands(stripe=0), lambda: Grid(0, 1, 1)):
        with pytest.raises(BadInput, match="sparse_vdit"):
            build()
    with pytest.raises(BadInput, match="layer 0, head 1: unknown pattern"):
        plan_of([["full", "spiral"]], SMALL, NARROW)
    with pytest.raises(BadInput, match="layers of"):
        plan_of([["full"], ["full", "skip"]], SMALL, NARROW)
    with pytest.raises(BadInput, match="key heads"):
        SparseVDiT().fits(ModelShape(2, 4, 2, 8, False))
    with pytest.raises(BadInput, match="causal"):
        SparseVDiT().fits(ModelShape(2, 4, 4, 8, True))
    q = drawn(1, 2, 9, 8)
    with pytest.raises(BadInput, match="do not fit"):
        attend_heads(q, q, q, ("full", "full"), SMALL, NARROW)
    with pytest.raises(BadInput, match="at least one calibration batch"):
        search(Video(), [])
    with pytest.raises(BadInput, match="names no grid"):
        search(nn.Linear(2, 2), [])
    with pytest.raises(BadInput, match="needed are 20 tokens"):
        search(Video(), [drawn(1, 21, 40)])
    wrong = AttentionSite(0, 1, q, q, q, 1.0, None, 0)
    with pytest.raises(BadInput, match="layer 0"):
        SparseVDiT(pattern="multi", grid=SMALL).plan(wrong, State())


def test_runs_are_ascending_and_cached() -> None:
    found = runs("multi", SMALL, NARROW)
    assert found is runs("multi", SMALL, NARROW)
    assert (found[..., 0] <= found[..., 1]).all() and (found[2:, 1:, 0] >= found[2:, :-1, 1]).all()
