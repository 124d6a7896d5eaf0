"""Search for the sizes whose cost is nearest to a goal.

Every quantity grows with every size. Along one size the largest deviation therefore falls, then rises: its best value
is next to where the highest deviation above the anchor passes the highest below, and bisection finds it. With several
free sizes this is done on the last, for each choice of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch

from bem_peft.budget.site_cost import ModelCost
from bem_peft.budget.sizes import Sizes

FIRST = 256  # a size that fits no site from 1 to here fits none


class Deviation(NamedTuple):
    """How far a cost is from the goal's, each quantity as measured / goal - 1, and the largest of them either way."""

    worst: float
    ratios: dict[str, float]

    @property
    def is_above(self) -> bool:
        """Whether the highest is at least as far above the anchor as the lowest is below it."""
        return max(self.ratios.values()) >= -min(self.ratios.values())


class SizeSearch:
    """Looks for the sizes nearest to `goal`; `tried`: how far each is from it, None where it does not fit the sites."""

    def __init__(self, sizes: Sizes, cost: ModelCost, goal: Mapping[str, float]) -> None:
        self.sizes, self.cost, self.goal = sizes, cost, goal
        self.tried: dict[tuple[int, ...], Deviation | None] = {}
        self.crossing = 0  # place of the last size's value at the crossing that was found last

    def deviation(self, values: tuple[int, ...]) -> Deviation | None:
        """Of these sizes from the goal, or None where they do not fit the sites."""
        if values not in self.tried:
            changed, found = self.sizes.config_with(values), None
            with torch.device("meta"):
                measured = None if changed is None else self.cost.try_sizes(changed)
            if measured is not None:
                ratios = {name: measured[name] / self.goal[name] - 1 for name in self.goal}
                found = Deviation(max(map(abs, ratios.values())), ratios)
            self.tried[values] = found
        return self.tried[values]

    def best(self) -> tuple[tuple[int, ...], Deviation] | None:
        """The nearest sizes, or None where none fits."""
        best = None
        for outer in self.outer(()):
            for values in self.nearest(outer):
                found = self.deviation(values)
                if found is not None and (best is None or found.worst < best[1].worst):
                    best = values, found
        return best

    def least_so_far(self) -> float:
        return min((found.worst for found in self.tried.values() if found is not None), default=float("inf"))

    def outer(self, head: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """`head` with values of all names but the last, up to where the smallest last one costs too much already."""
        names, choices = self.sizes.names, self.sizes.choices
        if len(head) == len(names) - 1:
            yield head
            return
        is_given, has_fitted = names[len(head)] in choices, False
        for i, value in enumerate(self.sizes.accepted(head)):
            smallest = self.smallest_that_fits((*head, value))
            if smallest is None:
                if not is_given and (has_fitted or i >= FIRST):
                    break  # too large for the sites
                continue
            has_fitted = True
            if not is_given and min(smallest.ratios.values()) > self.least_so_far():
                break  # every quantity is above the anchor, farther than what was found
            yield from self.outer((*head, value))

    def smallest_that_fits(self, head: tuple[int, ...]) -> Deviation | None:
        """The deviation at the smallest values of the other names that fit the sites, the last name's tried first."""
        names, start = self.sizes.names, self.sizes.first(head)
        found = self.deviation(start)
        if found is not None or len(start) < len(names) or names[-1] in self.sizes.choices:
            return found
        for value in islice(self.sizes.accepted(start[:-1]), 1, FIRST):
            found = self.deviation((*start[:-1], value))
            if found is not None:
                break
        return found

    def nearest(self, outer: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The two neighbours among which the best last value lies; all of them where they are given."""
        values = self.sizes.accepted(outer)
        if self.sizes.names[-1] in self.sizes.choices:
            return [(*outer, value) for value in values]

        def at(i: int) -> Deviation | None:
            value = values.get(i)
            return None if value is None else self.deviation((*outer, value))

        def is_above(i: int) -> bool:  # also past the last value
            found = at(i)
            return found is None or found.is_above

        low = 0  # values before `low` lie below the crossing, those from `high` on at or above it
        while low + 1 < FIRST and values.get(low + 1) is not None and at(low) is None:
            low += 1  # too small for the sites
        high, step = max(low, self.crossing), 1  # other sizes a little larger move it little: double from there
        if is_above(high):
            while low < high:
                below = max(low, high - step)
                if not is_above(below):
                    low = below + 1
                    break
                high, step = below, step * 2
        else:
            while not is_above(high + step):  # large sizes are the costly ones to try
                high, step = high + step, step * 2
            low, high = high + 1, high + step
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_above(middle) else (middle + 1, high)
        self.crossing = high
        near = [values.get(i) for i in (high - 1, high) if i >= 0]
        return [(*outer, value) for value in near if value is not None]
