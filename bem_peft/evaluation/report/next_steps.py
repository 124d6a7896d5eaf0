"""The page's part on what to do next: who is probably the best, what the uncertainty is made of, what more would
give."""

from __future__ import annotations

from bem_peft.evaluation.outlook import MORE_ITEMS, Outlook
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.planning import Plan
from bem_peft.evaluation.report.elements import badge, figure, table
from bem_peft.evaluation.report.rank_plots import critical_difference_plot, heat_map, rate_plot
from bem_peft.evaluation.report.report import Report

MOST_MAPS = 6  # systems whose seeds and items are drawn


def next_steps(report: Report) -> str:
    """The section; empty where there are no item scores."""
    parts = [_ranking(report), _outlooks(report), _maps(report), _curves(report)]
    return "<h2>What to do next</h2>" + "".join(parts) if any(parts) else ""


def _ranking(report: Report) -> str:
    found = report.ranking
    if found is None:
        return ""
    ordered = sorted(found.probability_best.items(), key=lambda pair: -pair[1])
    rows = [
        (name, f"{chance:.0%}", f"{found.mean_ranks[name]:.2f}" if name in found.mean_ranks else "-")
        for name, chance in ordered
    ]
    caption = (
        f"{found.metric}: the mean rank over items, 1 is best. A bar joins neighbours that are not told apart, by "
        "intervals over seeds and items with Holm's correction over all pairs."
    )
    plot = critical_difference_plot(found, report.anchor)
    heads = ("system", "probably the best", "mean rank")
    title = f"How probably each is the best by {found.metric}, over other seeds and items"
    return figure(f"Plot of mean ranks by {found.metric}", plot, caption) + table(title, heads, rows, (1, 2))


def _outlooks(report: Report) -> str:
    if not report.outlooks:
        return ""
    rows = [
        (
            found.system, found.metric, *(f"{found.shares[name]:.0%}" for name in ("seed", "item", "seed x item")),
            *(_plan(plan) for plan in (found.now, found.more_seeds, found.more_items)), _advice(found),
        )
        for found in report.outlooks
    ]  # fmt: skip
    shape = report.outlooks[0].now
    head = (
        "system", "metric", "seed", "item", "seed x item", f"now ({shape.seeds} x {shape.items})", "one more seed",
        f"{MORE_ITEMS} more items", "narrows it more",
    )  # fmt: skip
    note = (
        "Shares of the variance of the difference. A design is given by half the width of its interval, the smallest "
        "difference that it finds four times in five, and, where a margin was asked for, its power to show that an "
        "equal system is no worse."
    )
    return f"<p>{note}</p>" + table(
        "Where the uncertainty comes from, and what more would give", head, rows, tuple(range(2, 8))
    )


def _plan(plan: Plan) -> str:
    power = "" if plan.power is None else f", power {plan.power:.0%}"
    return f"±{plan.half_width:.3g}, finds {plan.detectable:.3g}{power}"


def _advice(found: Outlook) -> str:
    if found.now.half_width == 0.0:
        return "nothing to narrow"
    more_seeds, more_items = found.more_seeds.half_width, found.more_items.half_width
    return "a seed" if more_seeds < more_items else f"{MORE_ITEMS} items"


def _maps(report: Report) -> str:
    if report.ranking is None:
        return ""
    metric = report.ranking.metric
    systems = {system.name: system for system in report.systems}
    others = [name for name in report.ranking.mean_ranks if name != report.anchor and name in report.comparisons]
    parts: list[str] = []
    rows: list[tuple[str, ...]] = []
    for name in others[:MOST_MAPS]:
        pair = PairedScores(systems[name].scores[metric], systems[report.anchor].scores[metric])
        plot = heat_map(pair.difference, pair.a.seeds, f"{name} against {report.anchor}, {metric}")
        caption = f"{name}: its difference from {report.anchor} in {metric}, a row a seed, the items by their mean."
        parts.append(figure(f"Heat map of {name}, seeds by items", plot, caption))
        means = pair.difference.mean(1)
        rows += [(name, str(seed), f"{mean:+.3g}") for seed, mean in zip(pair.a.seeds, means, strict=True)]
    if len(others) > MOST_MAPS:
        parts.append(f"<p>The {MOST_MAPS} best by mean rank are drawn.</p>")
    if rows:
        title = f"Mean difference a seed in {metric}, above 0 is better"
        parts.append(table(title, ("system", "seed", "mean"), rows, (1, 2)))
    return "".join(parts)


def _curves(report: Report) -> str:
    parts: list[str] = []
    for curve in report.curves:
        state = (
            badge("bracketed", "good") if curve.is_bracketed else badge("best at an edge: try a rate beyond it", "bad")
        )
        caption = (
            f"{curve.metric} of runs that differ by their learning rate alone; a ring is a seed, a point the mean. "
            f"Best: {curve.systems[curve.best]}."
        )
        parts.append(figure(f"Plot of {curve.metric} over the learning rate", rate_plot(curve), caption))
        found = zip(curve.systems, curve.rates, curve.means, strict=True)
        rows = [(name, f"{rate:.3g}", f"{mean:.4g}") for name, rate, mean in found]
        parts.append(f"<p>{state}</p>")
        parts.append(table(f"{curve.metric} by learning rate", ("system", "rate", "mean"), rows, (1, 2)))
    return "".join(parts)
