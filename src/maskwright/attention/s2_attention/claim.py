"""S2-Attention's claim: shards that differ by head recall what a window, or one shard for all heads, cannot."""

import warnings

import torch

from maskwright.attention import AttentionMethod, choose, use
from maskwright.attention.s2_attention import S2Attention
from maskwright.core.method import Claim, Effect, get
from maskwright.lab.associative import Recall, RecallNet, right
from maskwright.lab.models import CharLM
from maskwright.lab.text import python_chars
from maskwright.lab.train import char_rows, char_windows, loss_of, train

BLOCK, HEADS, LENGTH = 8, 4, 128
WINDOW = 28  # tokens that are as many pairs as hetero reads (39 %), to a third of a percent
FAR = 32  # tokens back and more: out of every arm's local part
HETERO = S2Attention(block=BLOCK, local=2, stride=4)


def _density(rule: S2Attention) -> float:
    """Share of the causal pairs that a layer reads, mean over heads."""
    at = torch.arange(LENGTH) // BLOCK
    keep = rule.grid(HEADS, at, LENGTH // BLOCK).repeat_interleave(BLOCK, 2).tril()
    return float(keep.sum()) / HEADS / (LENGTH * (LENGTH + 1) / 2)


def _run(method: AttentionMethod | None, layers: int, text: bool, seed: int, scale: str) -> dict[str, float]:
    full = scale == "full"
    impl = "auto" if choose(torch.empty(1, 1, 1, 16)).name == "cpu" else "reference"  # "gather" is for long sequences
    steps, batch, width = (300, 32, 64) if full else (3, 2, 16)

    def inside(model, optimizer=None):  # type: ignore[no-untyped-def]
        # The dense arm runs through the same code, so that nothing but the mask differs.
        return use(model, S2Attention(stride=1) if method is None else method, impl=impl)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "s2_attention: .* residues")  # what the twin is there for
        task = Recall(LENGTH)
        net = RecallNet(task, layers=layers, width=width, heads=HEADS, seed=seed)
        settings = {"batch": batch, "optimizer": "adamw", "clip": 1.0, "warmup": 20, "seed": seed, "context": inside}
        train(net, task.draw(), steps=steps, lr=1e-2, **settings)  # type: ignore[arg-type]
        with inside(net):
            hit, back = right(net, task, 500 if full else 4, seed=10_000 + seed)
        figures = {"recall": float(hit.float().mean()), "far": float(hit[back >= FAR].float().mean())}
        if text:
            chars = python_chars()
            model = CharLM(len(chars.vocabulary), layers=2, width=width, heads=HEADS, context=LENGTH, seed=seed)
            settings["batch"], steps = (16, 400) if full else (2, 3)
            train(model, char_windows(chars.train, LENGTH), steps=steps, lr=5e-3, **settings)  # type: ignore[arg-type]
            with inside(model):
                figures["text_loss"] = loss_of(model, *char_rows(chars.val, LENGTH, limit=200 if full else 2), batch=50)
    return figures | ({"density": _density(method)} if isinstance(method, S2Attention) else {})


def _arm(method: AttentionMethod | None, layers: int = 1, text: bool = True):  # type: ignore[no-untyped-def]
    return lambda seed, scale: _run(method, layers, text, seed, scale)


CLAIM = Claim(
    arms={
        "dense": _arm(None),
        "window": _arm(get("sliding_window")(window=WINDOW, sink=0)),
        "homo": _arm(S2Attention(block=BLOCK, local=2, stride=4, offset=3, homo=True)),  # the offset nearest in pairs (40 %)
        "hetero": _arm(HETERO),
        "hetero_two_layers": _arm(HETERO, 2, text=False),
        "first_layer_dense": _arm(S2Attention(block=BLOCK, local=2, stride=4, dense_layers=(0,)), 2),
        # The twin turns by 2 where it must by 1: its heads read two of four shards twice.
        "half_the_shards": _arm(S2Attention(block=BLOCK, local=2, stride=4, step=2), text=False),
    },
    method="hetero",
    twin="half_the_shards",
    effects=(
        Effect("recalls beyond the window as dense, less 5 points", "hetero", "dense", "far", margin=-0.05),
        Effect("recalls 15 points more than one shard for all heads", "hetero", "homo", "far", margin=0.15),
        Effect("recalls 30 points more than a window of as many pairs", "hetero", "window", "far", margin=0.30),
        Effect("on text within 0.03 nats of dense", "hetero", "dense", "text_loss", "quality", -0.03, higher=False),
        Effect("on text no worse than the window", "hetero", "window", "text_loss", "quality", higher=False),
        Effect("a dense first layer recalls no less", "first_layer_dense", "hetero_two_layers", "far", "quality", -0.02),
    ),
    seeds=(0, 1, 2),
    paper="1.3B and 7B from scratch: on par with dense; one shard for all heads, and windows, worse",
    trains=True,
)
