"""The two charts over depth, as inline SVG.

Kept share: bars a block, dots a site. Reconstruction error: a line a kind.
Colours are CSS variables of the page, so light, dark and print share one drawing. Every text in it is escaped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from maskwright.report.words import number, share

_COLOURS = 8


@dataclass(frozen=True)
class Point:
    """One site in the charts: depth on the x axis, kind names the line it belongs to."""

    depth: int
    kind: str
    site: Mapping[str, Any]


def kinds(names: Sequence[str]) -> dict[str, str]:
    """Site name -> short label shared by the same tensor of all blocks: shortest tail that tells the kinds apart."""
    stems = {n: [p for p in n.split(".") if not p.isdigit()] for n in names}
    cut = {n: parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts for n, parts in stems.items()}
    wholes = {tuple(parts) for parts in cut.values()}
    for length in range(1, max((len(w) for w in wholes), default=1) + 1):
        if len({w[-length:] for w in wholes}) == len(wholes):
            break
    return {n: ".".join(parts[-length:]) for n, parts in cut.items()}


def points(sites: Sequence[Mapping[str, Any]]) -> tuple[list[Point], str]:
    """The sites to draw and the name of the x axis: blocks where the model has them, else the order of the sites."""
    in_blocks = [s for s in sites if s["block"] is not None]
    if not in_blocks:
        return [Point(i, "site", s) for i, s in enumerate(sites)], "site, in the model's order"
    label = kinds([s["name"] for s in in_blocks])
    return [Point(s["block"], label[s["name"]], s) for s in in_blocks], "block"


def legend(drawn: Sequence[Point]) -> list[tuple[str, int]]:
    """Kinds in the order of first appearance, each with its colour number; kinds past the last colour share it."""
    order = list(dict.fromkeys(p.kind for p in drawn))
    return [(kind, min(i, _COLOURS - 1)) for i, kind in enumerate(order)]


def nice_top(value: float) -> float:
    """The smallest of 1, 1.5, 2, 3, 5, 8, 10 times a power of ten that is not below `value`."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 1.5, 2, 3, 5, 8, 10) if m * power >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Frame:
    """Plot area and scales of one drawing; `wide` is the desk and print form, else the phone form."""

    wide: bool
    first: int
    last: int
    top: float

    @property
    def width(self) -> int:
        return 900 if self.wide else 380

    @property
    def height(self) -> int:
        return 210 if self.wide else 190

    def x(self, depth: float) -> float:
        left, right = 48, self.width - 12
        return left + (depth - self.first + 0.5) / (self.last - self.first + 1) * (right - left)

    def y(self, value: float) -> float:
        return (self.height - 36) - min(value / self.top, 1.04) * (self.height - 50)

    def axes(self, label: str, percent: bool) -> list[str]:
        """Grid lines with their values, depth ticks, name of the x axis."""
        out = []
        for i in range(5):
            value = self.top * i / 4
            text = share(value, 0) if percent else number(value, 2)
            y = self.y(value)
            out.append(f'<line class="grid" x1="48" x2="{self.width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        step = max(1, math.ceil((self.last - self.first + 1) / (16 if self.wide else 8)))
        for depth in range(self.first, self.last + 1, step):
            x, y = self.x(depth), self.height - 20
            out.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{depth}</text>')
        out.append(
            f'<text class="axis" x="{self.width - 12}" y="{self.height - 4}" text-anchor="end">{escape(label)}</text>'
        )
        return out

    def svg(self, parts: Sequence[str], title: str) -> Markup:
        name = "wide" if self.wide else "narrow"
        head = f'<svg class="{name}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">'
        return Markup(head + "".join(parts) + "</svg>")


def kept_chart(sites: Sequence[Mapping[str, Any]], wide: bool) -> Markup:
    """Kept share by depth: a bar a block; dots for the sites of a block where they differ. Empty without sites."""
    drawn, label = points(sites)
    if not drawn:
        return Markup("")
    frame = Frame(wide, min(p.depth for p in drawn), max(p.depth for p in drawn), 1.0)
    parts, colour = frame.axes(label, percent=True), dict(legend(drawn))
    at: dict[int, list[Point]] = defaultdict(list)
    for point in drawn:
        at[point.depth].append(point)
    bar = min(26.0, (frame.x(1) - frame.x(0)) * 0.62)
    for depth, here in sorted(at.items()):
        kept, total = sum(p.site["kept"] for p in here), max(1, sum(p.site["total"] for p in here))
        top = frame.y(kept / total)
        tip = f"{label.split(',')[0]} {depth}: {share(kept / total)} kept ({kept:,} of {total:,})"
        parts.append(
            f'<rect class="bar" x="{frame.x(depth) - bar / 2:.1f}" y="{top:.1f}" width="{bar:.1f}" '
            f'height="{frame.y(0) - top:.1f}" rx="2"><title>{escape(tip)}</title></rect>'
        )
        densities = [p.site["density"] for p in here]
        if max(densities) - min(densities) > 0.002:
            parts += [_dot(frame, p, p.site["density"], colour[p.kind], share(p.site["density"])) for p in here]
    return frame.svg(parts, f"kept share by {label}")


def error_chart(sites: Sequence[Mapping[str, Any]], wide: bool) -> Markup:
    """Reconstruction error by depth, a line a kind of site. Empty when no site has a finite error."""
    drawn, label = points([s for s in sites if s["error"] is not None and math.isfinite(s["error"])])
    if not drawn:
        return Markup("")
    top = nice_top(max(p.site["error"] for p in drawn))
    frame = Frame(wide, min(p.depth for p in drawn), max(p.depth for p in drawn), top)
    parts = frame.axes(label, percent=False)
    for kind, colour in legend(drawn):
        line = sorted((p for p in drawn if p.kind == kind), key=lambda p: p.depth)
        path = " ".join(f"{frame.x(p.depth):.1f},{frame.y(p.site['error']):.1f}" for p in line)
        parts.append(f'<polyline class="line s{colour}" points="{path}"/>')
        parts += [_dot(frame, p, p.site["error"], colour, number(p.site["error"], 3)) for p in line]
    return frame.svg(parts, f"relative reconstruction error by {label}")


def _dot(frame: Frame, point: Point, value: float, colour: int, text: str) -> str:
    tip = escape(f"{point.site['name']}: {text}")
    x, y = frame.x(point.depth), frame.y(value)
    return f'<circle class="dot s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{tip}</title></circle>'
