"""`report.md`: tables for a model card."""

from __future__ import annotations

from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS, budget_text, number, verdict_text
from bem_peft.evaluation.slices import interval_text


def to_markdown(report: Report) -> str:
    """Tables for a model card: verdicts, differences, values."""
    lines = [
        f"## {report.title}",
        "",
        f"Against `{report.anchor}` on {STANDS[report.stands_on]}; intervals of {report.confidence:.0%}, "
        f"p-values corrected over metrics and slices ({report.correction}).",
        "",
    ]
    names = report.values
    lines += ["| system | method | " + " | ".join(names) + " | seeds | budget |"]
    lines += ["| --- | --- |" + " ---: |" * len(names) + " ---: | --- |"]
    for system in report.systems:
        values = " | ".join(number(system.values[name]) for name in names)
        count = len(system.seeds)
        lines.append(f"| {system.name} | {system.method} | {values} | {count} | {budget_text(system)} |")
    if report.comparisons:
        lines += [
            "",
            "Differences are from the anchor; above zero is better, also where less of the metric is (nll).",
        ]
        lines += ["", "| system | metric | slice | difference | adjusted p | verdict |"]
        lines += ["| --- | --- | --- | ---: | ---: | --- |"]
    for name, results in report.comparisons.items():
        for found in results:
            p = f"{found.adjusted_p_value:.3g}"
            cells = (name, found.metric, found.slice, interval_text(found), p, verdict_text(found))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| system | verdict | reasons |", "| --- | --- | --- |"]
    lines += [f"| {p.system} | {p.verdict} | {'; '.join(p.reasons)} |" for p in report.promotions]
    if report.profiles is not None:
        lines += ["", report.profiles.to_markdown()]
    warnings = report.warnings()
    if warnings:
        lines += ["", *[f"- {text}" for text in warnings]]
    return "\n".join(lines) + "\n"
