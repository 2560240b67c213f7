"""The report of a prune run: one HTML page that needs nothing else, and its JSON twin."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from maskwright.core.cache import write_atomic
from maskwright.core.errors import BadInput
from maskwright.report import chart, words
from maskwright.report.schema import check


@cache
def template(name: str) -> Any:
    """A page of this folder, with the filters all pages share."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the report needs jinja2: pip install 'maskwright[lm]'") from None
    # Every name in a report may come from a stranger's model: escape always, and never render a missing name as "".
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "count": words.count,
        "share": words.share,
        "number": words.number,
        "seconds": words.seconds,
        "size": words.size,
        "plain": words.plain,
    }
    env.globals["plus_minus"] = words.plus_minus
    return env.get_template(name)


def render(report: Mapping[str, Any]) -> str:
    """The report as one HTML page. Raises BadInput when the report is not of the known format."""
    # The twin is sorted, so the page is drawn from the sorted form: drawn again from the twin it is the same page.
    data = check(plain_json(report))
    sites, quality = data["sites"], data["quality"]
    drawn, _ = chart.points(sites)
    paired = quality and quality["paired"]
    longest = sorted(data["seconds"].items(), key=lambda item: -item[1])
    stages = {name: value for name, value in longest if name != "total"}
    return template("page.html").render(
        r=data,
        kept_charts=[chart.kept_chart(sites, wide) for wide in (True, False)],
        error_charts=[chart.error_chart(sites, wide) for wide in (True, False)],
        legend=[(kind, colour) for kind, colour in chart.legend(drawn) if kind != "site"],
        outside=len(sites) - len(drawn),
        top_error=max((s["error"] for s in sites if _finite(s["error"])), default=0.0),
        factor=_factor(paired["loss_difference"]) if paired else None,
        stages=stages,
        total=data["seconds"].get("total", sum(stages.values())),
        arxiv=words.arxiv(data["method"]["arxiv"]),
    )


def write(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` (sorted, indented) and `report.html` into a folder; each appears whole or not at all.

    Numbers that JSON has no word for are written as the strings "inf", "-inf" and "nan". Raises BadInput for a
    report of another format, OSError where the folder cannot be written.
    """
    return put_both(report, render(report), Path(folder))


def put_both(report: Mapping[str, Any], page: str, folder: Path) -> tuple[Path, Path]:
    """The twin and the page of a report, written into a folder."""
    twin = json.dumps(plain_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    paths = folder / "report.json", folder / "report.html"
    for path, text in zip(paths, (twin, page), strict=True):
        put(path, text)
    return paths


def read(path: str | Path) -> dict[str, Any]:
    """The report in a folder or file, as written. Raises BadInput, one line, when it is missing or not a report."""
    return read_checked(Path(path), check)


def read_checked(path: Path, check: Callable[[Any], Any]) -> dict[str, Any]:
    """A report of either kind, in a folder or file, once its `check` has passed; errors name the file."""
    path = path / "report.json" if path.is_dir() else path
    report = read_json(path)
    try:
        check(report)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return dict(report)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises BadInput, one line, when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a JSON file: {str(error).splitlines()[0]}") from None


def put(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a half."""
    write_atomic(path, text.encode())


def _factor(difference: float) -> float:
    return math.exp(difference) if difference < 700 else math.inf


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def plain_json(value: Any) -> Any:
    """The same in JSON's own types, sorted; numbers it has no word for as the strings "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(value[k]) for k in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
