"""Runs that differ by their learning rate alone, as one curve: whether the best rate was bracketed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bem_peft.evaluation.results import SystemResult


@dataclass(frozen=True)
class RateCurve:
    """`systems` by rising rate; means: of `metric`, per_seed: one list a system. is_bracketed: the best rate has
    a lower and a higher one beside it."""

    metric: str
    higher_is_better: bool
    systems: tuple[str, ...]
    rates: tuple[float, ...]
    means: tuple[float, ...]
    per_seed: tuple[tuple[float, ...], ...]

    @property
    def best(self) -> int:
        values = [value if self.higher_is_better else -value for value in self.means]
        return values.index(max(values))

    @property
    def is_bracketed(self) -> bool:
        return 0 < self.best < len(self.rates) - 1


def rate_curves(systems: Sequence[SystemResult], metric: str, higher_is_better: bool) -> list[RateCurve]:
    """A curve for every two systems or more whose settings are the same but for `training.learning_rate`."""
    groups: dict[str, list[tuple[float, SystemResult]]] = {}
    for system in systems:
        found = _rate_and_rest(system)
        if found is not None and metric in system.values:
            groups.setdefault(found[1], []).append((found[0], system))
    curves = []
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        rates = [rate for rate, _ in members]
        if len(set(rates)) == len(rates) > 1:
            ordered = [system for _, system in members]
            curves.append(
                RateCurve(
                    metric, higher_is_better, tuple(s.name for s in ordered), tuple(rates),
                    tuple(s.values[metric] for s in ordered),
                    tuple(tuple(s.replicates.get(metric, ())) for s in ordered),
                )
            )  # fmt: skip
    return curves


def _rate_and_rest(system: SystemResult) -> tuple[float, str] | None:
    """(learning rate, all other settings as text), or None where they are not known."""
    settings: Any = (system.provenance[0] if system.provenance else {}).get("settings")
    training = settings.get("training") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(training, dict):
        return None
    rate = training.get("learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        return None
    rest = {key: value for key, value in settings.items() if key not in ("name", "output_dir", "seeds", "training")}
    rest["training"] = {key: value for key, value in training.items() if key != "learning_rate"}
    return float(rate), json.dumps(rest, sort_keys=True, default=str)
