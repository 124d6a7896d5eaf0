"""What to do next: where a difference's uncertainty comes from, and what one more seed or more items would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bem_peft.evaluation.intervals import too_few
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.planning import Components, Plan

MORE_ITEMS = 500


@dataclass(frozen=True)
class Outlook:
    """Of one system's difference from the anchor under one metric, on all items.

    shares: "seed", "item", "seed x item": what each makes of the variance, together 1. now, more_seeds (one more),
    more_items (500 more): what the design gives. `margin`: that the powers are of; 0: none was asked for.
    """

    system: str
    metric: str
    margin: float
    shares: dict[str, float]
    now: Plan
    more_seeds: Plan
    more_items: Plan

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outlooks(
    system: str, pairs: Mapping[str, PairedScores], margins: Mapping[str, float], confidence: float
) -> list[Outlook]:
    """One a metric; nothing for a metric of one seed, or of too few items."""
    found = []
    for metric, pair in pairs.items():
        seeds, items = pair.difference.shape
        if seeds < 2 or too_few(pair.difference, pair.cluster_index) is not None:
            continue
        parts, margin = Components.of(pair.difference, pair.cluster_index), margins.get(metric, 0.0)
        now, more_seeds, more_items = (
            parts.plan(k, n, margin=margin, confidence=confidence)
            for k, n in ((seeds, items), (seeds + 1, items), (seeds, items + MORE_ITEMS))
        )
        found.append(
            Outlook(system, metric, margin, parts.shares(), now, _no_less(now, more_seeds), _no_less(now, more_items))
        )
    return found


def _no_less(now: Plan, more: Plan) -> Plan:
    """What more data give, which is what there is now where the estimate has less: one may leave the new data out.

    With many items the seeds alone are left in the variance, whose few degrees of freedom have a wider t.
    """
    power = None if more.power is None or now.power is None else max(more.power, now.power)
    return replace(
        more, half_width=min(more.half_width, now.half_width), detectable=min(more.detectable, now.detectable),
        power=power,
    )  # fmt: skip
