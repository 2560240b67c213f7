"""The report of a prune run as data: what must stand in it, and what may be absent. Extra keys are kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskwright.core.errors import BadInput


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)


class _Model(_Part):
    name: str
    source: str = ""
    class_: str = Field("", alias="class")
    parameters: int
    site_parameters: int | None = None
    note: str | None = None
    base_hash: str | None = None
    license: str | None = None


class _Method(_Part):
    slug: str
    name: str | None = None
    title: str = ""
    arxiv: str = ""
    settings: dict[str, Any] = {}


class _Measure(_Part):
    value: float
    stderr: float | None = None
    loss: float | None = None
    loss_stderr: float | None = None


class _Paired(_Part):
    loss_difference: float
    stderr: float | None = None


class _Quality(_Part):
    metric: str = "perplexity"
    text: str = ""
    sha256: str = ""
    tokens: int | None = None
    windows: int | None = None
    window: int | None = None
    before: _Measure
    after: _Measure
    paired: _Paired | None = None


class _Sample(_Part):
    prompt: str
    before: str
    after: str


class _Site(_Part):
    name: str
    block: int | None = None
    shape: list[int]
    pattern: str = ""
    kept: int
    total: int
    density: float
    error: float | None = None
    note: str | None = None


class _Picture(_Part):
    site: str
    caption: str = ""
    png: str


class _Pace(_Part):
    tokens_per_second: float


class _Layer(_Part):
    kind: str
    number: int
    shape: list[int]
    density: float
    form: str
    dense_ms: float
    best_dense: str = ""
    best_dense_ms: float
    packed_ms: float
    ratio: float
    dense_bytes: int
    bytes: int
    verdict: str = ""


class _Speed(_Part):
    before: _Pace | None = None
    after: _Pace | None = None
    accelerated: _Pace | None = None
    packed: _Pace | None = None
    verdict: str = ""
    engine: str = ""
    told: str = ""
    layers: list[_Layer] = []


class _Memory(_Part):
    peak_bytes: int
    after_loading_bytes: int | None = None


class _Calibration(_Part):
    source: str = ""
    sha256: str = ""
    tokens: int | None = None
    windows: int | None = None


class _Report(_Part):
    format: Literal["maskwright.report"]
    version: Literal[1]
    model: _Model
    method: _Method
    pattern: str = ""
    within: str | None = None
    density: float | None = None
    kept: int
    total: int
    quality: _Quality | None = None
    samples: list[_Sample] = []
    sites: list[_Site] = []
    pictures: list[_Picture] = []
    speed: _Speed | None = None
    seconds: dict[str, float] = {}
    memory: _Memory | None = None
    calibration: _Calibration | None = None
    settings: dict[str, Any] = {}
    command: str | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    seed: int | None = None
    finished: str = ""
    notes: list[str] = []


def check(report: Any) -> dict[str, Any]:
    """The report with every absent part filled in as None or empty.

    Raises BadInput, one line, naming the first field that is wrong.
    """
    return validated(_Report, report, "maskwright report")


def validated(kind: type[BaseModel], report: Any, what: str) -> dict[str, Any]:
    """The same for a report of any kind, called `what` in the error."""
    # None in place of an empty list or mapping means the same; people and JSON writers use both.
    if isinstance(report, dict):
        report = {key: value for key, value in report.items() if value is not None}
    try:
        return kind.model_validate(report).model_dump(by_alias=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadInput(f"not a {what} of version 1: {where}: {first['msg']}{more}") from None
