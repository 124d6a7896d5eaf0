"""lm-evaluation-harness with `--log_samples`: samples_TASK_TIME.jsonl beside results_TIME.json, one folder a seed.

A metric is called TASK/METRIC, with its filter in brackets where there is one. Items are the task's `doc_id`s, told
apart by `doc_hash`. Which direction is better stands in the results file. A metric that is no number an item (a
perplexity over all) is left out, and named in a warning.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bem_peft.evaluation.formats.seeds import seed_folders
from bem_peft.evaluation.results import SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores
from bem_peft.json_text import read_json, read_lines

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")


def is_lm_eval_folder(folder: Path) -> bool:
    return any(SAMPLES.fullmatch(path.name) for path in folder.rglob("samples_*.jsonl"))


def read_lm_eval(folder: Path) -> SystemResult:
    """The system of a folder; its name is the folder's.

    Raises:
        ValueError: two runs of one task in a seed's folder, a direction that the results do not tell, or seeds that
        were
            scored on other items.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    directions: dict[str, bool] = {}
    odd: set[str] = set()
    provenance = []
    for seed, part in seed_folders(folder).items():
        tasks: dict[str, Path] = {}
        for path in sorted(part.rglob("samples_*.jsonl")):
            match = SAMPLES.fullmatch(path.name)
            if match is None:
                continue
            task = match["task"]
            if task in tasks:
                raise ValueError(f"{part}: two runs of {task!r}, {tasks[task].name} and {path.name}: keep one a seed.")
            tasks[task] = path
            results = _results_beside(path, match["time"])
            better = results.get("higher_is_better", {}).get(task, {})
            for number, sample in read_lines(path):
                _add(records, directions, odd, seed, task, better, sample, f"{path}:{number}")
        if tasks:
            provenance.append(_provenance(results, seed))
    if not records:
        raise ValueError(f"{folder}: no sample of lm-evaluation-harness has a number for a metric.")
    scores = {
        metric: Scores.from_records(found, system=folder.name, metric=metric, higher_is_better=directions[metric])
        for metric, found in records.items()
    }
    notes = [f"{name} is no number an item and is left out" for name in sorted(odd)]
    return system_of_scores(folder.name, "lm-evaluation-harness", scores, warnings=notes, provenance=provenance)


def _add(
    records: dict[str, list[dict[str, Any]]], directions: dict[str, bool], odd: set[str], seed: int, task: str,
    better: dict[str, Any], sample: dict[str, Any], where: str,
) -> None:  # fmt: skip
    try:
        kept = str(sample.get("filter", "none"))
        for metric in sample["metrics"]:
            name = f"{task}/{metric}" + ("" if kept == "none" else f" ({kept})")
            value = sample[metric]
            if not isinstance(value, int | float):
                odd.add(name)
                continue
            if not isinstance(better.get(metric), bool):
                raise ValueError(f"{where}: its results file does not say whether more of {metric!r} is better.")
            directions[name] = better[metric]
            record = {"seed": seed, "id": str(sample["doc_id"]), "value": value, "sha256": sample["doc_hash"]}
            records.setdefault(name, []).append(record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: no sample of lm-evaluation-harness: {error!r}.") from error


def _results_beside(samples: Path, time: str) -> dict[str, Any]:
    path = samples.with_name(f"results_{time}.json")
    if not path.is_file():
        raise ValueError(f"{samples}: there is no {path.name} beside it, which says which direction is better.")
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no results of lm-evaluation-harness.")
    return found


def _provenance(results: dict[str, Any], seed: int) -> dict[str, Any]:
    versions = {"lm_eval": results.get("lm_eval_version"), "transformers": results.get("transformers_version")}
    return {
        "seed": seed, "settings": {"lm_eval": results.get("config")},
        "versions": {name: str(version) for name, version in versions.items() if version},
    }  # fmt: skip
