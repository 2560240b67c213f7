import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskwright.attention import AttentionSite, KeyPlan, Padding, State, attend, use
from maskwright.attention.sparsed import SparseD
from maskwright.attention.sparsed.method import _best
from maskwright.attention.sparsed.scores import block_scores
from maskwright.core.errors import BadInput


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(n: int = 20, heads: int = 4, kv: int = 2, batch: int = 2, structure=None, **told: int) -> AttentionSite:
    q, k, v = drawn(batch, heads, n, 8), drawn(batch, kv, n, 8, seed=1), drawn(batch, kv, n, 8, seed=2)
    return AttentionSite(0, 2, 3 * q, k, v, 8**-0.5, structure, 0, told=told)


def run(method: SparseD, steps: int, new: int, n: int = 20) -> list[KeyPlan]:
    state = State()
    return [method.plan(site(n, step=step, steps=steps, new_tokens=new), state) for step in range(steps)]


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return self.attend(q, q, q, False).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("steps,skip,last", [(128, 0.2, 26), (10, 0.3, 4), (100, 0.29, 30), (64, 0.0, 1)])
def test_steps_up_to_t_end_are_dense(steps: int, skip: float, last: int) -> None:
    plans = run(SparseD(skip=skip, block=4, select=0.2), steps, 8)
    assert all(plan.pieces is None for plan in plans[: last + 1])
    assert all(plan is plans[last + 1] and plan.pieces is not None for plan in plans[last + 1 :])


def test_skip_1_is_never_sparse_and_select_1_keeps_all() -> None:
    assert all(plan.pieces is None for plan in run(SparseD(skip=1.0, block=4), 16, 8))
    assert run(SparseD(skip=0.0, block=4, select=1.0), 16, 8)[-1].dense().all()


def test_the_example_of_four_blocks() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert _best(scores[None], 0.5).tolist() == [[False, True, True, True]]
    one = site(16, 1, 1, 1)  # key j of one block attracts every row by its score
    level = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat_interleave(4)
    k = torch.zeros(1, 1, 16, 8)
    k[0, 0, :, 0] = level
    q = torch.zeros(1, 1, 16, 8)
    q[..., 0] = 1.0
    pulled = AttentionSite(0, 1, q, k, one.v, 1.0, None, 0)
    assert torch.allclose(block_scores(q, k, 4, 1.0)[0, 0, 0] * 4, scores)
    kept = {
        name: SparseD(select=0.5, block=4, isolated=name).blocks(pulled, 4)[0, 0, 0].tolist()
        for name in ("reference", "paper")
    }
    assert kept["reference"] == [False, True, True, True] == kept["paper"]
    kept = {
        name: SparseD(select=0.2, block=4, isolated=name).blocks(pulled, 4)[0, 0, 0].tolist()
        for name in ("reference", "paper")
    }
    assert kept["reference"] == [False, False, False, True]  # the prompt's part may be empty
    assert kept["paper"] == [False, False, True, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 33), st.integers(1, 9), st.integers(0, 3), st.booleans(), st.booleans())
