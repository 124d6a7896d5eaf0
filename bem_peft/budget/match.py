"""The sizes of a config that cost what an anchor costs, found without the model's weights (`site_cost.py`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig
from torch import nn

from bem_peft.budget.check import check_positive
from bem_peft.budget.copies import adapted_copy, at_sites_of
from bem_peft.budget.site_cost import MATCHED, ModelCost
from bem_peft.budget.size_search import SizeSearch
from bem_peft.budget.sizes import Sizes, sizes_of

# set by the package, since budgets know no method: an adapter in one line, and (rate, source) of what was measured for
# an adapter, None for a method for which nothing was
parse_anchor: Callable[[str], PeftConfig] | None = None
suggest_rate: Callable[[nn.Module, PeftConfig], tuple[float, str] | None] | None = None


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
    """Find the values of `free` for which `config` costs what `anchor` costs on `model`, and a rate to train it with.

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
    found = match_sizes(model, config, anchor, free, match, tolerance_ratio, limit)
    assert suggest_rate is not None
    rate = suggest_rate(model, found.config)
    return found if rate is None else replace(found, learning_rate=rate[0], learning_rate_source=rate[1])


def match_sizes(
    model: nn.Module,
    config: PeftConfig,
    anchor: PeftConfig | str,
    free: Sequence[str] | Mapping[str, Sequence[int] | None] | None = None,
    match: Sequence[str] = MATCHED,
    tolerance_ratio: float = 0.05,
    limit: int = 1024,
) -> BudgetMatch:
    """`match_budget` without the learning rate."""
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
    search = SizeSearch(sizes, cost, goal)
    best = search.best()
    if free is None and (best is None or best[1].worst > tolerance_ratio):
        for name, value in _further(config, cost):
            wider = SizeSearch(Sizes(config, (name, *sizes.names), {name: [value]}, limit), cost, goal)
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
    return BudgetMatch(
        config=chosen,
        sizes=dict(zip(sizes.names, values, strict=True)),
        measured={name: (ratio + 1) * goal[name] for name, ratio in deviation.ratios.items()},
        anchor=goal,
        deviation_ratio=deviation.ratios,
        tolerance_ratio=tolerance_ratio,
        tried=len(search.tried),
    )


def _further(config: PeftConfig, cost: ModelCost) -> list[tuple[str, int]]:
    """(field, value) of what the method can change beside its sizes, the likeliest first."""
    further = getattr(config, "further_sizes", None)
    found: dict[str, list[int]] = {} if further is None else further(cost.widths)
    return [(name, value) for name, values in found.items() for value in values]
