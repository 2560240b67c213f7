"""The frontier at small size: two trained recall models, prompts of 512 characters, every policy on three task families.

Blocks, pages, sinks and local keys are scaled down with the prompt, or no policy could reach a density of 0.1. Tiles and
forced distances of 64 do not scale: at 512 characters vertical-slash reads at least 35% of all pairs and FlexPrefill,
which keeps 64 columns too, 59%; the two are held against rivals at 60%. The sheet's needle is the key-value family.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

from maskwright.attention import AttentionMethod, use
from maskwright.attention.sparse_frontier import Policy, Size, SparseFrontier, Table, equal_density
from maskwright.attention.sparse_frontier.baselines import Chosen, Negated, Recent, row_keys
from maskwright.core.method import Claim, Effect, get
from maskwright.lab.ask import correct
from maskwright.lab.decoder import llama
from maskwright.lab.made import made
from maskwright.lab.recall import FAMILIES, key_value

DENSITIES, CHUNK, PAGE, SINKS, LOCAL, WINDOW = (0.5, 0.3, 0.1, 0.05), 4, 8, 4, 8, 32
_SHORT = 120  # characters of a smoke run's prompts
Figures = dict[str, float]
Make = Callable[[float, int, Any, Tensor], AttentionMethod]  # (density, length, model, probe)


def _sliding(d: float, n: int, *_: Any) -> AttentionMethod:
    return get("sliding_window")(window=max(1, row_keys(d, n) - SINKS), sink=SINKS)  # type: ignore[no-any-return]


def _blocks(d: float, n: int, *_: Any) -> AttentionMethod:
    return get("block_sparse")(chunk_size=CHUNK, top_chunks=max(3, round(row_keys(d, n) / CHUNK)))  # type: ignore[no-any-return]


def _snap(slug: str, d: float, n: int, *_: Any) -> AttentionMethod:
    return get(slug)(capacity=max(LOCAL + SINKS + 1, round(d * n)), window=WINDOW, kernel=7, local=LOCAL, prefix=SINKS)  # type: ignore[no-any-return]


def _quest(d: float, n: int, *_: Any) -> AttentionMethod:
    # The current page is read on top of the budget.
    return get("quest")(token_budget=PAGE * max(1, round(d * n / PAGE) - 1), page_size=PAGE)  # type: ignore[no-any-return]


def _fitted(sizes: list[AttentionMethod], d: float, n: int, model: Any, probe: Tensor) -> AttentionMethod:
    """The greatest of the rising `sizes` whose kept share of the probe is at most the density, or the first."""
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        with use(model, sizes[middle], record=True) as run:
            model(input_ids=probe)
        share = sum(float(r.kept.sum()) for r in run.records) / sum(r.allowed * len(r.kept) for r in run.records)
        low, high = (middle, high) if share <= d else (low, middle)
    return sizes[low]


def _columns(d: float, n: int, model: Any, probe: Tensor) -> AttentionMethod:
    sizes = [get("vertical_slash")(vertical_size=v, slash_size=64, approximation_size=WINDOW) for v in range(4, n + 1, 4)]
    return _fitted(sizes, d, n, model, probe)


def _flex(d: float, n: int, model: Any, probe: Tensor) -> AttentionMethod:
    sizes = [get("flexprefill")(alpha=a / 50, min_budget=64, approximation_size=WINDOW) for a in range(50)]
    return _fitted(sizes, d, n, model, probe)


@cache
def _model(name: str, seed: int, scale: str) -> Any:
    return made(name, seed) if scale == "full" else llama(103, width=32, heads=2, kv_heads=1, hidden=32, layers=1, seed=seed)


@cache
def _tasks(seed: int, scale: str) -> tuple[dict[str, Any], Tensor]:
    length, count = (512, 64) if scale == "full" else (_SHORT, 1)
    tasks = {name: make(length, count, seed=100 + seed) for name, make in FAMILIES.items()}
    asks = {name: (lambda model, way, task=task: correct(model, task, way)) for name, task in tasks.items()}
    return asks, key_value(length, 1, seed=900 + seed).prompt


_DENSE: dict[tuple[str, int, str], dict[str, Any]] = {}


def _sweep(
    name: str, policy: Callable[[Any, Tensor], Policy], densities: tuple[float, ...], seed: int, scale: str
) -> tuple[SparseFrontier, Table]:
    model, (tasks, probe) = _model(name, seed, scale), _tasks(seed, scale)
    frontier = SparseFrontier(densities=densities)
    known = _DENSE.setdefault((name, seed, scale), {})
    table = frontier.run(model, tasks, {"it": policy(model, probe)}, probe, dense=known)
    known |= table.dense
    return frontier, table


def _arm(
    make: Make,
    way: str = "prefill",
    unit: Any = "none",
    block: int = CHUNK,
    some: tuple[float, ...] = DENSITIES,
    brief: tuple[float, ...] = (0.1,),
) -> Callable[[int, str], Figures]:
    def run(seed: int, scale: str) -> Figures:
        length = 512 if scale == "full" else _SHORT
        densities = some if scale == "full" else brief

        def policy(model: Any, probe: Tensor) -> Policy:
            return Policy(lambda d: make(d, length, model, probe), way, unit, WINDOW, block)

        frontier, table = _sweep("recall_lm", policy, densities, seed, scale)
        found: Figures = {"guaranteed": frontier.guarantee(table, "it").density, "rise": 0.0}
        last = table.dense[way].mean
        for d in densities:
            point, (mean, worst) = table.points["it", d], table.drops("it", d)
            found |= {f"{task}_{d:g}": float(scores.mean()) for task, scores in point.scores.items()}
            found |= {f"mean_{d:g}": point.mean, f"drop_{d:g}": mean, f"worst_drop_{d:g}": worst, f"gap_{d:g}": worst - mean}
            found |= {f"kept_{d:g}": point.kept / point.allowed, f"mflops_{d:g}": point.flops / 1e6}
            found |= {
                f"read_{d:g}": point.read / table.dense[way].read,
                f"stored_{d:g}": point.stored / table.dense[way].stored,
            }
            found["rise"], last = max(found["rise"], point.mean - last), point.mean
        return found

    return run


def _dense(name: str) -> Callable[[int, str], Figures]:
    """A model without masks, and where isoFLOPS can weigh the two against each other at all."""

    def run(seed: int, scale: str) -> Figures:
        _, table = _sweep(name, lambda model, probe: Policy(partial(_sliding, n=512)), (0.5,), seed, scale)
        point = table.dense["prefill"]
        found = {f"{task}_{d:g}": float(s.mean()) for task, s in point.scores.items() for d in DENSITIES}
        large, small = (_size(_model(n, seed, scale)) for n in ("recall_lm", "recall_lm_small"))
        for length in (512, 1 << 13, 1 << 17):  # the density at which the large model costs what the small one does dense
            found[f"equal_density_{length}"] = equal_density(large, small, length) or 0.0
        return found | {"mean": point.mean, "mflops": point.flops / 1e6, "gap_0.1": 0.0, "rise": 0.0}

    return run


def _size(model: Any) -> Size:
    told, table = model.config, model.get_input_embeddings().weight.numel()
    count = sum(p.numel() for p in model.parameters()) - table
    return Size(count, told.num_hidden_layers, told.num_attention_heads, told.head_dim)


def _chance(d: float, n: int, *_: Any) -> AttentionMethod:
    return Chosen(row_keys(d, n), False, block=CHUNK)


def _decoded(oracle: bool) -> Make:
    return lambda d, n, *_: Chosen(round(d * n), oracle, prompt=False, block=PAGE)


def _beats(
    arm: str, rivals: tuple[str, ...], density: str, task: str = "key_value", margin: float = 0.1, kind: Any = "mechanism"
) -> list[Effect]:
    return [
        Effect(f"{arm} finds more than {rival} at density {density}: {task}", arm, rival, f"{task}_{density}", kind, margin)
        for rival in rivals
    ]


PREFILL, DECODE = ("random", "sinks_local"), ("random_decode", "sinks_local_decode")
CLAIM = Claim(
    arms={
        "dense": _dense("recall_lm"),
        "dense_small": _dense("recall_lm_small"),
        "random": _arm(_chance, some=(0.6, 0.3, 0.1), brief=(0.6, 0.1)),
        "sinks_local": _arm(_sliding, some=(0.6, 0.3, 0.1), brief=(0.6, 0.1)),
        "oracle": _arm(lambda d, n, *_: Chosen(row_keys(d, n)), some=(0.1,)),
        "block_sparse": _arm(_blocks, unit="pooled"),
        "vertical_slash": _arm(_columns, unit="window", some=(0.6,), brief=(0.6,)),
        "flexprefill": _arm(_flex, unit="window", some=(0.6,), brief=(0.6,)),
        "random_decode": _arm(_decoded(False), "decode", some=(0.1,)),
        "sinks_local_decode": _arm(lambda d, n, *_: Recent(round(d * n), SINKS), "decode", some=(0.1,)),
        "oracle_decode": _arm(_decoded(True), "decode", some=(0.1,)),
        "snapkv": _arm(partial(_snap, "snapkv"), "decode", "window"),
        "ada_snapkv": _arm(partial(_snap, "ada_snapkv"), "decode", "window"),
        "quest": _arm(_quest, "decode", "pages", PAGE),
        "quest_negated": _arm(lambda d, n, *_: Negated(_quest(d, n)), "decode", "pages", PAGE, (0.1,)),
        "snapkv_late": _arm(partial(_snap, "snapkv"), "late", "window", some=(0.1,)),
        "quest_late": _arm(_quest, "late", "pages", PAGE, (0.1,)),
    },
    method="quest",
    twin="quest_negated",
    effects=(
        *_beats("quest", DECODE, "0.1"),
        *_beats("snapkv", DECODE, "0.1"),
        *_beats("ada_snapkv", DECODE, "0.1"),
        *_beats("block_sparse", PREFILL, "0.1"),
        *_beats("vertical_slash", PREFILL, "0.6"),
        *_beats("flexprefill", PREFILL, "0.6"),
        *_beats("quest_late", ("snapkv_late",), "0.1", margin=0.0),
        *_beats("snapkv", ("quest",), "0.1", margin=-0.1, kind="quality"),
        *_beats("quest", DECODE, "0.1", "needle", kind="quality"),
        *_beats("snapkv", DECODE, "0.1", "needle", kind="quality"),
        *_beats("block_sparse", PREFILL, "0.1", "needle", kind="quality"),
        *_beats("quest", DECODE, "0.1", "tracking", kind="quality"),
        *_beats("snapkv", DECODE, "0.1", "tracking", kind="quality"),
        *(
            e
            for arm in ("quest", "snapkv", "ada_snapkv")
            for e in _beats("oracle_decode", (arm,), "0.1", "mean", -0.05, "quality")
        ),
        *_beats("oracle", ("block_sparse",), "0.1", "mean", -0.05, "quality"),
        Effect("accuracy does not rise as quest gets sparser", "quest", "dense", "rise", "quality", -0.05, higher=False),
        Effect(
            "accuracy does not rise as block_sparse does", "block_sparse", "dense", "rise", "quality", -0.05, higher=False
        ),
        *(
            Effect(f"{arm}'s worst task pays more than the mean", arm, "dense", "gap_0.1", "quality")
            for arm in ("quest", "snapkv", "block_sparse")
        ),
    ),
    seeds=(0, 1, 2),
    paper="Decoding stands up to 20x compression, prefill 5-10x; even 5x costs some task significantly",
    needs=("lab:recall_lm", "lab:recall_lm_small"),
)