def test_block_scores_are_brute_force_means(n: int, block: int, skip: int, whole: bool, padded: bool) -> None:
    first = min(skip, -(-n // block) - 1)
    q, k = drawn(2, 4, n, 8), drawn(2, 2, n, 8, seed=1)
    low = torch.tensor([0, min(n - 1, 3)])
    structure = Padding(low, torch.full((2,), n)) if padded else None
    bounds = None if structure is None else structure.bounds(n, n)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.7
    if structure is not None:
        logits = logits.masked_fill(~structure.keep(n, n), -torch.inf)
    logits[..., : first * block] = -torch.inf
    share = logits.softmax(-1).nan_to_num(0.0)
    found = block_scores(q, k, block, 0.7, bounds, first=first, whole=whole)
    many = -(-n // block)
    assert found.shape == (2, 4, many, many - first)
    for i in range(many):
        for j in range(first, many):
            tile = share[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block]
            size = block * block if whole else tile.shape[2] * tile.shape[3]
            assert torch.allclose(found[:, :, i, j - first], tile.sum((2, 3)) / size, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 7), st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.data())
def test_counts_of_every_row(n: int, block: int, select: float, data: st.DataObject) -> None:
    new = data.draw(st.integers(1, n))
    many = -(-n // block)
    first = next((i for i in range(many) if n - i * block <= new), many - 1)
    wanted, own = (min(x, int(x * select + 1e-9) + 1) for x in (many, many - first))
    for name in ("reference", "paper", "none"):
        keep = SparseD(select=select, block=block, isolated=name).blocks(site(n), new)
        prompt, generated = keep[..., :first].sum(-1), keep[..., first:].sum(-1)
        assert keep.shape == (2, 4, many, many) and (keep.sum(-1) >= 1).all()
        if name == "none":
            assert (keep.sum(-1) == wanted).all()
        else:
            assert (generated == own).all() and (prompt <= wanted).all()
        if name == "paper" and first:
            assert (prompt == min(first, int(first * select + 1e-9) + 1)).all()


def test_heads_move_with_their_masks_and_samples_do_not_mix() -> None:
    one = site(24, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    turned = AttentionSite(0, 2, one.q[:, order], one.k[:, order], one.v, one.scale, None, 0)
    method = SparseD(select=0.3, block=4)
    keep = method.blocks(one, 8)
    assert torch.equal(method.blocks(turned, 8), keep[:, order])
    single = AttentionSite(0, 2, one.q[1:], one.k[1:], one.v[1:], one.scale, None, 0)
    assert torch.equal(method.blocks(single, 8), keep[1:])
    assert not torch.equal(keep[0], keep[1]) and not torch.equal(keep[:, 0], keep[:, 1])


def test_the_reference_code_scales_by_the_number_of_heads() -> None:
    one = site(24)
    assert torch.equal(
        SparseD(parity=True, block=5)._scores(one, 0), block_scores(one.q, one.k, 5, 4**-0.5, None, whole=True)
    )


def test_masked_attention_equals_brute_force() -> None:
    one = site(22)
    plan = SparseD(select=0.3, block=4).freeze(one, 6)
    keep = SparseD(select=0.3, block=4).blocks(one, 6).repeat_interleave(4, 2)[:, :, :22].repeat_interleave(4, 3)[..., :22]
    assert torch.equal(plan.dense(), keep)
    logits = one.q @ one.k.repeat_interleave(2, 1).mT * one.scale
    want = logits.masked_fill(~keep, -torch.inf).softmax(-1) @ one.v.repeat_interleave(2, 1)
    assert torch.allclose(attend(one.q, one.k, one.v, plan, scale=one.scale, impl="reference"), want, atol=1e-5)


def test_use_reads_what_the_sampler_tells_and_resets_at_step_0() -> None:
    model, x, y = Host(), drawn(1, 16, 16), drawn(1, 16, 16, seed=5)
    with use(model, SparseD(skip=0.0, select=0.1, block=2), impl="reference") as told:
        with pytest.raises(BadInput, match=r"tell\(step="):
            model(x)
        outs = []
        for data in (x, y, x):
            for step in range(3):
                told.tell(step=step, steps=3, new_tokens=4)
                outs.append(model(data))
        told.tell(step=2, steps=4, new_tokens=4)
        with pytest.raises(BadInput, match="layer 0"):
            model(x)
        told.tell(step=2, steps=3, new_tokens=4)
        with pytest.raises(BadInput, match="now"):
            model(x[:, :14])
    assert torch.equal(outs[1], outs[0]) and not torch.allclose(outs[2], outs[0])
    assert torch.equal(outs[8], outs[2]) and torch.allclose(model(x), outs[0], atol=1e-5)


def test_a_step_jumped_over_and_numbers_that_do_not_fit() -> None:
    with pytest.raises(BadInput, match="made at step 3"):
        SparseD(skip=0.2, block=4).plan(site(step=5, steps=10, new_tokens=4), State())
    for told in (
        {"step": 3, "steps": 3, "new_tokens": 4},
        {"step": 0, "steps": 3, "new_tokens": 21},
        {"step": 0, "steps": 3},
    ):
        with pytest.raises(BadInput, match="sparsed"):
            SparseD().plan(site(**told), State())


def test_padding_on_the_left_is_never_read_and_on_the_right_refused() -> None:
    told = {"step": 3, "steps": 9, "new_tokens": 6}
    left = Padding(torch.tensor([0, 9]), torch.tensor([20, 20]))
    plan = SparseD(select=0.2, block=4).freeze(site(structure=left, **told), 6)
    assert not plan.dense()[1, ..., :9].any() and plan.dense()[0].any(-1).all()
    with pytest.raises(BadInput, match="on the left"):
        SparseD().plan(site(structure=Padding(torch.tensor([0, 0]), torch.tensor([20, 12])), **told), State())


def test_a_causal_model_is_refused() -> None:
    host = Host()
    host.forward = lambda x: host.attend(x[:, None], x[:, None], x[:, None], True)  # type: ignore[method-assign]
    with use(host, SparseD()), pytest.raises(BadInput, match="causal"):
        host(drawn(1, 4, 8))


@pytest.mark.parametrize(
    "bad", [{"skip": 1.1}, {"skip": float("nan")}, {"select": 0.0}, {"select": 1.5}, {"block": 0}, {"isolated": "both"}]
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="sparsed"):
        SparseD(**bad)  # type: ignore[arg-type]
