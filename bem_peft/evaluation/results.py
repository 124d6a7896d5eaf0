"""Results that are compared: of `bem-peft run`, and the JSON files of PEFT's method_comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.metrics import CORPUS, GENERATED
from bem_peft.evaluation.pareto import Objective
from bem_peft.evaluation.scores import Scores, corpus_scores

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
    "parameters": Objective("parameters", False, ""),
    "file_bytes": Objective("file_bytes", False, "B"),
    "memory_bytes": Objective("memory_bytes", False, "B"),
    "seconds": Objective("seconds", False, "s"),
    "prefill_ms": Objective("prefill_ms", False, "ms"),
    "decode_ms": Objective("decode_ms", False, "ms"),
    "train_step_ms": Objective("train_step_ms", False, "ms"),
}
QUALITY = ("nll", "accuracy", *GENERATED)  # one of these is traded against the costs, which are all others


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


def read_results(paths: Sequence[str | Path]) -> list[SystemResult]:
    """The systems of folders and files: a folder with `seed-*/result.json`, or JSON of PEFT's method_comparison.

    Raises:
        ValueError: a path that holds neither, or two systems of one name.
    """
    systems: list[SystemResult] = []
    for given in map(Path, paths):
        if given.is_dir() and any(given.glob("seed-*/result.json")):
            systems.append(read_run(given))
        elif given.is_dir() and any(given.glob("*.json")):
            systems += [read_published(path) for path in sorted(given.glob("*.json"))]
        elif given.is_file() and given.suffix == ".json":
            systems.append(read_published(given))
        else:
            raise ValueError(f"{given}: neither a folder with seed-*/result.json nor JSON of PEFT's method_comparison.")
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two systems are called {twice[0]!r}: give each experiment a `name` of its own.")
    return systems


def read_run(folder: Path) -> SystemResult:
    """A system of `bem-peft run`: every seed of one experiment. Raises ValueError where seeds do not fit together."""
    results, records = [], []
    tokens: dict[str, int] = {}
    generated: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("seed-*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.append(result)
        for line in path.with_name("items.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            tokens[item["id"]] = item["tokens"]
            for metric, value in item.get("scores", {}).items():
                generated.setdefault(metric, []).append((result["seed"], item["id"], value))
            records.append(
                {
                    "seed": result["seed"], "id": item["id"], "value": item["nll"] / max(1, item["tokens"]),
                    "cluster": item["group"], "sha256": item["sha256"], "slices": item.get("slices"),
                }
            )  # fmt: skip
    names = {result["name"] for result in results}
    settings = {result["provenance"]["settings_sha256"] for result in results}
    if len(names) != 1:
        raise ValueError(f"{folder}: seeds of different experiments, {sorted(names)}.")
    scores = Scores.from_records(records, system=names.pop(), metric="nll", higher_is_better=False)
    warnings = []
    if len(results) < 3:
        warnings.append(f"{len(results)} seed(s): fewer than 3 say little of other seeds")
    if len(settings) != 1:
        warnings.append("the seeds were run with different settings")
    if any(result["provenance"]["git"] and result["provenance"]["git"]["is_dirty"] for result in results):
        warnings.append("the code differed from its commit")
    first = results[0]
    scores = with_length_slices(scores, tokens)
    by_metric = {"nll": scores} | {m: _of_text(scores, m, found, folder) for m, found in generated.items()}
    per_seed = {metric: [float(row.mean()) for row in found.values] for metric, found in by_metric.items()}
    # not the seconds of training: runs at different times are no comparison of speed
    values = {metric: float(np.mean(found)) for metric, found in per_seed.items()}
    values["parameters"] = float(first["parameters"]["trainable"])
    values["file_bytes"] = float(first["parameters"]["stored_bytes"])
    return SystemResult(
        scores.system, str(first["adapter"].get("peft_type", "")), values, per_seed, by_metric,
        first["budget"], scores.seeds,
        [result["provenance"] for result in results], tuple(warnings),
    )  # fmt: skip


def _of_text(like: Scores, metric: str, found: Sequence[tuple[int, str, Any]], folder: Path) -> Scores:
    """The scores of generated text, (seed, item, value or counts) each, on the seeds and items of `like`."""
    table = {(seed, item): value for seed, item, value in found}
    missing = [(seed, item) for seed in like.seeds for item in like.items if (seed, item) not in table]
    if missing:
        raise ValueError(f"{folder}: no {metric!r} of item {missing[0][1]!r}, seed {missing[0][0]}; score all or none.")
    values = np.array([[table[seed, item] for item in like.items] for seed in like.seeds], dtype=np.float64)
    if metric in CORPUS:
        return corpus_scores(like, metric, values)
    return replace(like, metric=metric, values=values, higher_is_better=True)


def with_length_slices(scores: Scores, tokens: Mapping[str, int]) -> Scores:
    """The scores with the slices "shortest third" and "longest third" by the items' `tokens`."""
    order = sorted(scores.items, key=lambda item: (tokens[item], item))
    third = len(order) // 3
    slices = dict(scores.slices)
    if third:
        slices |= {"shortest third": frozenset(order[:third]), "longest third": frozenset(order[-third:])}
    return replace(scores, slices=slices)


def read_published(path: Path) -> SystemResult:
    """A run of PEFT's method_comparison. Raises ValueError where the file is no such run, or did not end well."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        info, train = run["run_info"], run["train_info"]
        last = train["metrics"][-1]
        accuracy = float(last["test accuracy"])
        values = {
            "accuracy": accuracy,
            "parameters": float(train["num_trainable_params"]),
            "file_bytes": float(train["file_size"]),
            "memory_bytes": float(train["accelerator_memory_max"]),
            "seconds": float(train["train_time"]),
        }
        seed = int(info["train_config"]["seed"])
        method = str((info["peft_config"] or {}).get("peft_type", "full fine-tuning"))
        name = str(info["experiment_name"])
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no result of PEFT's method_comparison: {error!r}.") from error
    if train["status"] != "success":
        raise ValueError(f"{path}: the run ended with {train['status']!r}.")
    warning = f"one seed ({seed}) and no item scores were published: no interval, no verdict"
    return SystemResult(
        name, method, values, seeds=(seed,), warnings=(warning,),
        provenance=[{"versions": run["meta_info"]["package_info"], "hardware": run["meta_info"]["system_info"]}],
    )  # fmt: skip
