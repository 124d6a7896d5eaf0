"""The study's pages and tables of `bem-peft compare`, from the runs in results/.

    python benchmarks/quality/reports.py

results/reports/TASK/        every system that has all its seeds, against LoRA at both sites, with parameters as cost
results/reports/TASK-LORA/   each LoRA, and those that have its sites and parameters: the budget is LoRA's
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from grid import GRID, Losses, systems_of
from study import RESULTS, items_of, losses
from tables import LOWER_IS_BETTER, finals, values_of

from bem_peft.budget.check import UNITS
from bem_peft.budget.report import judged
from bem_peft.evaluation.evaluator import ComprehensiveEvaluator
from bem_peft.evaluation.report.files import write_files
from bem_peft.evaluation.results import SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores

TOLERANCE = 0.05


def whole_runs(known: Losses, task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """system -> seed -> run, of the systems that have every seed."""
    found = {system: finals(known, task, system) for system in systems_of(task)}
    return {system: runs for system, runs in found.items() if len(runs) == len(GRID["seeds"])}


def systems_with_sizes(task: str, runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, SystemResult]:
    """Of each its scores, and what it costs."""
    groups = {item["id"]: item["group"] for item in items_of(task)}
    found = {}
    for system, of_seeds in runs.items():
        scores = {
            metric: Scores.from_records(
                [
                    {"seed": seed, "id": item, "value": value, "cluster": groups.get(item, item)}
                    for seed, of_items in values.items() for item, value in of_items.items()
                ],
                system=system, metric=metric, higher_is_better=metric not in LOWER_IS_BETTER,
            )
            for metric, values in values_of(task, of_seeds).items()
        }  # fmt: skip
        method = GRID["systems"][system]["config"]["method"]
        found[system] = _with_sizes(system_of_scores(system, method, scores), of_seeds[0]["parameters"])
    return found


def _with_sizes(system: SystemResult, counts: dict[str, int]) -> SystemResult:
    sizes = {"parameters": float(counts["trainable"]), "file_bytes": float(counts["stored_bytes"])}
    return replace(system, values=system.values | sizes)


def with_budget(system: SystemResult, anchor: SystemResult) -> SystemResult:
    """The system with the line that says whether it has the anchor's parameters."""
    measured, of = (one.values["parameters"] for one in (system, anchor))
    line = judged("params", UNITS["params"], measured, of, TOLERANCE, "exact: counted")
    return replace(system, budget=[asdict(line)])


def comparisons(systems: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(suffix of the folder, anchor, systems) of each report on a task's systems."""
    if "lora_both" in systems:
        yield "", "lora_both", systems
    for anchor in systems:
        beside = [name for name in systems if anchor in GRID["systems"][name].get("anchors", [])]
        if beside:
            yield f"-{anchor}", anchor, [anchor, *beside]


def main() -> None:
    known = losses()
    for task in GRID["tasks"]:
        runs = whole_runs(known, task)
        if not runs:
            continue
        systems = systems_with_sizes(task, runs)
        for suffix, anchor, names in comparisons(list(systems)):
            compared = [with_budget(systems[name], systems[anchor]) for name in names]
            title = f"Quality: {task}, beside {anchor}"
            report = ComprehensiveEvaluator(compared, anchor, stands_on="slice_b", title=title).report()
            write_files(report, RESULTS / "reports" / f"{task}{suffix}")
            for promotion in report.promotions:
                print(f"{task} beside {anchor}: {promotion.system}: {promotion.verdict}; {promotion.reasons[0]}")


if __name__ == "__main__":
    main()
