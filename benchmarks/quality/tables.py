"""The study's tables, from the runs in results/: what was chosen, and each method against its anchor on Slice-B.

    python benchmarks/quality/tables.py

Writes into results/
    search.csv       losses on Slice-A by rate,
    rates.csv        the best rate of each system: the lowest point of a parabola, at the mean of the tasks,
    transfer.csv     how that changes with a method's size, LoRA r=4 to r=64's, and the power of the size that fits,
    slice_b.csv      a row a comparison and metric,
    ablations.csv    each change against its method as it is, on Slice-C,
    again.csv        what was run once more after Slice-B had been read, on Slice-D;
    leaderboard.csv  gets a row for every system that has all its seeds, and none is ever changed.
An item of these slices whose prompt and answer also stand in the training slice or in Slice-A is left out.
Differences are paired by seed and item and mean "better" above zero; p is corrected by Holm over all comparisons of a
metric in a table's task.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grid import (
    GRID,
    Losses,
    Run,
    ablation_rate,
    ablations,
    again_rate,
    best_rate,
    lowest_point,
    searched,
    systems_of,
    transfers,
)
from records_json import record_scores
from splits import read_items
from study import RESULTS, items_of, losses

from bem_peft.evaluation.intervals import compare_means
from bem_peft.evaluation.metrics import text_scores
from bem_peft.evaluation.multiplicity import adjusted_p_values
from bem_peft.evaluation.scores import corpus_values

Values = dict[int, dict[str, float]]  # seed -> item -> value
LOWER_IS_BETTER = ("nll", "forgetting")


def finals(known: Losses, task: str, system: str) -> dict[int, dict[str, Any]]:
    """seed -> the run of the chosen rate."""
    return _of_seeds(task, system, best_rate(known, task, system), GRID["seeds"])


def _of_seeds(task: str, system: str, k: int | None, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    if k is None:
        return found
    for seed in seeds:
        path = RESULTS / f"{Run(task, system, k, seed).name}.json.gz"
        if path.is_file():
            (found[seed],) = read_items(path)
    return found


@functools.cache
def unseen(task: str) -> frozenset[str]:
    """The items of Slices B, C and D whose prompt and answer nobody has trained on or chosen a rate by."""
    asked = GRID["tasks"][task]["prompt"] + GRID["tasks"][task]["completion"]
    texts = [(item, asked.format_map(item)) for item in items_of(task)]
    met = {text for item, text in texts if item["slice"] in ("train", "A")}
    return frozenset(item["id"] for item, text in texts if item["slice"] in ("B", "C", "D") and text not in met)


def values_of(task: str, runs: dict[int, dict[str, Any]]) -> dict[str, Values]:
    """metric -> seed -> item -> value. The values' mean is the score of the whole: the loss a token, corpus chrF."""
    found: dict[str, Values] = defaultdict(dict)
    for seed, run in runs.items():
        items = [item for item in run["items"] if item["id"] in unseen(task)]
        tokens = sum(item["tokens"] for item in items) / len(items)
        found["nll"][seed] = {item["id"]: item["nll"] / tokens for item in items}
        general = run["retained"]
        tokens = sum(text["tokens"] for text in general) / len(general)
        found["forgetting"][seed] = {
            str(i): (text["nll"] - text["base_nll"]) / tokens for i, text in enumerate(general)
        }
        texts = [item for item in items if "prediction" in item]
        if not texts:  # no answers were generated
            continue
        predictions, references = [i["prediction"] for i in texts], [i["reference"] for i in texts]
        if task == "records":
            scores = record_scores(predictions, references)
        else:
            counted = text_scores(GRID["tasks"][task]["metrics"], predictions, references)
            # of chrF and BLEU each item's share of the corpus score, as a jackknife has it
            scores = {n: corpus_values(n, v[None])[0] if v.ndim > 1 else v for n, v in counted.items()}
        for name, column in scores.items():
            found[name][seed] = {item["id"]: float(v) for item, v in zip(texts, column, strict=True)}
    return dict(found)


def ablation_rows(known: Losses) -> list[dict[str, Any]]:
    """Every change against its parent as it is, on Slice-C, on the seeds that both have."""
    task = GRID["ablations"]["task"]
    groups = {item["id"]: item["group"] for item in items_of(task)}
    rows: list[dict[str, Any]] = []
    for parent in GRID["ablations"]["of"]:
        names = ablations([parent])
        whole = {name: values_of(task, ablated(known, task, name)) for name in names}
        for name in names[1:]:
            for metric in ("nll", "forgetting"):
                row = _compared(task, name, names[0], metric, whole, groups)
                if row is not None:
                    rows.append(row)
    _adjust(rows)
    return rows


