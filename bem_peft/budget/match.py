"""The sizes of a config that cost what an anchor costs, found without the model's weights (`site_cost.py`).

Every quantity grows with every size. Along one size the largest deviation therefore falls, then rises: its best value
is next to where the highest deviation above the anchor passes the highest below, and bisection finds it. With several
free sizes this is done on the last, for each choice of the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from peft import PeftConfig
from torch import nn

from bem_peft.budget.check import adapted_copy, at_sites_of, check_positive
from bem_peft.budget.site_cost import MATCHED, ModelCost
from bem_peft.budget.sizes import Sizes, sizes_of

# set by the package, since budgets know no method: an adapter in one line, and (rate, source) of what was measured for
# an adapter, None for a method for which nothing was
parse_anchor: Callable[[str], PeftConfig] | None = None
suggest_rate: Callable[[nn.Module, PeftConfig], tuple[float, str] | None] | None = None
FIRST = 256  # a size that fits no site from 1 to here fits none


@dataclass(frozen=True)
class BudgetMatch:
    """The best config, and how far each matched quantity is from the anchor's (measured / anchor - 1).

    `learning_rate` is `LearningRates.suggest`'s for the config; None where none was measured for its method, and
    `learning_rate_source` then is empty.
    """

    config: PeftConfig
    sizes: Mapping[str, int]
    measured: Mapping[str, float]
    anchor: Mapping[str, float]
    deviation_ratio: Mapping[str, float]
    tolerance_ratio: float
    tried: int
    learning_rate: float | None = None
    learning_rate_source: str = ""

    @property
    def is_met(self) -> bool:
        """Whether every quantity is within the tolerance."""
        return self.worst <= self.tolerance_ratio

    @property
    def worst(self) -> float:
        """The largest deviation, as a ratio."""
        return max(map(abs, self.deviation_ratio.values()))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        parts = [
            f"{name} {self.measured[name]:,.0f} for {self.anchor[name]:,.0f} ({deviation:+.2%})"
            for name, deviation in self.deviation_ratio.items()
        ]
        text = f"{type(self.config).__name__}({sizes}): " + "; ".join(parts)
        if self.is_met:
            return text
        missed = [n for n, d in self.deviation_ratio.items() if abs(d) > self.tolerance_ratio]
        return (
            f"{text}. Nearest; within {self.tolerance_ratio:.0%} no choice of {', '.join(self.sizes)} meets "
            f"{' and '.join(missed)}: {self._reason()}"
        )

    def _reason(self) -> str:
        values = self.deviation_ratio.values()
        if len(values) > 1 and min(values) < 0 < max(values):
            high = max(self.deviation_ratio, key=lambda name: self.deviation_ratio[name])
            low = min(self.deviation_ratio, key=lambda name: self.deviation_ratio[name])
            return (
                f"{high} already lies above the anchor where {low} lies below it. Let another size change as well "
                f"(`free`; in an experiment `budget.match`), widen the tolerance (`tolerance_ratio`; "
                f"`budget.tolerance_ratio: {self.worst + 0.005:.2f}`), or match one of them alone "
                f"(`match=[{high!r}]`; `budget.quantities: [{high}]`): the other is then whatever it is."
            )
        return (
            "the next smaller and larger sizes lie farther away. Let another size change as well (`free`; in an "
            "experiment `budget.match`), or widen the tolerance (`tolerance_ratio`; `budget.tolerance_ratio`)."
        )


def match_budget(
    model: nn.Module,
    config: PeftConfig,
    anchor: PeftConfig | str,
    *,
    free: Sequence[str] | Mapping[str, Sequence[int] | None] | None = None,
    match: Sequence[str] = MATCHED,
    tolerance_ratio: float = 0.05,
    limit: int = 1024,
) -> BudgetMatch:
    """Find the values of `free` for which `config` costs what `anchor` costs on `model`.

    Args:
        model: the base model; its weights are not read, it may be on the meta device.
        config: everything but the free sizes stays as it is.
        anchor: config of any PEFT method that adapts single modules; or such a config in one line, "lora:r=8", which
            stands at the sites of `config` where it names none.
        free: names of integer fields of `config`, or name -> the values to choose from (None: all that it accepts);
            None: the method's own sizes, and where these do not meet the anchor, what it can be folded
            by as well (`further_sizes`, PT3's `u_dim`).
        match: of "params" (trainable) and "flops" (forward and backward, a token).
        tolerance_ratio: 0.05 is 5 %.
        limit: largest value that a size may take.

    Returns:
        The match with the smallest of the largest deviations; `is_met` says whether it is within the tolerance.

    Raises:
        TypeError: `config` or `anchor` is no PeftConfig.
        ValueError: an unknown field or quantity, or no value of the free sizes that the config accepts.
    """
    if getattr(config, "budget", None) is not None:  # its sizes are chosen here
        config = copy.copy(config)
        config.budget = None
    is_written = isinstance(anchor, str)
    if isinstance(anchor, str):
        assert parse_anchor is not None
        anchor = parse_anchor(anchor)
    for name, given in (("config", config), ("anchor", anchor)):
        if not isinstance(given, PeftConfig):
            raise TypeError(f"`{name}` = {given!r}: must be a PeftConfig, as LoraConfig(r=8).")
    check_positive("tolerance_ratio", tolerance_ratio)
    sizes = sizes_of(config, free, limit)
    if not match or set(match) - set(MATCHED):
        raise ValueError(f"`match` = {list(match)}: must be a choice of {', '.join(MATCHED)}.")
    with torch.device("meta"):
        fitting = config
        try:  # which sites it has does not depend on the sizes
            cost = ModelCost(model, config)
        except ValueError:  # its own sizes do not fit
            fitting = sizes.smallest()
            cost = ModelCost(model, fitting)
        if is_written:
            anchor = at_sites_of(anchor, lambda: adapted_copy(model, fitting))
        target = ModelCost(model, anchor)(anchor)
    if cost.has_fixed_parts:
        raise ValueError(
            f"`config` = {type(config).__name__} with `target_parameters`: a size search knows adapters of modules, "
            "and this package's of fused experts; set its sizes yourself."
        )
    goal = {name: target[name] for name in match}
    if any(map(math.isnan, goal.values())):
        raise ValueError(
            f"the anchor {type(anchor).__name__} adapts whole parameters (`target_parameters`), whose update PEFT "
            "builds at every call however few tokens there are: its FLOPs are none of a token; set match=['params']."
        )
    if not all(goal.values()):
        raise ValueError(f"the anchor {type(anchor).__name__} costs nothing in {[n for n in goal if not goal[n]]}.")
    search = _Search(sizes, cost, goal)
    best = search.best()
    if free is None and (best is None or best[1].worst > tolerance_ratio):
        for name, value in _further(config, cost):
            wider = _Search(Sizes(config, (name, *sizes.names), {name: [value]}, limit), cost, goal)
            found = wider.best()
            if found is not None and (best is None or found[1].worst < best[1].worst):
                best, search = found, wider
            if best is not None and best[1].worst <= tolerance_ratio:
                break
    if best is None:
        raise ValueError(
            f"no value of {', '.join(sizes.names)} up to {limit} fits the sites of {type(config).__name__}."
        )
    values, deviation = best
    sizes = search.sizes
    chosen = sizes.config_with(values)
    assert chosen is not None
    assert suggest_rate is not None
    rate = suggest_rate(model, chosen)
    return BudgetMatch(
        config=chosen,
        sizes=dict(zip(sizes.names, values, strict=True)),
        measured={name: (ratio + 1) * goal[name] for name, ratio in deviation.ratios.items()},
        anchor=goal,
        deviation_ratio=deviation.ratios,
        tolerance_ratio=tolerance_ratio,
        tried=len(search.tried),
        learning_rate=None if rate is None else rate[0],
        learning_rate_source="" if rate is None else rate[1],
    )


def _further(config: PeftConfig, cost: ModelCost) -> list[tuple[str, int]]:
    """(field, value) of what the method can change beside its sizes, the likeliest first."""
    further = getattr(config, "further_sizes", None)
    found: dict[str, list[int]] = {} if further is None else further(cost.widths)
    return [(name, value) for name, values in found.items() for value in values]


class _Deviation(NamedTuple):
    """How far a cost is from the goal's, each quantity as measured / goal - 1, and the largest of them either way."""

    worst: float
    ratios: dict[str, float]

    @property
    def is_above(self) -> bool:
        """Whether the highest is at least as far above the anchor as the lowest is below it."""
        return max(self.ratios.values()) >= -min(self.ratios.values())


class _Search:
    """Looks for the sizes nearest to `goal`; `tried`: how far each is from it, None where it does not fit the sites."""

    def __init__(self, sizes: Sizes, cost: ModelCost, goal: Mapping[str, float]) -> None:
        self.sizes, self.cost, self.goal = sizes, cost, goal
        self.tried: dict[tuple[int, ...], _Deviation | None] = {}

    def deviation(self, values: tuple[int, ...]) -> _Deviation | None:
        """Of these sizes from the goal, or None where they do not fit the sites."""
        if values not in self.tried:
            changed, found = self.sizes.config_with(values), None
            with torch.device("meta"):
                measured = None if changed is None else self.cost.try_sizes(changed)
            if measured is not None:
                ratios = {name: measured[name] / self.goal[name] - 1 for name in self.goal}
                found = _Deviation(max(map(abs, ratios.values())), ratios)
            self.tried[values] = found
        return self.tried[values]

    def best(self) -> tuple[tuple[int, ...], _Deviation] | None:
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

    def smallest_that_fits(self, head: tuple[int, ...]) -> _Deviation | None:
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

        def at(i: int) -> _Deviation | None:
            value = values.get(i)
            return None if value is None else self.deviation((*outer, value))

        def is_above(i: int) -> bool:  # also past the last value
            found = at(i)
            return found is None or found.is_above

        low, step = 0, 1  # values before `low` lie below the crossing, those from `high` on at or above it
        while low + 1 < FIRST and values.get(low + 1) is not None and at(low) is None:
            low += 1  # too small for the sites
        while not is_above(low + step):  # double first: large sizes are the costly ones to try
            low, step = low + step, step * 2
        high = low + step
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_above(middle) else (middle + 1, high)
        near = [values.get(i) for i in (high - 1, high) if i >= 0]
        return [(*outer, value) for value in near if value is not None]
