"""The report's plots as SVG text: a Pareto plot of two objectives, and a forest plot of paired differences.

Colours come from the page's CSS variables, so that light and dark are the page's matter. Every plot has a title and a
description; what it shows stands in a table as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from bem_peft.evaluation.pareto import Objective, ParetoPoint
from bem_peft.evaluation.profiler import Profile
from bem_peft.evaluation.report.text import number
from bem_peft.evaluation.slices import SliceResult, interval_text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 84, 56, 24, 24
LABELS = 12  # names are written beside the points of the frontier, and of the others up to so many points


def pareto_plot(points: Sequence[ParetoPoint], x: Objective, y: Objective, anchor: str) -> str:
    """Cost `x` against quality `y`; the frontier of these two is joined by a line."""
    values = [(point.values[x.name], point.values[y.name]) for point in points]
    is_log = min(v for v, _ in values) > 0 and max(v for v, _ in values) > 20 * min(v for v, _ in values)

    def sx(value: float) -> float:
        return math.log10(value) if is_log else value

    xs, ys = axis_range([sx(v) for v, _ in values]), axis_range([v for _, v in values])
    place = {
        point.name: (
            LEFT + (sx(point.values[x.name]) - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point.values[y.name] - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - BOTTOM - TOP),
        )
        for point in points
    }
    front = frontier_of_two(points, x, y)
    parts = _axes(xs, ys, x, y, is_log)
    for point in points:
        if point not in front and point.name != anchor:
            parts.append(_dot("off", point, place, x, y))
    path = " ".join(f"{place[p.name][0]:.1f},{place[p.name][1]:.1f}" for p in front)
    parts.append(f'<polyline class="front" points="{path}"/>')
    parts += [_dot("on", point, place, x, y) for point in front if point.name != anchor]
    parts += [_dot("anchor", point, place, x, y) for point in points if point.name == anchor]
    named = points if len(points) <= LABELS else front
    for i, point in enumerate(named, 1):
        cx, cy = place[point.name]
        label = point.name if len(points) <= LABELS else str(i)
        side = "end" if cx > WIDTH * 0.7 else "start"
        parts.append(
            f'<text x="{cx + (-8 if side == "end" else 8):.1f}" y="{cy - 8:.1f}" text-anchor="{side}">{escape(label)}</text>'
        )
    names = ", ".join(point.name for point in front)
    return svg(HEIGHT, f"{y.name} against {x.name}", f"On the frontier of these two: {names}.", parts)


def frontier_of_two(points: Sequence[ParetoPoint], x: Objective, y: Objective) -> list[ParetoPoint]:
    """The points on the frontier of two objectives, by `x`."""
    pairs = {(x.name, y.name), (y.name, x.name)}
    return sorted((p for p in points if pairs & set(p.frontiers)), key=lambda p: (p.values[x.name], p.values[y.name]))


def _dot(kind: str, point: ParetoPoint, place: dict[str, tuple[float, float]], x: Objective, y: Objective) -> str:
    cx, cy = place[point.name]
    text = f"{point.name}: {x.name} {number(point.values[x.name])}, {y.name} {number(point.values[y.name])}"
    return f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="5"><title>{escape(text)}</title></circle>'


def forest_plot(results: Sequence[tuple[str, SliceResult]], title: str) -> str:
    """One line a system and slice: the difference with its interval; right of zero is better than the anchor."""
    height = 52 + 26 * len(results)
    left, right = 240, 18 + 7 * max(24, *(len(interval_text(found)) for _, found in results))
    edge = max(1e-12, *(max(abs(r.comparison.low), abs(r.comparison.high)) for _, r in results)) * 1.08

    def sx(value: float) -> float:
        return left + (value + edge) / (2 * edge) * (WIDTH - left - right)

    parts = [f'<line class="zero" x1="{sx(0):.1f}" x2="{sx(0):.1f}" y1="8" y2="{height - 34}"/>']
    for tick in (-edge / 1.08, 0.0, edge / 1.08):
        parts.append(f'<text class="tick" x="{sx(tick):.1f}" y="{height - 16}" text-anchor="middle">{tick:+.3g}</text>')
    for row, (label, found) in enumerate(results):
        y, c = 22 + 26 * row, found.comparison
        kind = "better" if found.is_better else "worse" if found.is_worse else "open"
        text = f"{label}: {interval_text(found)}"
        shown = label if len(label) <= 36 else label[:35] + "…"
        parts += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>',
            f'<line class="{kind}" x1="{sx(c.low):.1f}" x2="{sx(c.high):.1f}" y1="{y}" y2="{y}"/>',
            f'<rect class="{kind}" x="{sx(c.estimate) - 4:.1f}" y="{y - 4}" width="8" height="8">'
            f"<title>{escape(text)}</title></rect>",
            f'<text class="tick" x="{WIDTH - right + 10}" y="{y + 4}">{escape(interval_text(found))}</text>',
        ]
    return svg(height, title, "Right of zero is better than the anchor. The numbers stand in the table below.", parts)


def latency_plot(profiles: Sequence[Profile], anchor: str, title: str) -> str:
    """One line a system: box of the quartiles, median, whisker from p5 to p95, point at p99; in milliseconds."""
    height, left, right = 52 + 30 * len(profiles), 190, 170
    marks = {p.system: np.percentile(p.times_ms, (5, 25, 50, 75, 95, 99)).tolist() for p in profiles}
    xs = axis_range([value for found in marks.values() for value in found])

    def sx(value: float) -> float:
        return left + (value - xs[0]) / (xs[1] - xs[0]) * (WIDTH - left - right)

    parts = []
    for tick in ticks(*xs):
        parts += [
            f'<line class="grid" x1="{sx(tick):.1f}" x2="{sx(tick):.1f}" y1="8" y2="{height - 34}"/>',
            f'<text class="tick" x="{sx(tick):.1f}" y="{height - 16}" text-anchor="middle">{short_number(tick)}</text>',
        ]
    for row, profile in enumerate(profiles):
        y, (p5, p25, p50, p75, p95, p99) = 24 + 30 * row, marks[profile.system]
        kind = "anchor" if profile.system == anchor else "off" if profile.ratio_to_base is None else "on"
        text = f"{profile.system}: median {p50:.2f} ms, p95 {p95:.2f}, p99 {p99:.2f}"
        ratio = "" if profile.ratio_to_anchor is None else f"{profile.ratio_to_anchor[0]:.3f} of the anchor"
        shown = profile.system if len(profile.system) <= 26 else profile.system[:25] + "…"
        parts += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>',
            f'<line class="whisker" x1="{sx(p5):.1f}" x2="{sx(p95):.1f}" y1="{y}" y2="{y}"/>',
            f'<rect class="box {kind}" x="{sx(p25):.1f}" y="{y - 8}" width="{max(1.0, sx(p75) - sx(p25)):.1f}" '
            f'height="16"><title>{escape(text)}</title></rect>',
            f'<line class="median" x1="{sx(p50):.1f}" x2="{sx(p50):.1f}" y1="{y - 10}" y2="{y + 10}"/>',
            f'<circle class="{kind}" cx="{sx(p99):.1f}" cy="{y}" r="4"/>',
            f'<text class="tick" x="{WIDTH - right + 10}" y="{y + 4}">{escape(ratio)}</text>',
        ]
    return svg(height, f"{title}, milliseconds", "The numbers stand in the table below.", parts)


def _axes(xs: tuple[float, float], ys: tuple[float, float], x: Objective, y: Objective, is_log: bool) -> list[str]:
    parts = []
    for value in ticks(*ys):
        py = HEIGHT - BOTTOM - (value - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - BOTTOM - TOP)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>',
            f'<text class="tick" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{short_number(value)}</text>',
        ]
    across_ticks = range(math.ceil(xs[0]), math.floor(xs[1]) + 1) if is_log else ticks(*xs)
    for value in across_ticks:
        px = LEFT + (value - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        shown = short_number(10.0**value if is_log else value)
        parts.append(f'<text class="tick" x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{shown}</text>')
    across = f"{x.name}{f' ({x.unit})' if x.unit else ''}{', log' if is_log else ''}"
    up = f"{y.name}{f' ({y.unit})' if y.unit else ''}, {'higher' if y.higher_is_better else 'lower'} is better"
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from `low` to `high`."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short_number(value: float) -> str:
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.6g}{unit}"
    return f"{value:.6g}"


def axis_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def svg(height: float, title: str, description: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}. {description}", quote=True)}">'
    )
    return head + "".join(parts) + "</svg>"
