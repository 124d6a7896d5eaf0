"""Folders of `bem-peft run` and `bem-peft evaluate`: seed-*/result.json and seed-*/items.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.metrics import CORPUS
from bem_peft.evaluation.paired import BY_LENGTH
from bem_peft.evaluation.results import SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores, corpus_scores
from bem_peft.json_text import read_json, read_lines

BASE_ALONE = "base model alone"  # the method of a system without an adapter


def is_run_folder(folder: Path) -> bool:
    return any(folder.glob("seed-*/result.json"))


def read_run(folder: Path) -> SystemResult:
    """A system of `bem-peft run`: every seed of one experiment. Raises ValueError where seeds do not fit together."""
    try:
        return _read(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: a seed-*/result.json is none of `bem-peft run`: {error!r}.") from error


def _read(folder: Path) -> SystemResult:
    results, records = [], []
    left_out: set[str] = set()
    retained: list[dict[str, Any]] = []
    tokens: dict[str, int] = {}
    generated: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("seed-*/result.json")):
        result = read_json(path)
        results.append(result)
        retained += _retained(path.with_name("retain.jsonl"), result["seed"])
        items = path.with_name("items.jsonl")
        for number, item in read_lines(items):
            if item.get("too_long"):
                left_out.add(str(item.get("id")))
                continue
            try:
                tokens[item["id"]] = item["tokens"]
                for metric, value in item.get("scores", {}).items():
                    generated.setdefault(metric, []).append((result["seed"], item["id"], value))
                records.append(
                    {
                        "seed": result["seed"], "id": item["id"], "value": item["nll"] / max(1, item["tokens"]),
                        "cluster": item["group"], "sha256": item["sha256"], "slices": item.get("slices"),
                    }
                )  # fmt: skip
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{items}:{number}: no line of `bem-peft run`: {error!r}.") from error
    names = {result["name"] for result in results}
    if len(names) != 1:
        raise ValueError(f"{folder}: seeds of different experiments, {sorted(names)}; one folder an experiment.")
    nll = Scores.from_records(records, system=names.pop(), metric="nll", higher_is_better=False)
    nll = with_length_slices(nll, tokens)
    by_metric = {"nll": nll} | {m: _of_text(nll, m, found, folder) for m, found in generated.items()}
    if retained:
        by_metric["forgetting"] = Scores.from_records(
            retained, system=nll.system, metric="forgetting", higher_is_better=False
        )
    first = results[0]
    found = system_of_scores(
        nll.system, str(first["adapter"].get("peft_type", "")) or BASE_ALONE, by_metric, warnings=_warnings(results),
        provenance=[result["provenance"] for result in results], left_out=frozenset(left_out),
    )  # fmt: skip
    # not the seconds of training: runs at different times are no comparison of speed
    sizes = {
        "parameters": float(first["parameters"]["trainable"]),
        "file_bytes": float(first["parameters"]["stored_bytes"]),
    }
    return replace(found, values=found.values | sizes, budget=first["budget"])


def _retained(path: Path, seed: int) -> list[dict[str, Any]]:
    """Records of what was forgotten, of a seed whose texts were scored."""
    if not path.is_file():
        return []
    return [
        {"seed": seed, "id": line["id"], "value": (line["nll"] - line["base_nll"]) / line["tokens"],
         "cluster": line["group"], "sha256": line["sha256"]}
        for _, line in read_lines(path)
    ]  # fmt: skip


def _warnings(results: Sequence[dict[str, Any]]) -> list[str]:
    warnings = []
    if len(results) < 3:
        warnings.append(f"{len(results)} seed(s): fewer than 3 say little of other seeds")
    differing = _differing([result["provenance"] for result in results])
    if differing:
        warnings.append(f"the seeds were run with different settings: {', '.join(differing[:6])}")
    if any(result.get("selected_on_evaluation") for result in results):
        warnings.append("the checkpoint was chosen on the evaluation items, so that these are no test")
    seen = max((result.get("trained_on", {}).get("items", 0) for result in results), default=0)
    if seen:
        warnings.append(f"{seen} of the evaluation items were trained on, so that these are no test")
    if any(result["provenance"]["git"] and result["provenance"]["git"]["is_dirty"] for result in results):
        warnings.append("the code differed from its commit")
    return warnings


OF_ONE_SEED = ("seeds", "output_dir")  # settings that a seed that is run by itself has of its own


def _differing(provenances: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same for every seed, as "training.learning_rate"."""
    if not all(isinstance(provenance.get("settings"), dict) for provenance in provenances):
        return [] if len({p["settings_sha256"] for p in provenances}) == 1 else ["which is not kept"]
    found = [dict(_flat(provenance["settings"])) for provenance in provenances]
    names = dict.fromkeys(name for settings in found for name in settings)
    return [name for name in names if len({settings.get(name) for settings in found}) > 1]


def _flat(settings: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """("training.learning_rate", "0.008"). A saved adapter has a path of its own for each seed."""
    for name, value in settings.items():
        if not where and (name in OF_ONE_SEED or (name == "adapter" and isinstance(value, str))):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", json.dumps(value, sort_keys=True)


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
        slices |= dict(zip(BY_LENGTH, (frozenset(order[:third]), frozenset(order[-third:])), strict=True))
    return replace(scores, slices=slices)
