"""What `attend` found: figures with their errors, paired with dense, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maskwright.cli.attended import Counts
from maskwright.models.evaluate import Loss
from maskwright.weights.speed import median

ENOUGH, NEAR, WORSE = 0.7, 0.05, 1.05  # dense answers this share at least; points of retrieval; times the perplexity
Pieces = dict[str, list[dict[str, Any]]]  # "needles" and "prose" -> a piece a context


def figures(pieces: Pieces, dense: Pieces) -> dict[str, Any]:
    """One way's figures, and its paired differences from `dense` over the same contexts."""
    found: dict[str, Any] = {"first_token": paced(_prefills(pieces), _prefills(dense))}
    asked = pieces["needles"]
    if asked:
        shares = [sum(p["right"]) / len(p["right"]) for p in asked]
        theirs = [sum(p["right"]) / len(p["right"]) for p in dense["needles"]]
        found["retrieval"] = {
            **mean_of(shares), "right": sum(sum(p["right"]) for p in asked), "of": sum(len(p["right"]) for p in asked),
            "difference": mean_of([a - b for a, b in zip(shares, theirs, strict=True)]),
        }  # fmt: skip
        found["question"] = paced([median(p["first"]) for p in asked], [median(p["first"]) for p in dense["needles"]])
    if pieces["prose"]:
        for name, key in (("prefilled", "loss"), ("decoded", "tail_loss")):
            mine, other = (Loss(tuple(p[key] for p in each["prose"])) for each in (pieces, dense))
            found[name] = {**mine.figures(), "difference": other.paired(mine)}
        found["decode"] = paced([median(p["steps"]) for p in pieces["prose"]], [median(p["steps"]) for p in dense["prose"]])
    every = [p["stored"] for p in (*asked, *pieces["prose"])]
    found["stored"] = sum(every) / len(every)
    return found


def _prefills(pieces: Pieces) -> list[float]:
    return [p["prefill"] for p in (*pieces["needles"], *pieces["prose"])]


def mean_of(values: Sequence[float]) -> dict[str, float]:
    loss = Loss(tuple(values))
    return {"value": loss.mean, "stderr": loss.stderr}


def paced(mine: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Seconds: median and quartiles, and those of dense over this, context by context."""
    ratios = [b / a for a, b in zip(mine, dense, strict=True)]
    return {"seconds": _quartiles(mine), "ratio": _quartiles(ratios), "turns": len(mine)}


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": median(ordered), "low": ordered[len(ordered) // 4], "high": ordered[3 * len(ordered) // 4]}


def verdict(found: dict[str, Any], dense: dict[str, Any], masked: bool = True) -> dict[str, Any]:
    """{"gain": whether anything is better and quality holds, "text": one sentence}.

    Faster means faster in three quarters of the turns; retrieval holds within 5 points of dense, perplexity within 5%.
    masked: whether the method masks the prefill; a faster dense prefill is the engine's doing, and no gain of the method.
    """
    gains: list[str] = []
    plain: list[str] = []
    for name, key in (("prefill", "first_token"), ("decoding", "decode")):
        if key in found:
            ratio, own = found[key]["ratio"], masked or key != "first_token"
            line = f"{name} {ratio['median']:.2f} x dense's speed"
            if not own:
                line += " (it is dense, by another kernel)"
            elif ratio["low"] <= 1 < ratio["median"]:
                line += " (not in three of four turns)"
            (gains if ratio["low"] > 1 and own else plain).append(line)
    cache = found["stored"] / dense["stored"]
    (gains if cache < 0.99 else plain).append(f"cache {1 / cache:.1f} x smaller" if cache < 0.99 else "cache as large")
    losses, held = _quality(found, dense)
    if not gains:
        text = f"No gain here: {', '.join([*plain, *losses])}."
    elif losses:
        text = f"No gain here: {', '.join(gains)}, but {' and '.join(losses)}."
    else:
        text = f"Gain: {', '.join(gains)}; {', '.join(held or ['quality as dense'])}."
    return {"gain": bool(gains and not losses), "text": text}


def _quality(found: dict[str, Any], dense: dict[str, Any]) -> tuple[list[str], list[str]]:
    lost: list[str] = []
    held: list[str] = []
    if "retrieval" in found:
        told = found["retrieval"]["difference"]
        points = f"{abs(100 * told['value']):.1f}{_error(100 * told['stderr'], 1)} points"
        if dense["retrieval"]["value"] < ENOUGH:
            held.append(f"retrieval says little (dense itself answers {dense['retrieval']['value']:.0%})")
        elif told["value"] < -NEAR:
            lost.append(f"retrieval falls by {points}")
        else:
            held.append(f"retrieval {points} {'below' if told['value'] < 0 else 'above'} dense" if told["value"] else
                        "retrieval as dense")  # fmt: skip
    for key in ("prefilled", "decoded"):
        if key in found:
            told = found[key]["difference"]
            rise, error = told["loss_difference"], told["stderr"]
            times = math.exp(min(rise, 700.0))
            line = f"perplexity of {key} text {times:.3f}{_error(times * error, 3)} x dense's"
            sure = not math.isfinite(error) or rise > 2 * error
            if abs(times - 1) >= 5e-4:
                (lost if times > WORSE and sure else held).append(line)
    return lost, held


def _error(value: float, digits: int) -> str:
    return f" ± {value:.{digits}f}" if math.isfinite(value) else ""


def told_counts(counts: Counts | str) -> dict[str, Any]:
    """Counts as they stand in the report; a text says why there are none."""
    if isinstance(counts, str):
        return {"note": counts}
    return {
        "causal": counts.causal, "kept": counts.kept, "computed": counts.computed, "read": counts.read,
        "dense_read": counts.dense_read, "share": counts.kept_share,
    }  # fmt: skip