def ablated(known: Losses, task: str, system: str) -> dict[int, dict[str, Any]]:
    """seed -> the run of an ablation."""
    return _of_seeds(task, system, ablation_rate(known, system), GRID["ablations"]["seeds"])


def again_rows(known: Losses) -> list[dict[str, Any]]:
    """What was run once more after Slice-B had been read against its anchors, on Slice-D."""
    found = []
    for task, again in GRID["again"].items():
        groups = {item["id"]: item["group"] for item in items_of(task)}
        runs = {s: _of_seeds(task, s, again_rate(known, task, s), again["seeds"]) for s in again["of"]}
        whole = {system: values_of(task, of_seeds) for system, of_seeds in runs.items()}
        rows = [
            _compared(task, system, anchor, metric, whole, groups)
            for system in again["of"]
            for anchor in GRID["systems"][system].get("anchors", [])
            for metric in ("nll", "forgetting")
        ]
        there = [row for row in rows if row is not None]
        _adjust(there)
        found += there
    return found


def compare(known: Losses, task: str) -> list[dict[str, Any]]:
    """Every system against its anchors, on the seeds and items that both have."""
    groups = {item["id"]: item["group"] for item in items_of(task)}
    whole = {system: values_of(task, finals(known, task, system)) for system in systems_of(task)}
    rows: list[dict[str, Any]] = []
    for system in systems_of(task):
        anchors = GRID["systems"][system].get("anchors", [])
        others = ["lora_both"] if not anchors and system != "lora_both" and not system.startswith("lora_") else anchors
        for anchor in others:
            for metric in whole[system]:
                row = _compared(task, system, anchor, metric, whole, groups)
                if row is not None:
                    rows.append(row)
    _adjust(rows)
    return rows


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Holm over the comparisons of a metric."""
    for metric in {row["metric"] for row in rows}:
        mine = {(row["system"], row["anchor"]): row for row in rows if row["metric"] == metric}
        for key, p in adjusted_p_values({key: float(row["p"]) for key, row in mine.items()}).items():
            mine[key]["adjusted_p"] = f"{p:.4g}"


def _compared(
    task: str, system: str, anchor: str, metric: str, whole: dict[str, dict[str, Values]], groups: dict[str, str]
) -> dict[str, Any] | None:
    mine, other = whole[system].get(metric, {}), whole[anchor].get(metric, {})
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    items = sorted(mine[seeds[0]])
    a = np.array([[mine[seed][item] for item in items] for seed in seeds])
    b = np.array([[other[seed][item] for item in items] for seed in seeds])
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    clusters = np.array([groups.get(item, item) for item in items])
    found = compare_means(sign * (a - b), None if len(set(clusters)) == len(items) else clusters)
    scale = 100 / abs(b.mean()) if metric != "forgetting" and b.mean() else math.nan
    return {
        "task": task, "system": system, "anchor": anchor, "metric": metric, "seeds": len(seeds), "items": len(items),
        "mean": f"{a.mean():.4f}", "anchor_mean": f"{b.mean():.4f}", "difference": f"{found.estimate:+.4f}",
        "low": f"{found.low:+.4f}", "high": f"{found.high:+.4f}", "percent": f"{scale * found.estimate:+.2f}",
        "p": f"{found.claim_p_value:.4g}", "adjusted_p": "", "detectable": f"{found.mde:.4f}",
        "refusal": found.refusal or "",
    }  # fmt: skip


NAMES = {
    "lora_o": "W_O", "lora_down": "W_down", "lora_both": "both",
    "pt1_o": "PT1 at W_O", "pt1_o_large": "PT1 at W_O, larger", "pt2": "PT2 at both",
    "pt2_blocks": "PT2 of blocks at both", "pt3": "PT3 at W_down",
    "pt4": "PT4 at both", "composite": "PT1 and PT3 composed",
}  # fmt: skip


def markdown(rows: list[dict[str, Any]], task: str) -> list[str]:
    """A task's rows as docs/choosing.md has them: NLL and forgetting of each method beside LoRA's at its site."""
    found = {(row["system"], row["anchor"], row["metric"]): row for row in rows if row["task"] == task}
    lines = []
    for system, anchor, metric in found:
        if metric != "nll" or system not in NAMES:
            continue
        nll, forgetting = found[system, anchor, "nll"], found[system, anchor, "forgetting"]
        of = float(nll["anchor_mean"])
        ends = " to ".join(f"{100 * float(nll[end]) / of:+.1f}" for end in ("low", "high"))
        gain = f"{float(nll['percent']):+.1f} ({ends})"
        worse, low, high = (-float(forgetting[name]) for name in ("difference", "high", "low"))
        lines.append(
            f"| {NAMES[system]} | {NAMES[anchor]} | {of:.3f} | {float(nll['mean']):.3f} | {gain} | "
            f"{float(nll['adjusted_p']):.3f} | {float(forgetting['anchor_mean']):.2f} | "
            f"{float(forgetting['mean']):.2f} | {worse:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    return lines


def search_rows(found: Losses) -> list[dict[str, Any]]:
    return [
        {
            "task": task, "system": system, "k": k, "learning_rate": f"{Run(task, system, k, 0).rate:.4g}",
            "loss": "" if loss == math.inf else f"{loss:.4f}", "is_best": k == best_rate(found, task, system),
        }
        for task in GRID["tasks"] for system in (*systems_of(task), *transfers())
        for k, loss in sorted(searched(found, task, system).items())
    ]  # fmt: skip


def rate_rows(known: Losses) -> list[dict[str, Any]]:
    """Of every system, the lowest point of each task's search, as a k, and the rate at their mean."""
    rows = []
    for system in (*GRID["systems"], *transfers()):
        points = {
            task: lowest_point(searched(known, task, system))
            for task in GRID["tasks"]
            if searched(known, task, system) and best_rate(known, task, system) is not None
        }
        if points:
            mean = sum(points.values()) / len(points)
            rows.append({
                "system": system, **{task: f"{points[task]:.2f}" if task in points else "" for task in GRID["tasks"]},
                "learning_rate": f"{GRID['base_rate'] * 2 ** (mean / 2):.3g}",
            })  # fmt: skip
    return rows


