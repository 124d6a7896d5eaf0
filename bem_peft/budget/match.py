"""The sizes of a config that cost what an anchor costs, found without the model's weights (`site_cost.py`).

Every quantity grows with every size. Along one size the largest deviation therefore falls, then rises: its best value
is next to where the highest deviation above the anchor passes the highest below, and bisection finds it. With several
free sizes this is done on the last, for each choice of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig
from torch import nn

from bem_peft.budget.check import check_positive
from bem_peft.budget.site_cost import MATCHED, ModelCost

FIRST = 256  # a size that fits no site from 1 to here fits none
# what PEFT calls the size of its own methods
PEFT_SIZES = {"LORA": ("r",), "LOKR": ("r",), "LOHA": ("r",), "ADALORA": ("init_r",), "VERA": ("r",)}


@dataclass(frozen=True)
class BudgetMatch:
    """The best config, and how far each matched quantity is from the anchor's (measured / anchor - 1)."""

    config: PeftConfig
    sizes: Mapping[str, int]
    measured: Mapping[str, float]
    anchor: Mapping[str, float]
    deviation_ratio: Mapping[str, float]
    tolerance_ratio: float
    tried: int

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
            return f"{high} already lies above the anchor where {low} lies below it. Free another size, or match one."
        return "the next smaller and larger sizes lie farther away. Free another size, or widen the tolerance."


