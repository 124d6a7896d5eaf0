r"""Where the uncertainty of a paired difference comes from, and what more seeds or items would give.

    D[k, i] = mean + item_i + seed_k + rest_ki
    variance of the mean of K seeds x N items:  item / N + seed / K + rest / (K N)

The three variances are solved for from the mean squares of `variance_parts`, so that the plan of the design that there
is has the interval and the detectable difference of its comparison (intervals.py, without skewness). One may come out
below 0; it counts as 0 in `shares`. Items of a cluster count as they stand: `item` holds what they share, so that N
more items mean clusters of the same sizes.

Source: Searle, Casella and McCulloch, Variance components, 1992, 4.2 (the two-way crossed random model).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from bem_peft.evaluation.intervals import check_differences, two_way
from bem_peft.evaluation.variance import Parts, variance_parts


@dataclass(frozen=True)
class Plan:
    """What a design of `seeds` x `items` gives. half_width: of the interval. detectable: the smallest true difference
    that is found with 80 %. power: of showing that an equal system is not worse by the margin; None without a
    margin."""

    seeds: int
    items: int
    half_width: float
    detectable: float
    power: float | None


@dataclass(frozen=True)
class Components:
    """The variances of one observation by item, seed and rest, estimated from `seeds` x `items`."""

    item: float
    seed: float
    rest: float
    seeds: int
    items: int
    degrees_an_item: float  # degrees of freedom of the items' part, a ratio to the items

    @classmethod
    def of(cls, difference: np.ndarray, clusters: np.ndarray | None = None) -> Components:
        """Raises ValueError for one seed (its spread is unknown) and for fewer than 3 items or clusters."""
        found = check_differences(difference, clusters)
        seeds, items = found.shape
        if seeds < 2:
            raise ValueError("`difference` has one seed: how far seeds differ is unknown; run at least 2.")
        parts = variance_parts(found, clusters)
        by_item, by_seed, whole = parts.items * items, parts.seeds * seeds, parts.both * seeds * items
        rest = (whole - by_item - by_seed) / (1.0 - 1.0 / seeds - 1.0 / items)
        return cls(by_item - rest / seeds, by_seed - rest / items, rest, seeds, items, parts.items_df / items)

    def shares(self) -> dict[str, float]:
        """{"seed", "item", "seed x item"}: what each makes of the variance of the mean, together 1."""
        parts = {
            "seed": max(0.0, self.seed) / self.seeds, "item": max(0.0, self.item) / self.items,
            "seed x item": max(0.0, self.rest) / (self.seeds * self.items),
        }  # fmt: skip
        whole = sum(parts.values())
        return {name: value / whole if whole else 0.0 for name, value in parts.items()}

    def plan(
        self, seeds: int, items: int, *, margin: float = 0.0, confidence: float = 0.95, power: float = 0.8
    ) -> Plan:
        """What `seeds` x `items` of the same kind would give."""
        v_i = max(0.0, self.item + self.rest / seeds) / items
        v_s = max(0.0, self.seed + self.rest / items) / seeds
        v_c = max(0.0, self.item + self.seed + self.rest) / (seeds * items)
        df_i = max(1.0, self.degrees_an_item * items)
        parts = Parts(v_i, v_s, v_c, df_i, 0.0, float(items), items, float(items), 1.0 / items)
        error, df, half = two_way(parts, seeds, confidence)  # as wide as without skewness
        if error == 0.0:
            return Plan(seeds, items, 0.0, 0.0, 1.0 if margin > 0.0 else None)
        chance = float(stats.t.cdf((margin - half) / error, df)) if margin > 0.0 else None
        return Plan(seeds, items, half, half + error * float(stats.t.ppf(power, df)), chance)


def required_items(
    difference: np.ndarray,
    effect: float,
    clusters: np.ndarray | None = None,
    *,
    seeds: int | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Items that find a true difference of `effect` with `power`, with this many seeds (None: as many as D has).

    Returns:
        The number, or None where the seeds' own spread hides the effect however many items there are: add seeds.

    Raises:
        ValueError: one seed in D (its spread over seeds is unknown), or an effect of 0.
    """
    found = Components.of(difference, clusters)
    if effect == 0.0:
        raise ValueError("`effect` = 0: no number of items finds it.")
    planned, low, high = found.seeds if seeds is None else seeds, 3, 10**9

    def finds(items: int) -> bool:
        return found.plan(planned, items, confidence=confidence, power=power).detectable <= abs(effect)

    if not finds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if finds(middle) else (middle + 1, high)
    return low
