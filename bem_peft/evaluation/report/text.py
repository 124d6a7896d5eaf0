"""What a report says in words, the same in its Markdown, its page and its plots."""

from __future__ import annotations

from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.results import SystemResult
from bem_peft.evaluation.slices import WHOLE, SliceResult, interval_text

STANDS = {"slice_a": "Slice-A (development)", "slice_b": "Slice-B (held out)"}


def number(value: float) -> str:
    """A value in few characters: 783,360; 0.965; 1.2e-05."""
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def budget_text(system: SystemResult) -> str:
    return {None: "not measured", True: "kept", False: "not kept"}[system.budget_is_met]


def main_line(report: Report, system: str) -> str | None:
    """The system's difference from the anchor on all items, in the metric of quality: "pt3 nll -0.02 [-0.04, +0.01]".
    None where nothing was compared."""
    found = [result for result in report.comparisons.get(system, []) if result.slice == WHOLE]
    quality = [result for result in found if report.objectives and result.metric == report.objectives[0].name]
    for result in quality or found:
        return f"{system} {result.metric} {interval_text(result)}"
    return None


def verdict_text(found: SliceResult) -> str:
    """What a result says, in two words."""
    if found.comparison.is_conditional:
        return "one seed"
    if found.comparison.refusal is not None:
        return "no verdict"
    if found.is_better:
        return "better"
    if found.is_worse:
        return "worse"
    return "may be worse" if found.is_inferior else "no worse"
