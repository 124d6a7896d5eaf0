"""`report.html`: one file, no network, no script; for a phone, a keyboard and a screen reader."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from bem_peft.evaluation.profile_document import COLUMNS, base_first
from bem_peft.evaluation.promotion import NO_VERDICT, NOT_PROMOTED, PROMOTED
from bem_peft.evaluation.report.plots import LABELS, forest_plot, frontier_of_two, latency_plot, pareto_plot
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS, budget_text, number, verdict_text
from bem_peft.evaluation.results import SystemResult
from bem_peft.evaluation.slices import interval_text

STYLE = Path(__file__).with_name("report.css")
CLASSES = {PROMOTED: "good", NOT_PROMOTED: "bad", NO_VERDICT: "none"}


def to_html(report: Report) -> str:
    """The page."""
    sections = [
        _verdicts(report), _differences(report), _pareto(report), _budgets(report), _times(report), _systems(report), _method(report),
    ]  # fmt: skip
    warnings = "".join(f"<li>{escape(text)}</li>" for text in report.warnings())
    note = f'<div class="note"><strong>To keep in mind</strong><ul>{warnings}</ul></div>' if warnings else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE.read_text()}</style></head><body>"
        '<a class="skip" href="#main">To the verdicts</a>'
        f"<header><h1>{escape(report.title)}</h1>"
        f'<p class="soft">{len(report.systems)} systems against <strong>{escape(report.anchor)}</strong> on '
        f"{STANDS[report.stands_on]}. Made {escape(report.created)} with bem_peft {escape(report.bem_peft_version)}.</p>"
        f'</header><main id="main">{note}{"".join(sections)}</main>'
        "<footer><p>The numbers of this page are in <code>report.json</code> beside it.</p></footer></body></html>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table whose first cell of each row names it; the cells are HTML."""

    def kind(i: int) -> str:
        return ' class="n"' if i in numeric else ""

    heads = "".join(f'<th scope="col"{kind(i)}>{text}</th>' for i, text in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind(i)}>{text}</td>" for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _badge(text: str, kind: str) -> str:
    return f'<span class="verdict {kind}">{escape(text)}</span>'


def _verdicts(report: Report) -> str:
    rows = [
        (
            escape(p.system),
            _badge(p.verdict, CLASSES[p.verdict]),
            "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in p.reasons) + "</ul>",
        )
        for p in report.promotions
    ]
    rule = (
        "A system is promoted when it keeps the budget, is not inferior on any slice, and is surely on a Pareto frontier or "
        "better on held-out items after correction. What is not known is never a pass."
    )
    if len(rows) > 12 and all(p.verdict == report.promotions[0].verdict for p in report.promotions):
        common = [r for r in report.promotions[0].reasons if all(r in p.reasons for p in report.promotions)]
        items = "".join(f"<li>{escape(reason)}</li>" for reason in common)
        badge = _badge(report.promotions[0].verdict, CLASSES[report.promotions[0].verdict])
        return f"<h2>Verdicts</h2><p>{rule}</p><p>All {len(rows)} systems: {badge}</p><ul>{items}</ul>"
    return f"<h2>Verdicts</h2><p>{rule}</p>" + _table("Verdict on each system", ("system", "verdict", "why"), rows)


def _differences(report: Report) -> str:
    if not report.comparisons:
        return (
            "<h2>Differences</h2><p>No item scores are known, so there is no paired difference and no interval: "
            "only what was published stands below.</p>"
        )
    found = [(f"{name}, {r.slice}", r) for name, results in report.comparisons.items() for r in results]
    parts = ["<h2>Differences from the anchor</h2>"]
    for metric in dict.fromkeys(r.metric for _, r in found):
        chosen = [(label, r) for label, r in found if r.metric == metric]
        plot = forest_plot(chosen, f"Paired differences in {metric}")
        parts.append(
            f'<figure><div class="scroll" role="region" tabindex="0" aria-label="Plot of differences in {escape(metric)}">{plot}'
            f"</div><figcaption>{escape(metric)}: intervals of {report.confidence:.0%} over seeds and items; right of zero is "
            "better than the anchor, also where less of the metric is better (nll).</figcaption></figure>"
        )
    rows = [
        (
            escape(name), escape(r.metric), escape(r.slice), escape(interval_text(r)), f"{r.adjusted_p_value:.3g}",
            "-" if r.comparison.d_z is None else f"{r.comparison.d_z:+.2f}", f"{r.comparison.mde:.3g}",
            f"{r.comparison.seeds} x {r.comparison.items}",
            _badge(verdict_text(r), "good" if r.is_better else "bad" if r.is_worse else "none"),
        )
        for name, results in report.comparisons.items() for r in results
    ]  # fmt: skip
    head = ("system", "metric", "slice", "difference", "adjusted p", "d_z", "detectable", "seeds x items", "reading")
    parts.append(
        _table(f"Differences, above 0 is better ({report.correction} correction)", head, rows, (3, 4, 5, 6, 7))
    )
    return "".join(parts)


