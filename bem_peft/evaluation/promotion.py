"""Who may replace the anchor: budget kept, nowhere worse, and somewhere surely better, on items that were held out.

    promoted  <=>  budget met  and  no slice inferior  and  (on a Pareto frontier  or  a Slice-B gain after correction)

One seed, a development slice, too few effective clusters or an unmeasured budget earn no verdict: what is not known is
never a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bem_peft.evaluation.pareto import ParetoPoint
from bem_peft.evaluation.slices import HELD_OUT, WHOLE, SliceResult, Unjudged, interval_text, promoting

PROMOTED, NOT_PROMOTED, NO_VERDICT = "PROMOTED", "NOT PROMOTED", "NO VERDICT"
FRONTIER_PROBABILITY = 0.95


@dataclass(frozen=True)
class Promotion:
    """The verdict on one system, with every reason in words."""

    system: str
    verdict: str
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"system": self.system, "verdict": self.verdict, "reasons": list(self.reasons)}


def judge(
    system: str,
    results: Sequence[SliceResult],
    budget_is_met: bool | None,
    point: ParetoPoint | None,
    unjudged: Sequence[Unjudged] = (),
) -> Promotion:
    """Apply the rule.

    Args:
        results: the system against the anchor, every metric and slice.
        budget_is_met: None where it was not measured.
        point: its place among all systems, or None.
        unjudged: metrics and slices of which nothing can be said.
    """
    unknown, against, reasons = [], [], []
    held_out = [found for found in results if found.stands_on == HELD_OUT]
    if not held_out:
        unknown.append("no result stands on Slice-B (held out): only that promotes")
    if any(found.comparison.is_conditional for found in held_out):
        unknown.append("one seed: nothing is known of other seeds; run at least 3")
    for found in held_out:
        if found.comparison.refusal is not None:
            unknown.append(f"no verdict on {found.metric}, {found.slice}: {found.comparison.refusal}")
    for left in unjudged:
        if left.slice == WHOLE and held_out:
            unknown.append(f"no verdict on {left.metric}, {left.slice}: {left.reason}")
    if budget_is_met is None:
        unknown.append("the budget was not measured")
    elif budget_is_met:
        reasons.append("the budget is kept")
    else:
        against.append("the budget is not kept")
    inferior = [found for found in held_out if found.is_inferior]
    for found in inferior:
        against.append(
            f"may be worse by more than the margin on {found.metric}, {found.slice}: the interval reaches "
            f"{found.comparison.low:+.4g}, the margin is {found.margin:.4g}"
        )
    if held_out and not inferior:
        reasons.append(f"not inferior on any of {len(held_out)} metrics and slices")
    gains = promoting(results)
    for found in gains:
        reasons.append(
            f"better on {found.metric}, {found.slice}: {interval_text(found)}, adjusted p {found.adjusted_p_value:.3g}"
        )
    is_sure = point is not None and point.is_on_frontier and (point.probability or 0.0) >= FRONTIER_PROBABILITY
    if point is not None and point.is_on_frontier:
        chance = "not known" if point.probability is None else f"{point.probability:.0%}"
        reasons.append(f"on the Pareto frontier; probability {chance}, {FRONTIER_PROBABILITY:.0%} is asked for")
    if not gains and not is_sure:
        against.append("neither surely on the Pareto frontier nor surely better on Slice-B")
    if unknown:
        return Promotion(system, NO_VERDICT, (*unknown, *against, *reasons))
    return Promotion(system, NOT_PROMOTED if against else PROMOTED, (*against, *reasons))
