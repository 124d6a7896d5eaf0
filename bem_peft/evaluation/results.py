"""Results that are compared: what a comparison knows of each system, wherever its scores come from (formats/)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bem_peft.evaluation.metrics import GENERATED
from bem_peft.evaluation.pareto import Objective
from bem_peft.evaluation.scores import Scores

# what the results of a run can be weighed by; a system that lacks one is left out of that plot
OBJECTIVES = {
    "nll": Objective("nll", False, "nats/token"),
    "accuracy": Objective("accuracy", True, ""),
    "chrf": Objective("chrf", True, "of 100"),
    "bleu": Objective("bleu", True, "of 100"),
    "exact_match": Objective("exact_match", True, "of 1"),
    "f1": Objective("f1", True, "of 1"),
    "rouge_l": Objective("rouge_l", True, "of 1"),
    "json_validity": Objective("json_validity", True, "of 1"),
    "forgetting": Objective("forgetting", False, "nats/token"),
    "parameters": Objective("parameters", False, ""),
    "file_bytes": Objective("file_bytes", False, "B"),
    "memory_bytes": Objective("memory_bytes", False, "B"),
    "seconds": Objective("seconds", False, "s"),
    "prefill_ms": Objective("prefill_ms", False, "ms"),
    "decode_ms": Objective("decode_ms", False, "ms"),
    "train_step_ms": Objective("train_step_ms", False, "ms"),
}
QUALITY = ("nll", "accuracy", *GENERATED)  # one of these is traded against the costs, which are all others


def system_of_scores(
    name: str, method: str, scores: Mapping[str, Scores], *, warnings: Sequence[str] = (),
    provenance: Sequence[dict[str, Any]] = (), left_out: frozenset[str] = frozenset(),
) -> SystemResult:  # fmt: skip
    """A system of which item scores are all there is: their means are its values."""
    per_seed = {metric: [float(row.mean()) for row in found.values] for metric, found in scores.items()}
    values = {metric: float(np.mean(means)) for metric, means in per_seed.items()}
    seeds = next(iter(scores.values())).seeds if scores else ()
    return SystemResult(
        name, method, values, per_seed, dict(scores), None, seeds, list(provenance), tuple(warnings), left_out
    )


def shared_objectives(systems: Sequence[SystemResult]) -> tuple[list[Objective], list[Objective]]:
    """(metrics of quality, costs) that every system has a value of; metrics that are not ours come after ours."""
    shared = [name for name in OBJECTIVES if all(name in system.values for system in systems)]
    scored = set.intersection(*(set(system.scores) for system in systems)) if systems else set()
    others = [Objective(m, systems[0].scores[m].higher_is_better) for m in sorted(scored - set(OBJECTIVES))]
    qualities = [OBJECTIVES[name] for name in shared if name in QUALITY]
    return [*qualities, *others], [OBJECTIVES[name] for name in shared if name not in QUALITY]


@dataclass
class SystemResult:
    """One system of a comparison.

    values: objective -> value. replicates: objective -> one value a seed. scores: metric -> item scores, or empty.
    budget: lines as in `budget_report.json`, or None where none was measured. warnings: what a reader must know.
    left_out: ids of items that this system could not be scored on; a comparison leaves them out of all systems.
    """

    name: str
    method: str
    values: dict[str, float]
    replicates: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    budget: list[dict[str, Any]] | None = None
    seeds: tuple[int, ...] = ()
    provenance: list[dict[str, Any]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()

    def without(self, items: frozenset[str]) -> SystemResult:
        """The same system with the scores of the other items alone, and the means of these."""
        if all(items.isdisjoint(scores.items) for scores in self.scores.values()):
            return self
        scores = {m: found.restricted_to(set(found.items) - items) for m, found in self.scores.items()}
        per_seed = {m: [float(row.mean()) for row in found.values] for m, found in scores.items()}
        means = {m: float(np.mean(found)) for m, found in per_seed.items()}
        return replace(
            self, scores=scores, values=self.values | means, replicates=self.replicates | per_seed,
        )  # fmt: skip

    @property
    def budget_is_met(self) -> bool | None:
        """Whether every quantity is within its tolerance; None: not measured."""
        return None if self.budget is None else all(line["verdict"] == "PASS" for line in self.budget)