def _pareto(report: Report) -> str:
    if not report.pareto:
        return ""
    quality, *costs = report.objectives
    parts = ["<h2>Pareto frontiers</h2><p>Filled points are on the frontier of the two axes; the anchor is red.</p>"]
    for cost in costs:
        plot = pareto_plot(report.pareto, cost, quality, report.anchor)
        front = frontier_of_two(report.pareto, cost, quality)
        legend = "".join(f"<li>{escape(point.name)}</li>" for point in front)
        numbered = f"<p>On the frontier, from the cheapest:</p><ol>{legend}</ol>" if len(report.pareto) > LABELS else ""
        parts.append(
            f'<figure><div class="scroll" role="region" tabindex="0" aria-label="Plot of {quality.name} against {cost.name}">'
            f"{plot}</div><figcaption>{quality.name} against {cost.name}{numbered}</figcaption></figure>"
        )
    names = [objective.name for objective in report.objectives]
    rows = [
        (
            escape(p.name), *(number(p.values[name]) for name in names),
            "yes" if p.is_on_frontier else "no", "-" if p.probability is None else f"{p.probability:.0%}",
            escape(", ".join(p.dominated_by[:3])) + (f" and {len(p.dominated_by) - 3} more" if len(p.dominated_by) > 3 else ""),
        )
        for p in report.pareto
    ]  # fmt: skip
    head = ("system", *names, "on the frontier of all", "probability", "dominated by")
    parts.append(_table("All objectives together", head, rows, tuple(range(1, len(names) + 1))))
    return "".join(parts)


def _budgets(report: Report) -> str:
    lines = [
        (escape(s.name), line["quantity"], number(line["measured"]) if line["measured"] is not None else "-",
         number(line["anchor"]), "-" if line["deviation_ratio"] is None else f"{line['deviation_ratio']:+.2%}",
         _badge(line["verdict"], "good" if line["verdict"] == "PASS" else "bad" if line["verdict"] == "FAIL" else "none"),
         escape(line["how"]))
        for s in report.systems for line in s.budget or []
    ]  # fmt: skip
    if not lines:
        return "<h2>Budgets</h2><p>No budget was measured.</p>"
    head = ("system", "quantity", "measured", "anchor", "deviation", "verdict", "how")
    return "<h2>Budgets</h2>" + _table("What each adapter costs, against its anchor", head, lines, (2, 3, 4))


def _times(report: Report) -> str:
    found = report.profiles
    if found is None:
        return ""
    parts = [f"<h2>Latency</h2><p>{escape(found.how())}</p>"]
    for workload in found.workloads:
        name = f"{workload.kind}, batch {workload.batch}, {workload.tokens:,} tokens"
        plot = latency_plot(base_first(found.at(workload), found.anchor), found.anchor, f"Times of {name}")
        parts.append(
            f'<figure><div class="scroll" role="region" tabindex="0" aria-label="Plot of times, {escape(name)}">{plot}'
            f"</div><figcaption>{escape(name)}: the box holds half of the runs, the line in it is the median, the whisker "
            "reaches from the 5th to the 95th percentile, the point is the 99th.</figcaption></figure>"
        )
    kinds = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "none"}
    verdict = COLUMNS.index("verdict")
    rows = [
        tuple(
            _badge(cell, kinds[cell]) if i == verdict and cell in kinds else escape(cell) for i, cell in enumerate(row)
        )
        for row in found.rows()
    ]
    parts.append(_table("Times and rates", COLUMNS, rows, (2, 3, 4, 5, 6, 7, 9, 10)))
    return "".join(parts)


def _systems(report: Report) -> str:
    def seeds(system: SystemResult) -> str:
        return ", ".join(map(str, system.seeds)) or "-"

    names = report.values
    rows = [
        (escape(s.name), escape(s.method), seeds(s), budget_text(s), *(number(s.values[name]) for name in names))
        for s in report.systems
    ]
    head = ("system", "method", "seeds", "budget", *names)
    return "<h2>Systems</h2>" + _table("Values, mean over seeds", head, rows, tuple(range(4, 4 + len(names))))


def _method(report: Report) -> str:
    methods = sorted({r.comparison.method for results in report.comparisons.values() for r in results})
    listed = "".join(f"<li>{escape(text)}</li>" for text in methods)
    versions = {
        f"{name} {version}"
        for system in report.systems
        for source in system.provenance
        for name, version in source.get("versions", {}).items()
        if version
    }
    hardware = {
        str(h.get("processor") or h.get("accelerator") or "")
        for system in report.systems
        for source in system.provenance
        if (h := source.get("hardware"))
    }
    facts = "".join(f"<li>{escape(text)}</li>" for text in sorted(hardware - {""}))
    return (
        f"<h2>How</h2><ul>{listed}<li>p-values corrected over metrics and slices: {escape(report.correction)}</li>{facts}"
        f"<li>{escape(', '.join(sorted(versions)))}</li></ul>"
    )
