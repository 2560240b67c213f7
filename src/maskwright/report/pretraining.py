"""The report of `maskwright pretrain`: one HTML page that needs nothing else, and its JSON twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from maskwright.report import words
from maskwright.report.curve import curve
from maskwright.report.page import plain_json, put_both, read_checked, template
from maskwright.report.schema import _Method, _Part, validated

FORMAT = "maskwright.pretraining"
_POINTS = 120  # of the loss curve; more are averaged in groups


class _Model(_Part):
    name: str
    class_: str = Field("", alias="class")
    parameters: int
    learner_parameters: int


class _Data(_Part):
    folder: str
    images: int
    held_out: int = 0
    classes: int = 0
    shape: list[int]
    skipped: list[str] = Field(default_factory=list)


class _Probe(_Part):
    step: int
    accuracy: float


class _Report(_Part):
    format: Literal["maskwright.pretraining"]
    version: Literal[1]
    method: _Method
    model: _Model
    data: _Data
    recipe: dict[str, Any]
    losses: list[float]
    probe: list[_Probe] = Field(default_factory=list)
    chance: float | None = None
    pictures: list[str] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict)
    load: str = ""
    seconds: dict[str, float] = Field(default_factory=dict)
    command: str | None = None
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    finished: str = ""


def check(report: Any) -> dict[str, Any]:
    """The report with every absent part filled in. Raises BadInput, one line, naming the first field that is wrong."""
    return validated(_Report, report, "maskwright pre-training report")


def render(report: Mapping[str, Any]) -> str:
    """The report as one HTML page. Raises BadInput when the report is not of the known format."""
    data = check(plain_json(report))
    losses, probe = _thinned(data["losses"]), [(each["step"], each["accuracy"]) for each in data["probe"]]
    return str(template("pretraining.html").render(
        r=data, paper=words.arxiv(data["method"]["arxiv"]),
        losses=[curve({"loss": losses}, wide=wide, title="loss by step") for wide in (True, False)],
        probes=[curve({"linear probe": probe}, wide=wide, title="accuracy of a linear probe by step", percent=True)
                for wide in (True, False)] if probe else [],
        stages=sorted(data["seconds"].items(), key=lambda item: -item[1]),
        machine=[(key.replace("_", " "), value) for key, value in data["machine"].items()],
    ))  # fmt: skip


def write(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder; each appears whole or not at all."""
    return put_both(report, render(report), Path(folder))


def read(path: Path) -> dict[str, Any]:
    """The report in a folder or file. Raises BadInput, one line, when it is missing or not such a report."""
    return read_checked(path, check)


def is_one(report: Any) -> bool:
    """Whether this is a report of `pretrain`, whole or not."""
    return isinstance(report, dict) and report.get("format") == FORMAT


def _thinned(losses: Sequence[float]) -> list[tuple[float, float]]:
    size = math.ceil(len(losses) / _POINTS) or 1
    groups = [losses[at : at + size] for at in range(0, len(losses), size)]
    return [(at * size + (len(group) + 1) / 2, sum(group) / len(group)) for at, group in enumerate(groups)]
