"""Lines over steps as inline SVG, in the colours of the page. Every text in it is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from maskwright.report.chart import nice_top
from maskwright.report.words import number, share

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 36


def curve(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, wide: bool, title: str, label: str = "step", percent: bool = False
) -> Markup:
    """One line a name, from (x, y) pairs with y >= 0; values that are not finite are left out. Empty without points."""
    drawn = {name: [(x, y) for x, y in line if math.isfinite(y)] for name, line in lines.items()}
    flat = [point for line in drawn.values() for point in line]
    if not flat:
        return Markup("")
    width, height = (900, 210) if wide else (380, 190)
    low, high = min(x for x, _ in flat), max(x for x, _ in flat)
    top = 1.0 if percent else nice_top(max(y for _, y in flat))

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x - low) / (high - low) if high > low else 0.5
        return _LEFT + along * (width - _LEFT - _RIGHT), height - _BOTTOM - y / top * (height - _BOTTOM - _TOP)

    parts = []
    for i in range(5):
        _, y = at(low, top * i / 4)
        text = share(top * i / 4, 0) if percent else number(top * i / 4, 2)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    step = nice_top(max(1.0, (high - low) / (8 if wide else 4)))
    tick = math.ceil(low / step) * step
    while tick <= high:
        x, _ = at(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
        tick += step
    parts.append(f'<text class="axis" x="{width - _RIGHT}" y="{height - 4}" text-anchor="end">{escape(label)}</text>')
    for colour, (name, line) in enumerate(drawn.items()):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        parts.append(f'<polyline class="line s{colour}" points="{path}"/>')
        if len(line) > 40:
            continue
        for x, y in line:
            (left, up), text = at(x, y), share(y) if percent else number(y, 3)
            tip = escape(f"{name}, {label} {x:g}: {text}")
            parts.append(
                f'<circle class="dot s{colour}" cx="{left:.1f}" cy="{up:.1f}" r="2.6"><title>{tip}</title></circle>'
            )
    kind = "wide" if wide else "narrow"
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