def transfer_rows(known: Losses) -> list[dict[str, Any]]:
    """Of every method, the lowest point of the search at each size, as a k, and the slope of log rate over log size."""
    task, first = GRID["transfer"]["task"], 8
    rows = []
    for parent, sizes in GRID["transfer"]["of"].items():
        systems = {rank: parent if rank == first else f"{parent}@{rank}" for rank in sorted({first, *sizes})}
        if any(not searched(known, task, s) or best_rate(known, task, s) is None for s in systems.values()):
            continue
        points = {rank: lowest_point(searched(known, task, system)) for rank, system in systems.items()}
        slope = np.polyfit(np.log2(list(points)), np.array(list(points.values())) / 2, 1)[0]  # a rate is 2^(k/2)
        rows.append({
            "system": parent, **{f"r={rank}": f"{k:.2f}" for rank, k in points.items()}, "exponent": f"{slope:+.2f}"
        })  # fmt: skip
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def leaderboard_rows(known: Losses, task: str, compared: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each system that has all seeds, against its first anchor, or alone."""
    rows = []
    for system in systems_of(task):
        runs = finals(known, task, system)
        if len(runs) < len(GRID["seeds"]):
            continue
        mine = {row["metric"]: row for row in reversed(compared) if (row["task"], row["system"]) == (task, system)}
        values = {
            name: np.mean([[*of_items.values()] for of_items in seeds.values()])
            for name, seeds in values_of(task, runs).items()
        }
        against = mine.get("nll", {})
        rows.append({
            "date": max(run["date"] for run in runs.values()), "task": task, "system": system,
            "parameters": str(runs[0]["parameters"]["trainable"]), "learning_rate": f"{runs[0]['learning_rate']:.4g}",
            "seeds": str(len(runs)), **{name: f"{values[name]:.4f}" for name in ("nll", "forgetting")},
            **{name: against.get(name, "") for name in ("anchor", "percent", "low", "high", "adjusted_p", "refusal")},
            "commit": "+".join(sorted({run["commit"][:7] for run in runs.values()})),
        })  # fmt: skip
    return rows


def add_to_leaderboard(rows: list[dict[str, str]]) -> None:
    """Append what is not there: a system's runs of the same commits are one row, and no row is ever changed."""
    path = RESULTS / "leaderboard.csv"
    old = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    key = ("task", "system", "anchor", "commit")
    there = {tuple(row[name] for name in key) for row in old}
    write(path, old + [row for row in rows if tuple(row[name] for name in key) not in there])


def main() -> None:
    known = losses()
    write(RESULTS / "search.csv", search_rows(known))
    write(RESULTS / "rates.csv", rate_rows(known))
    write(RESULTS / "transfer.csv", transfer_rows(known))
    rows = [row for task in GRID["tasks"] for row in compare(known, task)]
    write(RESULTS / "slice_b.csv", rows)
    add_to_leaderboard([row for task in GRID["tasks"] for row in leaderboard_rows(known, task, rows)])
    changes = ablation_rows(known)
    write(RESULTS / "ablations.csv", changes)
    later = again_rows(known)
    write(RESULTS / "again.csv", later)
    for row in rows + changes + later:
        print(*(f"{row[name]}" for name in row), sep="  ")
    for task in GRID["tasks"]:
        print(f"\n{task}", *markdown(rows, task), sep="\n")


if __name__ == "__main__":
    main()
