"""Small charts as inline SVG: no package, no script, colours of the page they stand in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Bar", "Group", "bars", "curve", "dots", "lengths", "lines", "short"]

_ROW, _LEFT, _RIGHT = 26, 262, 670
# of a letter, at most
_LETTER = 7.0


class Bar(NamedTuple):
    """A row of :func:`bars` and of :func:`lengths`: ``ours`` decides the colour, ``text`` stands behind it."""

    label: str
    value: float
    text: str
    ours: bool
    solid: bool = True


class Group(NamedTuple):
    """A row of :func:`dots`."""

    label: str
    values: Sequence[float]
    ours: bool


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def curve(points: Sequence[tuple[int, float]], *, label: str, mark: int | None, marked: str) -> str:
    """Percentages over whole numbers.

    Args:
        points: (x, y in %).
        label: of the horizontal axis.
        mark: x of a dashed line, or None.
        marked: what stands beside that line.
    """
    width, height, left, top, right, bottom = 460, 240, 46, 14, 12, 40
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    # a whole number of tens, so that a small change is not made to look large
    low, high = 10 * math.floor(min(ys) / 10), 10 * math.ceil(max(ys) / 10)
    low, high = (low, high) if high - low >= 20 else (max(0, high - 20), max(20, high))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / max(xs[-1] - xs[0], 1)
        return left + across * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for y in range(low, high + 1, 10 if high - low <= 60 else 20):
        _, row = at(xs[0], y)
        parts.append(_line(left, row, width - right, row, "axis"))
        parts.append(_text(left - 6, row + 4, f"{y}", "end", "dim"))
    for x in xs:
        parts.append(_text(at(x, low)[0], height - bottom + 17, f"{x}", "middle", "dim"))
    if mark is not None and xs[0] <= mark <= xs[-1]:
        column, _ = at(mark, low)
        parts.append(
            f'<line x1="{column:.1f}" y1="{top}" x2="{column:.1f}" y2="{height - bottom}" class="axis" stroke-dasharray="4 3"/>'
        )
        # where the line's own point is not
        nearest = min(points, key=lambda point: abs(point[0] - mark))
        row = top + 10 if nearest[1] < (low + high) / 2 else height - bottom - 6
        parts.append(_text(column + 4, row, marked, "start", "dim"))
    path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--us)" stroke-width="2"/>')
    for point in points:
        column, row = at(*point)
        parts.append(
            f'<circle cx="{column:.1f}" cy="{row:.1f}" r="3.5" fill="var(--us)"><title>{point[1]:.1f} %</title></circle>'
        )
    ends = (points[0], points[-1]) if len(points) > 1 else points[:1]
    for point, anchor in zip(ends, ("start", "end"), strict=False):
        column, row = at(*point)
        above = row - 9 if row > top + 16 else row + 18
        parts.append(_text(column + (8 if anchor == "start" else 0), above, f"{point[1]:.1f}", anchor))
    parts.append(_text((left + width - right) / 2, height - 6, label, "middle"))
    return _svg(width, height, parts, f"FG-ARI in % over {label}")


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, title: str, ours: str = "") -> str:
    """Values of several named curves over a number, from 0 to 1 or to the greatest of them.

    Args:
        series: name -> (x, y), ascending in x.
        label: of the horizontal axis.
        title: what is shown.
        ours: the curve that has our colour.
    """
    width, height, left, top, right, bottom = 490, 240, 46, 14, 148, 40
    points = [point for curve in series.values() for point in curve]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    greatest = max(1.0, *(y for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / max(high - low, 1e-12)
        return left + across * (width - left - right), top + (1 - y / greatest) * (height - top - bottom)

    parts = []
    for i in range(6):
        _, row = at(low, greatest * i / 5)
        parts.append(_line(left, row, width - right, row, "axis"))
        parts.append(_text(left - 6, row + 4, f"{greatest * i / 5:.3g}", "end", "dim"))
    for x in dict.fromkeys((low, high)):
        parts.append(_text(at(x, 0)[0], height - bottom + 17, f"{x:g}", "middle", "dim"))
    falling = sorted(series.items(), key=lambda one: -one[1][-1][1])
    # names keep apart where curves end together, and off the axis
    rows = [at(*curve[-1])[1] + 4 for _, curve in falling]
    for i in range(1, len(rows)):
        rows[i] = max(rows[i], rows[i - 1] + 13)
    below = height - bottom + 4.0
    for i in reversed(range(len(rows))):
        rows[i] = below = min(rows[i], below)
        below -= 13
    for (name, curve), row in zip(falling, rows, strict=True):
        colour = "var(--us)" if name == ours else "var(--them)"
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in curve)
        dash = "" if name == ours else f' stroke-dasharray="{4 + 3 * list(series).index(name)} 3"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(_text(at(*curve[-1])[0] + 6, row, f"{name} {curve[-1][1]:.2f}"))
    parts.append(_text((left + width - right) / 2, height - 6, label, "middle"))
    return _svg(width, height, parts, title)


def bars(rows: Sequence[Bar], *, title: str) -> str:
    """Lengths from 0; what is not ``solid`` is hatched."""
    left, right, text = 130, 480, 150
    longest = max(row.value for row in rows)
    parts = []
    for i, row in enumerate(rows):
        y = 4 + i * _ROW
        wide = max(row.value / longest * (right - left - text), 1.5)
        parts.append(_text(left - 8, y + 15, row.label, "end"))
        fill = "var(--us)" if row.ours else "var(--them)"
        style = (
            f'fill="{fill}"'
            if row.solid
            else f'fill="{fill}" fill-opacity=".25" stroke="{fill}" stroke-dasharray="3 2"'
        )
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{wide:.1f}" height="{_ROW - 8}" {style}/>')
        parts.append(_text(left + wide + 6, y + 15, row.text))
    return _svg(right, len(rows) * _ROW + 8, parts, title)


def lengths(rows: Sequence[Bar], *, title: str) -> str:
    """Values of many sizes on a logarithmic axis, each a line from the smallest power of ten."""
    exponents = [math.log10(row.value) for row in rows if row.value > 0]
    low, high = math.floor(min(exponents, default=-17)) - 1, math.ceil(max(exponents, default=0))
    every = max(1, round((high - low) / 6))
    bottom = len(rows) * _ROW + 8
    right = _RIGHT - 70

    def at(exponent: float) -> float:
        return _LEFT + (exponent - low) / (high - low) * (right - _LEFT)

    parts = []
    for exponent in range(low, high + 1, every):
        parts.append(_line(at(exponent), 2, at(exponent), bottom, "axis"))
        parts.append(_text(at(exponent), bottom + 16, f"1e{exponent}", "middle", "dim"))
    for i, row in enumerate(rows):
        y = 4 + i * _ROW + 11
        end = at(math.log10(row.value)) if row.value > 0 else _LEFT
        fill = "var(--us)" if row.ours else "var(--them)"
        parts.append(_text(_LEFT - 8, y + 4, row.label, "end"))
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{end:.1f}" y2="{y}" stroke="{fill}" stroke-width="2"/>')
        parts.append(f'<circle cx="{end:.1f}" cy="{y}" r="5" fill="{fill}"/>')
        parts.append(_text(end + 10, y + 4, row.text))
    return _svg(_RIGHT, bottom + 22, parts, title)


def dots(groups: Sequence[Group], *, lines: Mapping[str, float], title: str) -> str:
    """Every value in % as a dot, 0 to 100, one row for each group; ``lines`` are levels to compare with, each named."""
    left = max(_LEFT, 16 + _LETTER * max((len(group.label) for group in groups), default=0))
    right = left + _RIGHT - 20 - _LEFT
    bottom = len(groups) * 34 + 24 + 14 * len(lines)
    top = 14 * len(lines) + 8

    def at(value: float) -> float:
        return left + min(max(value, 0.0), 100.0) / 100 * (right - left)

    parts = []
    for tick in range(0, 101, 20):
        parts.append(_line(at(tick), top, at(tick), bottom, "axis"))
        parts.append(_text(at(tick), bottom + 16, f"{tick}", "middle", "dim"))
    for i, (name, value) in enumerate(sorted(lines.items(), key=lambda item: item[1])):
        x = at(value)
        parts.append(
            f'<line x1="{x:.1f}" y1="{14 * i + 10}" x2="{x:.1f}" y2="{bottom}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
        )
        anchor, shift = ("start", 4) if x < (left + right) / 2 else ("end", -4)
        parts.append(_text(x + shift, 14 * i + 14, f"{name} {value:.1f}", anchor, "dim"))
    for i, group in enumerate(groups):
        y = top + 22 + 34 * i
        fill = "var(--us)" if group.ours else "var(--them)"
        parts.append(_text(left - 8, y + 4, group.label, "end"))
        for j, value in enumerate(group.values):
            # equal values side by side would hide each other
            row = y + (-6, 0, 6)[j % 3]
            place = f'cx="{at(value):.1f}" cy="{row}" r="5"'
            parts.append(f'<circle {place} fill="{fill}" fill-opacity=".75"><title>{value:.1f} %</title></circle>')
    return _svg(round(right) + 20, bottom + 22, parts, title)


def _svg(width: int, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}" style="max-width:{1.25 * width:.0f}px">'
        f"{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
