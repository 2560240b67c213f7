"""The report of `maskwright attend`: one HTML page that needs nothing else, and its JSON twin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from maskwright.report import chart, words
from maskwright.report.page import plain_json, put_both, read_checked, template
from maskwright.report.picture import density_png, mask_png
from maskwright.report.schema import _Calibration, _Measure, _Memory, _Paired, _Part, validated

if TYPE_CHECKING:
    from maskwright.cli.attended import Counts

FORMAT = "maskwright.attention"
WHAT = {
    "prefill": "What the prefill reads: rows are queries, columns keys, a dot a tile of them that is read at all.",
    "decode": "What decoded tokens read: a row a head, columns are tiles of keys, dark where more of the tokens read them.",
    "cache": "What stays in the cache after the prefill: a row a key head, columns are tiles of keys, dark where more of "
    "them stay.",
}
_COLUMNS = 64


class _Model(_Part):
    name: str
    source: str = ""
    class_: str = Field("", alias="class")
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    dtype: str
    attention: str = ""
    note: str | None = None


class _Spread(_Part):
    median: float
    low: float
    high: float


class _Pace(_Part):
    seconds: _Spread
    ratio: _Spread
    turns: int


class _Retrieval(_Measure):
    right: int
    of: int
    difference: _Measure


class _Text(_Measure):
    difference: _Paired


class _Figures(_Part):
    first_token: _Pace
    retrieval: _Retrieval | None = None
    question: _Pace | None = None
    prefilled: _Text | None = None
    decoded: _Text | None = None
    decode: _Pace | None = None
    stored: float


class _Pairs(_Part):
    causal: int | None = None
    kept: int | None = None
    computed: int | None = None
    read: float | None = None
    dense_read: float | None = None
    share: list[list[float]] = Field(default_factory=list)
    note: str = ""


class _Verdict(_Part):
    gain: bool
    text: str


class _Picture(_Part):
    layer: int
    head: int | None = None
    png: str


class _Method(_Figures):
    slug: str
    name: str = ""
    title: str = ""
    arxiv: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    impl: str = ""
    why: str = ""
    pairs: _Pairs = _Pairs()
    verdict: _Verdict
    what: str = ""
    pictures: list[_Picture] = Field(default_factory=list)


class _Report(_Part):
    format: Literal["maskwright.attention"]
    version: Literal[1]
    model: _Model
    length: int
    prefilled: int
    contexts: int
    questions: int
    windows: int
    decoded: int
    stepwise: bool = False
    text: _Calibration = _Calibration()
    dense: _Figures
    methods: list[_Method]
    seconds: dict[str, float] = Field(default_factory=dict)
    memory: _Memory | None = None
    command: str | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    seed: int | None = None
    finished: str = ""
    notes: list[str] = Field(default_factory=list)


def check(report: Any) -> dict[str, Any]:
    """The report with every absent part filled in. Raises BadInput, one line, naming the first field that is wrong."""
    return validated(_Report, report, "maskwright attention report")


def render(report: Mapping[str, Any]) -> str:
    """The report as one HTML page. Raises BadInput when the report is not of the known format."""
    data = check(plain_json(report))
    for told in data["methods"]:
        told["charts"] = _charts(told["pairs"])
        told["paper"] = words.arxiv(told["arxiv"])
        told["rows"] = _by_layer(told["pictures"])
    times = dict(sorted(data["seconds"].items(), key=lambda item: -item[1]))
    total = times.pop("total", sum(times.values()))
    return str(template("attention.html").render(
        r=data, stages=times, total=total, what=WHAT, names=[(told["slug"], told) for told in data["methods"]],
        machine=[(key.replace("_", " "), value) for key, value in data["machine"].items()],
    ))  # fmt: skip


def write(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder; each appears whole or not at all."""
    return put_both(report, render(report), Path(folder))


def read(path: Path) -> dict[str, Any]:
    """The report in a folder or file. Raises BadInput, one line, when it is missing or not such a report."""
    return read_checked(path, check)


def is_one(report: Any) -> bool:
    """Whether this is a report of `attend`, whole or not."""
    return isinstance(report, dict) and report.get("format") == FORMAT


def pictures(counts: Counts) -> list[dict[str, Any]]:
    """The counted tiles as pictures: one a head of the shown layers for a prefill, else one a layer with a row a head."""
    found: list[dict[str, Any]] = []
    for layer, seen in counts.pictures.items():
        if counts.what == "prefill":
            found += [{"layer": layer, "head": head, "png": mask_png(seen[head])} for head in range(len(seen))]
        elif counts.what == "decode":  # (heads, tokens, columns)
            found.append({"layer": layer, "png": density_png(seen.flatten(0, 1), (seen.shape[1], 1))})
        else:  # (key heads, keys)
            found.append({"layer": layer, "png": density_png(seen, (1, max(1, -(-seen.shape[1] // _COLUMNS))))})
    return found


def _charts(pairs: Mapping[str, Any]) -> list[Any]:
    if all(share >= 1 for heads in pairs["share"] for share in heads):
        return []
    total = max(1, (pairs["causal"] or 0) // (len(pairs["share"]) * len(pairs["share"][0])))
    sites = [
        {"name": f"layers.{layer}.head.{head}", "block": layer, "kept": round(share * total), "total": total,
         "density": share, "error": None}
        for layer, heads in enumerate(pairs["share"]) for head, share in enumerate(heads)
    ]  # fmt: skip
    return [chart.kept_chart(sites, wide) for wide in (True, False)]


def _by_layer(shown: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for one in shown:
        rows.setdefault(one["layer"], []).append(one)
    return rows
