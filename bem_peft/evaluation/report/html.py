"""`report.html`: one file, no network, no script; for a phone, a keyboard and a screen reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bem_peft.evaluation.pareto import Objective
from bem_peft.evaluation.profile_document import COLUMNS, base_first
from bem_peft.evaluation.promotion import NO_VERDICT, NOT_PROMOTED, PROMOTED
from bem_peft.evaluation.report.elements import badge, bullets, figure, html, table
from bem_peft.evaluation.report.next_steps import next_steps
from bem_peft.evaluation.report.plots import LABELS, forest_plot, frontier_of_two, latency_plot, pareto_plot
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS, budget_text, number, verdict_text
from bem_peft.evaluation.results import SystemResult
from bem_peft.evaluation.slices import interval_text

STYLE = Path(__file__).with_name("report.css")
MOST_LINES = 60  # of a forest plot
CLASSES = {PROMOTED: "good", NOT_PROMOTED: "bad", NO_VERDICT: "none"}


def to_html(report: Report) -> str:
    """The page."""
    sections = [
        _verdicts(report), _differences(report), next_steps(report), _pareto(report), _budgets(report), _times(report),
        _systems(report), _method(report),
    ]  # fmt: skip
    warnings = report.warnings()
    note = f'<div class="note"><strong>To keep in mind</strong>{bullets(warnings)}</div>' if warnings else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(report.title)}</title><style>{STYLE.read_text()}</style></head><body>"
        '<a class="skip" href="#main">To the verdicts</a>'
        f"<header><h1>{html(report.title)}</h1>"
        f'<p class="soft">{len(report.systems)} systems against <strong>{html(report.anchor)}</strong> on '
        f"{STANDS[report.stands_on]}. Made {html(report.created)} with bem_peft {html(report.bem_peft_version)}.</p>"
        f'</header><main id="main">{note}{"".join(sections)}</main>'
        "<footer><p>The numbers of this page are in <code>report.json</code> beside it.</p></footer></body></html>\n"
    )


def _verdicts(report: Report) -> str:
    rows = [(p.system, badge(p.verdict, CLASSES[p.verdict]), bullets(p.reasons)) for p in report.promotions]
    rule = (
        "A system is promoted when it keeps the budget, is not inferior on any slice, and is surely on a Pareto frontier or "
        "better on held-out items after correction. What is not known is never a pass."
    )
    if len(rows) > 12 and all(p.verdict == report.promotions[0].verdict for p in report.promotions):
        common = [r for r in report.promotions[0].reasons if all(r in p.reasons for p in report.promotions)]
        shown = badge(report.promotions[0].verdict, CLASSES[report.promotions[0].verdict])
        return f"<h2>Verdicts</h2><p>{rule}</p><p>All {len(rows)} systems: {shown}</p>{bullets(common)}"
    return f"<h2>Verdicts</h2><p>{rule}</p>" + table(
        "Verdict on each system", ("system", "verdict", "why"), rows, is_stacked=True
    )


def _differences(report: Report) -> str:
    if not report.comparisons:
        return (
            "<h2>Differences</h2><p>No item scores are known, so there is no paired difference and no interval: "
            "only what was published stands below.</p>"
        )
    found = [(f"{name}, {r.slice}", r) for name, results in report.comparisons.items() for r in results]
    parts = ["<h2>Differences from the anchor</h2>"]
    for metric in dict.fromkeys(r.metric for _, r in found):
        chosen = [(label, r) for label, r in found if r.metric == metric][:MOST_LINES]
        more = f" The first {MOST_LINES} lines; the table has all." if len(chosen) == MOST_LINES else ""
        plot = forest_plot(chosen, f"Paired differences in {metric}")
        caption = (
            f"{metric}: intervals of {report.confidence:.0%} over seeds and items; right of zero is better than the anchor, "
            f"also where less of the metric is better (nll).{more}"
        )
        parts.append(figure(f"Plot of differences in {metric}", plot, caption))
    rows = [
        (
            name, r.metric, r.slice, interval_text(r), f"{r.adjusted_p_value:.3g}",
            "-" if r.comparison.d_z is None else f"{r.comparison.d_z:+.2f}", f"{r.comparison.mde:.3g}",
            f"{r.comparison.seeds} x {r.comparison.items}",
            badge(verdict_text(r), "good" if r.is_better else "bad" if r.is_worse else "none"),
        )
        for name, results in report.comparisons.items() for r in results
    ]  # fmt: skip
    head = ("system", "metric", "slice", "difference", "adjusted p", "d_z", "detectable", "seeds x items", "reading")
    caption = f"Differences, above 0 is better ({report.correction} correction over systems, metrics and slices)"
    parts.append(table(caption, head, rows, (3, 4, 5, 6, 7)))
    refused = {r.comparison.refusal for _, r in found if r.comparison.refusal is not None}
    notes = [f"{left.metric}, {left.slice}: {left.reason} ({name})"
             for name, lefts in report.unjudged.items() for left in lefts]  # fmt: skip
    if refused or notes:
        parts.append(f"<p>Nothing is claimed of:</p>{bullets([*sorted(refused), *notes])}")
    return "".join(parts)


def _pareto(report: Report) -> str:
    if not report.pareto:
        return ""
    quality, *costs = report.objectives
    parts = ["<h2>Pareto frontiers</h2><p>Filled points are on the frontier of the two axes; the anchor is red.</p>"]
    for alike in _alike(report, costs):
        cost, *others = alike
        plot = pareto_plot(report.pareto, cost, quality, report.anchor)
        front = [point.name for point in frontier_of_two(report.pareto, cost, quality)]
        caption = f"{quality.name} against {cost.name}"
        if others:
            caption += f"; the systems stand in the same order by {', '.join(o.name for o in others)}, drawn once"
        parts.append(figure(f"Plot of {quality.name} against {cost.name}", plot, caption))
        if len(report.pareto) > LABELS:
            parts.append(f"<p>On the frontier, from the cheapest:</p>{bullets(front, 'ol')}")
    names = [objective.name for objective in report.objectives]
    rows = [
        (
            p.name, *(number(p.values[name]) for name in names),
            "yes" if p.is_on_frontier else "no", "-" if p.probability is None else f"{p.probability:.0%}",
            ", ".join(p.dominated_by[:3]) + (f" and {len(p.dominated_by) - 3} more" if len(p.dominated_by) > 3 else ""),
        )
        for p in report.pareto
    ]  # fmt: skip
    head = ("system", *names, "on the frontier of all", "probability", "dominated by")
    parts.append(table("All objectives together", head, rows, tuple(range(1, len(names) + 1))))
    return "".join(parts)


def _alike(report: Report, costs: Sequence[Objective]) -> list[list[Objective]]:
    """The costs in groups by which the systems stand in one order; a plot of the others of a group would show no more."""
    groups: dict[tuple[int, ...], list[Objective]] = {}
    for cost in costs:
        values = [point.values[cost.name] for point in report.pareto]
        order = sorted(set(values))
        groups.setdefault(tuple(order.index(value) for value in values), []).append(cost)
    return list(groups.values())


def _budgets(report: Report) -> str:
    lines = [
        (s.name, line["quantity"], number(line["measured"]) if line["measured"] is not None else "-",
         number(line["anchor"]), "-" if line["deviation_ratio"] is None else f"{line['deviation_ratio']:+.2%}",
         badge(line["verdict"], "good" if line["verdict"] == "PASS" else "bad" if line["verdict"] == "FAIL" else "none"),
         line["how"])
        for s in report.systems for line in s.budget or []
    ]  # fmt: skip
    if not lines:
        return "<h2>Budgets</h2><p>No budget was measured.</p>"
    head = ("system", "quantity", "measured", "anchor", "deviation", "verdict", "how")
    return "<h2>Budgets</h2>" + table("What each adapter costs, against its anchor", head, lines, (2, 3, 4))


def _times(report: Report) -> str:
    found = report.profiles
    if found is None:
        return ""
    parts = [f"<h2>Latency</h2><p>{html(found.how())}</p>"]
    for workload in found.workloads:
        name = f"{workload.kind}, batch {workload.batch}, {workload.tokens:,} tokens"
        plot = latency_plot(base_first(found.at(workload), found.anchor), found.anchor, f"Times of {name}")
        caption = (
            f"{name}: the box holds half of the runs, the line in it is the median, the whisker reaches from the 5th to the "
            "95th percentile, the point is the 99th."
        )
        parts.append(figure(f"Plot of times, {name}", plot, caption))
    kinds = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "none"}
    verdict = COLUMNS.index("verdict")
    rows = [
        tuple(badge(cell, kinds[cell]) if i == verdict and cell in kinds else cell for i, cell in enumerate(row))
        for row in found.rows()
    ]
    parts.append(table("Times and rates", COLUMNS, rows, (2, 3, 4, 5, 6, 7, 9, 10)))
    return "".join(parts)


def _systems(report: Report) -> str:
    def seeds(system: SystemResult) -> str:
        return ", ".join(map(str, system.seeds)) or "-"

    names = report.values
    rows = [
        (s.name, s.method, seeds(s), budget_text(s), *(number(s.values[name]) for name in names))
        for s in report.systems
    ]  # fmt: skip
    head = ("system", "method", "seeds", "budget", *names)
    return "<h2>Systems</h2>" + table("Values, mean over seeds", head, rows, tuple(range(4, 4 + len(names))))


def _method(report: Report) -> str:
    methods = sorted({r.comparison.method for results in report.comparisons.values() for r in results})
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
    corrected = f"p-values corrected over systems, metrics and slices: {report.correction}"
    mean = "nll is the mean over items of an item's loss a token; the loss of a run is the mean over all tokens"
    lines = [*methods, corrected, mean, *sorted(hardware - {""}), *([", ".join(sorted(versions))] if versions else [])]
    return f"<h2>How</h2>{bullets(lines)}"
