"""HeadPlan: one rule per (layer, head), found once for a model by search, and the integer program that chooses them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskwright.attention.site import ModelShape
from maskwright.core.errors import BadInput

FORMAT, VERSION = "maskwright.heads", 1
_PARTS = ("format", "version", "method", "model", "grid", "rules", "table", "made_by")
Bounds = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """What one head does: a name and its numbers (say "affine" with alpha and beta)."""

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [
            key for key, value in self.parameters.items() if not isinstance(value, int | float) or not abs(value) < 1e15
        ]
        if not isinstance(self.name, str) or wrong:
            raise BadInput(f"a rule is a name with numbers, got {self.name!r} with {dict(self.parameters)}")


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The rules of every head of one model, and how they were found.

    rules[layer][head]; `method` the slug of the room that reads them; `grid` what the rules are measured in (block
    sizes); `table` what was weighed (losses, costs), for inspection alone; `made_by` where it comes from (calibration,
    seed, versions). grid, table and made_by are plain JSON. Raises BadInput when the rules do not cover the heads.
    """

    method: str
    layers: int
    heads: int
    kv_heads: int
    rules: tuple[tuple[Rule, ...], ...]
    grid: Mapping[str, Any] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict, repr=False)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.rules) != self.layers or any(len(layer) != self.heads for layer in self.rules):
            shape = f"{len(self.rules)} layers of {sorted({len(layer) for layer in self.rules})} heads"
            raise BadInput(f"a plan of {self.layers} layers and {self.heads} heads, but its rules are for {shape}")

    def fits(self, shape: ModelShape) -> None:
        """Raise BadInput when the plan was made for another model, naming both shapes."""
        mine, theirs = (self.layers, self.heads, self.kv_heads), (shape.layers, shape.heads, shape.kv_heads)
        if mine != theirs:
            form = "the {} plan is for {} layers, {} heads and {} key heads; this model has {}, {} and {}"
            raise BadInput(form.format(self.method, *mine, *theirs))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, under a temporary name that is then renamed."""
        path = Path(path)
        model = {"layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}
        rules = [[{"name": rule.name, **rule.parameters} for rule in layer] for layer in self.rules]
        body = {"format": FORMAT, "version": VERSION, "method": self.method, "model": model, "rules": rules}
        body |= {name: dict(getattr(self, name)) for name in ("grid", "table", "made_by")}
        try:
            text = json.dumps(body, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}: the plan holds what JSON cannot: {error}") from None
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BadInput(f"{path}: {error.strerror}") from None

    @staticmethod
    def load(path: str | Path) -> HeadPlan:
        """Read a saved plan. Raises BadInput in one line for a missing, damaged or foreign file."""
        path = Path(path)
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no JSON, or damaged"
            raise BadInput(f"{path}: not a plan of heads: {reason}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise BadInput(f"{path}: not a plan of heads: its format is not {FORMAT}")
        if body.get("version") != VERSION:
            raise BadInput(f"{path}: a plan of version {body.get('version')!r}; this maskwright reads version {VERSION}")
        missing = [part for part in _PARTS if part not in body]
        if missing:
            raise BadInput(f"{path}: a damaged plan: {', '.join(missing)} missing")
        try:
            model = {name: body["model"][name] for name in ("layers", "heads", "kv_heads")}
            if not all(type(value) is int for value in model.values()) or not isinstance(body["method"], str):
                raise TypeError
            rules = tuple(tuple(Rule(rule.pop("name"), rule) for rule in layer) for layer in body["rules"])
            told = [dict(body[name]) for name in ("grid", "table", "made_by")]
            return HeadPlan(body["method"], model["layers"], model["heads"], model["kv_heads"], rules, *told)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f": {error}" if isinstance(error, BadInput) else ""
            raise BadInput(f"{path}: a damaged plan{reason}") from None


@dataclass(frozen=True, eq=False)
class Choice:
    """A choice of one rule a head: `rules` (heads,) their numbers, `loss` (objectives,) summed, `cost` (costs,) averaged.

    gap: how far the solver's first objective may be from the best one, relative (0: proved best).
    """

    rules: np.ndarray
    loss: np.ndarray
    cost: np.ndarray
    gap: float = 0.0


def solve(
    loss: Any, cost: Any, bounds: Bounds, *, at_most_rules: int | None = None, layer_of: Sequence[int] | None = None,
    most: Sequence[float | None] = (), seconds: float = 20.0,
) -> Choice | None:  # fmt: skip
    """One rule for each head: the least summed loss whose mean costs lie in `bounds`. None where no choice does.

    loss (heads, rules) or (objectives, heads, rules): the first objective is minimised, the i-th sums to at most most[i].
    cost (heads, rules) or (costs, heads, rules), one (low, high) of `bounds` each. At most `at_most_rules` different
    rules among the heads of one layer, layer_of[head] its layer (None: one layer). An integer program, solved by scipy's
    HiGHS for at most `seconds`; equal losses fall to what it finds first. inf in `loss` forbids a rule to a head.
    Raises BadInput for shapes that disagree, NaN, and where scipy is not installed.
    """
    milp, constraint, box, sparse = _scipy()
    loss, cost, layer = _tables(loss, cost, bounds, at_most_rules, layer_of)
    objectives, heads, rules = loss.shape
    layers = int(layer.max()) + 1 if at_most_rules is not None else 0
    many, forbidden = heads * rules, ~np.isfinite(loss).all(0).ravel()
    scales = [np.abs(loss[i][np.isfinite(loss[i])]).max(initial=0) or 1.0 for i in range(objectives)]
    told = np.where(np.isfinite(loss), loss, 0.0).reshape(objectives, many)
    free = layers * rules  # y[layer, rule]: some head of the layer has the rule
    rows, low, high = [], [], []

    def add(row: Any, least: Any, greatest: Any) -> None:
        rows.append(sparse.hstack([row, sparse.csr_array((row.shape[0], many + free - row.shape[1]))]))
        low.append(np.broadcast_to(least, row.shape[0]))
        high.append(np.broadcast_to(greatest, row.shape[0]))

    add(sparse.kron(sparse.eye_array(heads), np.ones((1, rules))).tocsr(), 1.0, 1.0)
    add(sparse.csr_array(cost.reshape(len(cost), many) / heads), [b[0] for b in bounds], [b[1] for b in bounds])
    for i, limit in enumerate(most):
        if limit is not None:
            add(sparse.csr_array(told[i : i + 1] / scales[i]), -np.inf, limit / scales[i])
    if at_most_rules is not None:
        head, rule = np.divmod(np.arange(many), rules)
        seen = sparse.csr_array((-np.ones(many), (np.arange(many), layer[head] * rules + rule)), shape=(many, free))
        add(sparse.hstack([sparse.eye_array(many), seen]).tocsr(), -np.inf, 0.0)  # y >= x of every head of the layer
        count = sparse.kron(sparse.eye_array(layers), np.ones((1, rules)))
        add(sparse.hstack([sparse.csr_array((layers, many)), count]).tocsr(), -np.inf, float(at_most_rules))
    ceiling = np.concatenate([1.0 - forbidden, np.ones(free)])
    found = milp(
        np.concatenate([told[0] / scales[0], np.zeros(free)]), integrality=np.ones(many + free), bounds=box(0, ceiling),
        constraints=constraint(sparse.vstack(rows).tocsr(), np.concatenate(low), np.concatenate(high)),
        options={"time_limit": seconds},
    )  # fmt: skip
    if found.x is None:
        return None
    return _choice(found.x[:many].reshape(heads, rules).argmax(1), loss, cost, float(found.mip_gap or 0.0))


def pareto(
    loss: Any, cost: Any, bounds: Bounds, *, points: int = 5, at_most_rules: int | None = None,
    layer_of: Sequence[int] | None = None, seconds: float = 20.0,
) -> list[Choice]:  # fmt: skip
    """The front of several objectives, by the epsilon constraint method, ascending in the first objective.

    loss (objectives, heads, rules). Each objective alone gives the range of the others over those optima; the first one
    is then minimised with every other one bounded at `points` places of its range. Choices that another one matches or
    betters in every objective are left out; empty where nothing lies in the bounds.
    """
    table, _, _ = _tables(loss, cost, bounds, at_most_rules, layer_of)
    told: dict[str, Any] = {"at_most_rules": at_most_rules, "layer_of": layer_of, "seconds": seconds}
    found = []
    for first in range(len(table)):
        best = solve(np.roll(table, -first, axis=0), cost, bounds, **told)
        if best is None:
            return []
        found.append(_choice(best.rules, table, _stack(cost), best.gap))
    ends = np.stack([choice.loss for choice in found])
    grids = [np.linspace(ends[:, i].min(), ends[:, i].max(), points) for i in range(1, len(table))]
    tried = set()
    for cell in np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, len(grids)) if grids else []:
        # A hair of room: a bound at an optimum would cut it off by rounding.
        limits = tuple(float(limit + 1e-9 * max(abs(limit), 1.0)) for limit in cell)
        if limits not in tried and (best := solve(table, cost, bounds, most=(None, *limits), **told)) is not None:
            found.append(best)
        tried.add(limits)
    return front(found)


def front(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other one matches or betters in every objective (of equal ones the first), ascending."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: tuple(c.loss)):  # a later one can never dominate an earlier one
        if not any(bool((other.loss <= choice.loss).all()) for other in kept):
            kept.append(choice)
    return kept


def _choice(rules: np.ndarray, loss: np.ndarray, cost: np.ndarray, gap: float = 0.0) -> Choice:
    head = np.arange(len(rules))
    return Choice(rules, loss[:, head, rules].sum(1), cost[:, head, rules].mean(1), gap)


def _stack(table: Any) -> np.ndarray:
    table = np.asarray(table, dtype=np.float64)
    return table[None] if table.ndim == 2 else table


def _tables(
    loss: Any, cost: Any, bounds: Bounds, at_most_rules: int | None, layer_of: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    loss, cost = _stack(loss), _stack(cost)
    if loss.ndim != 3 or cost.ndim != 3 or loss.shape[1:] != cost.shape[1:] or len(bounds) != len(cost) or not loss.size:
        raise BadInput(
            f"losses {loss.shape} and costs {cost.shape} are (tables, heads, rules) with one bound a cost, got {len(bounds)}"
        )
    if np.isnan(loss).any() or not np.isfinite(cost).all():
        raise BadInput(f"losses {loss.shape} or costs {cost.shape} hold NaN (or a cost is infinite); nothing can be chosen")
    layer = np.zeros(loss.shape[1], dtype=np.int64) if layer_of is None else np.asarray(layer_of, dtype=np.int64)
    if layer.shape != (loss.shape[1],) or (at_most_rules is not None and at_most_rules < 1):
        raise BadInput(f"{loss.shape[1]} heads need as many layers, got {layer.shape}; rules a layer {at_most_rules}")
    return loss, cost, layer


def _scipy() -> tuple[Any, Any, Any, Any]:
    try:
        from scipy import sparse
        from scipy.optimize import Bounds as Box
        from scipy.optimize import LinearConstraint, milp
    except ImportError:
        raise BadInput("choosing rules for heads needs scipy: pip install 'maskwright[lab]'") from None
    return milp, LinearConstraint, Box, sparse