def match_budget(
    model: nn.Module,
    config: PeftConfig,
    anchor: PeftConfig,
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
        anchor: config of any PEFT method that adapts single modules.
        free: names of integer fields of `config`, or name -> the values to choose from (None: all that it accepts);
            None: the method's own sizes.
        match: of "params" (trainable) and "flops" (forward and backward, a token).
        tolerance_ratio: 0.05 is 5 %.
        limit: largest value that a size may take.

    Returns:
        The match with the smallest of the largest deviations; `is_met` says whether it is within the tolerance.

    Raises:
        TypeError: `config` or `anchor` is no PeftConfig.
        ValueError: an unknown field or quantity, or no value of the free sizes that the config accepts.
    """
    for name, given in (("config", config), ("anchor", anchor)):
        if not isinstance(given, PeftConfig):
            raise TypeError(f"`{name}` = {given!r}: must be a PeftConfig, as LoraConfig(r=8).")
    check_positive("tolerance_ratio", tolerance_ratio)
    names = _free_names(config, free)
    choices = {name: sorted(values) for name, values in free.items() if values} if isinstance(free, Mapping) else {}
    search = _Search(config, tuple(sorted(names, key=lambda name: name not in choices)), choices, limit)
    names = search.names  # the given choices first: along them nothing needs to grow
    if not match or set(match) - set(MATCHED):
        raise ValueError(f"`match` = {list(match)}: must be a choice of {', '.join(MATCHED)}.")
    with torch.device("meta"):
        target = ModelCost(model, anchor)(anchor)
        try:  # which sites it has does not depend on the sizes
            cost = ModelCost(model, config)
        except ValueError:  # its own sizes do not fit
            cost = ModelCost(model, search.smallest())
    goal = {name: target[name] for name in match}
    if not all(goal.values()):
        raise ValueError(f"the anchor {type(anchor).__name__} costs nothing in {[n for n in goal if not goal[n]]}.")
    known: dict[tuple[int, ...], tuple[float, dict[str, float]] | None] = {}

    def deviations(values: tuple[int, ...]) -> tuple[float, dict[str, float]] | None:
        """(largest, all) deviations, or None where the sizes do not fit the sites."""
        if values not in known:
            changed = search.config_with(values)
            with torch.device("meta"):
                measured = None if changed is None else cost.try_sizes(changed)
            if measured is None:
                known[values] = None
            else:
                ratios = {name: measured[name] / goal[name] - 1 for name in goal}
                known[values] = (max(map(abs, ratios.values())), ratios)
        return known[values]

    best: tuple[int, ...] | None = None

    def best_so_far() -> float:
        return min((found[0] for found in known.values() if found is not None), default=float("inf"))

    for outer in search.outer(deviations, best_so_far):
        for candidate in search.nearest(outer, deviations):
            found = deviations(candidate)
            if found is not None and (best is None or found[0] < known[best][0]):  # type: ignore[index]
                best = candidate
    if best is None:
        raise ValueError(f"no value of {', '.join(names)} up to {limit} fits the sites of {type(config).__name__}.")
    ratios = known[best][1]  # type: ignore[index]
    chosen = search.config_with(best)
    assert chosen is not None
    return BudgetMatch(
        config=chosen,
        sizes=dict(zip(names, best, strict=True)),
        measured={name: (ratio + 1) * goal[name] for name, ratio in ratios.items()},
        anchor=goal,
        deviation_ratio=ratios,
        tolerance_ratio=tolerance_ratio,
        tried=len(known),
    )


def _free_names(config: PeftConfig, free: Iterable[str] | None) -> tuple[str, ...]:
    if free is None:
        own = getattr(config, "size_fields", None) or PEFT_SIZES.get(str(getattr(config.peft_type, "value", "")))
        if own is None:
            raise ValueError(f"`free`: {type(config).__name__} names no sizes of its own; give the fields to search.")
        return tuple(own)
    names = tuple(free)
    own = getattr(config, "size_fields", None) or ()
    unknown = [name for name in names if name not in own and not hasattr(config, name)]
    if unknown or not names:
        raise ValueError(f"`free` = {list(names)}: {type(config).__name__} has no field {unknown}.")
    return names


Deviations = Callable[[tuple[int, ...]], "tuple[float, dict[str, float]] | None"]


@dataclass(frozen=True)
class _Search:
    """The values of `names` in `config`: one of `choices`, or 1 to `limit`, where the config accepts them."""

    config: PeftConfig
    names: tuple[str, ...]
    choices: Mapping[str, Sequence[int]]
    limit: int

    def config_with(self, values: Sequence[int]) -> PeftConfig | None:
        """The config with these values of the first names, or None where it refuses them."""
        sizes = dict(zip(self.names, values, strict=False))
        change = getattr(self.config, "with_sizes", None)  # a config may have sizes that follow another one
        try:
            return replace(self.config, **sizes) if change is None else change(**sizes)
        except ValueError:
            return None

    def accepted(self, outer: tuple[int, ...]) -> list[int]:
        """Values of the name after `outer` that the config accepts."""
        values = self.choices.get(self.names[len(outer)]) or range(1, self.limit + 1)
        return [v for v in values if self.config_with((*outer, v)) is not None]

    def first(self, outer: tuple[int, ...]) -> tuple[int, ...]:
        """`outer` and the smallest accepted values of the other names; `outer` alone where there are none."""
        while len(outer) < len(self.names):
            values = self.accepted(outer)
            if not values:
                break
            outer = (*outer, values[0])
        return outer

    def smallest(self) -> PeftConfig:
        """The config with the smallest sizes that it accepts."""
        values = self.first(())
        found = self.config_with(values)
        if found is None or len(values) < len(self.names):
            raise ValueError(
                f"{type(self.config).__name__} accepts no value of {self.names[len(values)]} up to {self.limit}."
            )
        return found

    def outer(self, deviations: Deviations, best: Callable[[], float]) -> Iterator[tuple[int, ...]]:
        """All values of the names but the last, up to where the smallest last one costs too much already."""
        yield from self._heads((), deviations, best)

    def _heads(
        self, head: tuple[int, ...], deviations: Deviations, best: Callable[[], float]
    ) -> Iterator[tuple[int, ...]]:
        if len(head) == len(self.names) - 1:
            yield head
            return
        is_given, has_fitted = self.names[len(head)] in self.choices, False
        for i, value in enumerate(self.accepted(head)):
            smallest = self.smallest_that_fits((*head, value), deviations)
            if smallest is None:
                if not is_given and (has_fitted or i >= FIRST):
                    break  # too large for the sites
                continue
            has_fitted = True
            if not is_given and min(smallest[1].values()) > best():
                break  # every quantity is above the anchor, farther than what was found
            yield from self._heads((*head, value), deviations, best)

    def smallest_that_fits(
        self, head: tuple[int, ...], deviations: Deviations
    ) -> tuple[float, dict[str, float]] | None:
        """The deviations at the smallest values of the other names that fit the sites, the last name's tried first."""
        start = self.first(head)
        found = deviations(start)
        if found is not None or len(start) < len(self.names) or self.names[-1] in self.choices:
            return found
        for value in self.accepted(start[:-1])[1:FIRST]:
            found = deviations((*start[:-1], value))
            if found is not None:
                break
        return found

    def nearest(self, outer: tuple[int, ...], deviations: Deviations) -> list[tuple[int, ...]]:
        """The two neighbours among which the best last value lies; all of them where they are given."""
        values = self.accepted(outer)
        if self.names[-1] in self.choices:
            return [(*outer, value) for value in values]
        low, high, step = 0, len(values), 1  # values[:low] lie below the crossing, values[high:] at or above it
        while low < min(high, FIRST) - 1 and deviations((*outer, values[low])) is None:
            low += 1  # too small for the sites
        while low + step < high:  # double first: large sizes are the costly ones to try
            if _is_above(deviations((*outer, values[low + step]))):
                high = low + step
                break
            low, step = low + step, step * 2
        while low < high:
            middle = (low + high) // 2
            if _is_above(deviations((*outer, values[middle]))):
                high = middle
            else:
                low = middle + 1
        return [(*outer, values[i]) for i in (high - 1, high) if 0 <= i < len(values)]


def _is_above(found: tuple[float, dict[str, float]] | None) -> bool:
    """Whether the highest deviation is at least as far above the anchor as the lowest is below it."""
    return found is None or max(found[1].values()) >= -min(found[1].values())
