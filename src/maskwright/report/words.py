"""Figures as people read them: counts, shares, value with standard error, seconds, bytes; one rule for all pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any


def count(value: float) -> str:
    """An integer with thousands separators: 53,084,160."""
    return f"{value:,.0f}"


def arxiv(text: str) -> str | None:
    """The text where it is an arXiv number a link may hold (2102.04010), else None."""
    return text if re.fullmatch(r"\d{4}\.\d{4,5}", text) else None


def share(value: float, digits: int = 2) -> str:
    """A share as percent: 0.5 -> 50.00 %."""
    return f"{100 * value:.{digits}f} %"


def number(value: float, significant: int = 4) -> str:
    """A plain number with `significant` digits, never in exponent form between 1e-4 and 1e15."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0 or not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{significant}g}"
    return f"{value:,.{max(0, significant - 1 - math.floor(math.log10(abs(value))))}f}"


def plus_minus(value: float, stderr: float | None, sign: bool = False) -> str:
    """Value with standard error, both cut where the second digit of the error stands: 14.712 ± 0.083."""
    value, error = float(value), None if stderr is None else float(stderr)
    lead = "+" if sign and value > 0 else ""
    if error is None or not math.isfinite(error) or error <= 0 or not math.isfinite(value):
        return lead + number(value)
    digits = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{lead}{value:,.{digits}f} ± {error:,.{digits}f}"


def seconds(value: float) -> str:
    """A duration: 0.42 s, 12.3 s, 2 min 31 s, 1 h 04 min."""
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float) -> str:
    """Bytes in binary units: 2.41 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.2f} {unit}"


def plain(value: Any) -> str:
    """One setting's value as text: lists with commas, mappings as key=value, None as "none"."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or "none"
    return str(value)


def hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's id on the Hugging Face hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def cell(text: object) -> str:
    """One line of Markdown that cannot open a table cell, a code span or an HTML tag."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def table(rows: Iterable[Iterable[object]]) -> str:
    """Rows as a Markdown table; the second one holds the dashes."""
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)
