"""`report.md`: tables for a model card."""

from __future__ import annotations

from bem_peft.evaluation.report.markdown_table import markdown_table, plain
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS, budget_text, number, verdict_text
from bem_peft.evaluation.slices import interval_text


def to_markdown(report: Report) -> str:
    """Tables for a model card: verdicts, differences, values."""
    names = report.values
    lines = [
        f"## {plain(report.title)}",
        "",
        f"Against {plain(report.anchor)} on {STANDS[report.stands_on]}; intervals of {report.confidence:.0%}, "
        f"p-values corrected over systems, metrics and slices ({report.correction}).",
        "",
    ]
    rows = [
        (s.name, s.method, *(number(s.values[name]) for name in names), str(len(s.seeds)), budget_text(s))
        for s in report.systems
    ]  # fmt: skip
    lines += markdown_table(("system", "method", *names, "seeds", "budget"), rows, range(2, 3 + len(names)))
    if report.comparisons:
        lines += [
            "",
            "Differences are from the anchor; above zero is better, also where less of the metric is (nll).",
            "",
        ]
        found = [
            (name, r.metric, r.slice, interval_text(r), f"{r.adjusted_p_value:.3g}", verdict_text(r))
            for name, results in report.comparisons.items() for r in results
        ]  # fmt: skip
        heads = ("system", "metric", "slice", "difference", "adjusted p", "verdict")
        lines += markdown_table(heads, found, (3, 4))
    if report.ranking is not None:
        chances = sorted(report.ranking.probability_best.items(), key=lambda pair: -pair[1])
        lines += ["", *markdown_table(("system", f"probably the best by {report.ranking.metric}"),
                                      [(name, f"{chance:.0%}") for name, chance in chances], (1,))]  # fmt: skip
    verdicts = [(p.system, p.verdict, "; ".join(p.reasons)) for p in report.promotions]
    lines += ["", *markdown_table(("system", "verdict", "reasons"), verdicts)]
    if report.profiles is not None:
        lines += ["", report.profiles.to_markdown()]
    warnings = report.warnings()
    if warnings:
        lines += ["", *[f"- {plain(text)}" for text in warnings]]
    return "\n".join(lines) + "\n"
