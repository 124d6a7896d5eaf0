"""Plots of the ranking as SVG text: critical differences, a seed x item heat map, and curves over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from bem_peft.evaluation.ranking import Ranking
from bem_peft.evaluation.rate_curves import RateCurve
from bem_peft.evaluation.report.plots import WIDTH, axis_range, short_number, svg, ticks

COLUMNS = 60  # of a heat map; each holds the mean of so many items as fall to it


def critical_difference_plot(ranking: Ranking, anchor: str) -> str:
    """Systems along their mean rank, the best on the left; a bar joins those that are not told apart."""
    names, low = list(ranking.mean_ranks), 1.0
    high = max(math.ceil(max(ranking.mean_ranks.values())), 2)
    left, right, top, row = 40, 40, 36, 22
    bars_end = top + 14 + 10 * len(ranking.groups)
    height = bars_end + row * len(names) + 24

    def sx(rank: float) -> float:
        return left + (rank - low) / (high - low) * (WIDTH - left - right)

    parts = [f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{top}" y2="{top}"/>']
    for tick in range(1, high + 1):
        parts.append(f'<text class="tick" x="{sx(tick):.1f}" y="{top - 8}" text-anchor="middle">{tick}</text>')
    for i, group in enumerate(ranking.groups):
        y = top + 12 + 10 * i
        ends = [sx(ranking.mean_ranks[name]) for name in (group[0], group[-1])]
        parts.append(f'<line class="group" x1="{ends[0] - 4:.1f}" x2="{ends[1] + 4:.1f}" y1="{y}" y2="{y}"/>')
    for i, name in enumerate(names):
        x, y, rank = sx(ranking.mean_ranks[name]), bars_end + row * (i + 1), ranking.mean_ranks[name]
        side, dx = ("end", -8) if x > WIDTH / 2 else ("start", 8)
        kind = "anchor" if name == anchor else "on"
        shown = name if len(name) <= 40 else name[:39] + "…"
        parts += [
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y}"/>',
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="4"/>',
            f'<text x="{x + dx:.1f}" y="{y + 4}" text-anchor="{side}">{escape(shown)} {rank:.2f}</text>',
        ]
    joined = "; ".join(", ".join(group) for group in ranking.groups) or "none"
    return svg(height, f"Mean ranks by {ranking.metric}", f"1 is best. Not told apart: {joined}.", parts)


def heat_map(difference: np.ndarray, seeds: Sequence[int], title: str) -> str:
    """D (seeds, items) with the items by rising mean; green is better than the anchor, red worse, the stronger the more."""
    ordered = difference[:, np.argsort(difference.mean(0), kind="stable")]
    columns = np.array_split(ordered, min(COLUMNS, ordered.shape[1]), axis=1)
    cells = np.stack([column.mean(1) for column in columns], axis=1)
    edge = float(np.abs(cells).max()) or 1.0
    left, right, row = 84, 24, 24
    wide = (WIDTH - left - right) / cells.shape[1]
    parts = []
    for k, seed in enumerate(seeds):
        y = 10 + row * k
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">seed {seed}</text>')
        for i, value in enumerate(cells[k]):
            kind = "up" if value > 0 else "down"
            parts.append(
                f'<rect class="{kind}" x="{left + wide * i:.2f}" y="{y}" width="{wide + 0.3:.2f}" height="{row - 2}" '
                f'fill-opacity="{abs(value) / edge:.2f}"/>'
            )
    below = 10 + row * len(seeds) + 18
    parts += [
        f'<text class="tick" x="{left}" y="{below}">items where it is worst</text>',
        f'<text class="tick" x="{WIDTH - right}" y="{below}" text-anchor="end">items where it is best</text>',
    ]
    described = f"Full colour is a difference of {edge:.3g}. The means of the seeds stand in the table below."
    return svg(below + 12, title, described, parts)


def rate_plot(curve: RateCurve) -> str:
    """The metric over the learning rate, logarithmic; a point a seed, a line through the means."""
    height, left, right, top, bottom = 300, 84, 24, 20, 52
    values = [v for found in curve.per_seed for v in found] + list(curve.means)
    xs, ys = axis_range([math.log10(rate) for rate in curve.rates]), axis_range(values)

    def sx(rate: float) -> float:
        return left + (math.log10(rate) - xs[0]) / (xs[1] - xs[0]) * (WIDTH - left - right)

    def sy(value: float) -> float:
        return height - bottom - (value - ys[0]) / (ys[1] - ys[0]) * (height - bottom - top)

    parts = []
    for tick in ticks(*ys):
        y = sy(tick)
        parts += [
            f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>',
        ]
    for rate, mean, found in zip(curve.rates, curve.means, curve.per_seed, strict=True):
        x = sx(rate)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 32}" text-anchor="middle">{rate:.2g}</text>')
        parts += [f'<circle class="off" cx="{x:.1f}" cy="{sy(value):.1f}" r="3"/>' for value in found]
        parts.append(f'<circle class="on" cx="{x:.1f}" cy="{sy(mean):.1f}" r="5"/>')
    path = " ".join(f"{sx(rate):.1f},{sy(mean):.1f}" for rate, mean in zip(curve.rates, curve.means, strict=True))
    parts.append(f'<polyline class="front" points="{path}"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 10}" text-anchor="middle">learning rate, log</text>')
    best = f"{curve.rates[curve.best]:.2g}"
    return svg(height, f"{curve.metric} over the learning rate", f"Best at {best}.", parts)
