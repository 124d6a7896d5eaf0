"""The grid of grid.yaml, and what of it is still to be run, given the runs that are there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import yaml

GRID: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("grid.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, order=True)
class Run:
    """One training: a system on a task, at the rate base * 2^(k/2), with a seed.

    An ablation's system is PARENT-CHANGE, of grid.yaml's `ablations`; one of another size PARENT@RANK, of `transfer`.
    """

    task: str
    system: str
    k: int
    seed: int

    @property
    def slice(self) -> str:
        """What it is scored on: A for a search, B for the seeds, C for an ablation, D for what was run after B."""
        if "-" in self.system:
            return "C"
        if self.seed in GRID["again"].get(self.task, {"seeds": []})["seeds"]:
            return "D"
        return "A" if self.seed == GRID["search"]["seed"] else "B"

    @property
    def is_search(self) -> bool:
        return self.slice == "A"

    @property
    def rate(self) -> float:
        return float(GRID["base_rate"] * 2 ** (self.k / 2))

    @property
    def name(self) -> str:
        return f"{self.task}/{self.system}/k{self.k:+d}-seed{self.seed}"


Losses = Mapping[Run, float]  # of the runs that are there; infinite where one diverged


def system_of(name: str) -> dict[str, Any]:
    """The entry of a system in the grid; of an ablation or another size, its parent's with the changes."""
    parent, _, rank = name.partition("@")
    if rank:
        return {"config": {**GRID["systems"][parent]["config"], **GRID["transfer"]["of"][parent][int(rank)]}}
    parent, _, change = name.partition("-")
    system: dict[str, Any] = GRID["systems"][parent]
    if not change:
        return system
    changes = dict(GRID["ablations"]["of"][parent][change])
    training = {**system.get("training", {}), **changes.pop("training", {})}
    config = {name: value for name, value in {**system["config"], **changes}.items() if value is not None}
    return {"config": config, "training": training}


def parent_of(system: str) -> str:
    """Whose change or other size a system is."""
    return re.split("[-@]", system)[0]


def ablations(names: Collection[str]) -> list[str]:
    """Of these parents, seed by seed the same."""
    return [f"{parent}-{change}" for parent, of in GRID["ablations"]["of"].items() if parent in names for change in of]


def ablation_rate(losses: Losses, system: str) -> int | None:
    """The k of an ablation, or None before its parent's search has ended."""
    given: dict[str, int] = GRID["ablations"]["k"]
    parent = parent_of(system)
    return given[parent] if parent in given else best_rate(losses, GRID["ablations"]["task"], parent)


def wanted_ablations(losses: Losses, names: Collection[str]) -> Iterator[Run]:
    """What is to be run now: seed by seed, of the parents whose rate is known."""
    task = GRID["ablations"]["task"]
    for seed in GRID["ablations"]["seeds"]:
        for system in ablations(names):
            best = ablation_rate(losses, system)
            if best is not None and Run(task, system, best, seed) not in losses:
                yield Run(task, system, best, seed)


def wanted_again(losses: Losses, tasks: Sequence[str], names: Collection[str]) -> Iterator[Run]:
    """What is to be run now of what is run once more after Slice-B was read: seed by seed, at the grid's own k."""
    for task in tasks:
        again = GRID["again"].get(task, {"seeds": []})
        for seed in again["seeds"]:
            for system in again["of"]:
                k = again_rate(losses, task, system)
                if k is not None and system in names and Run(task, system, k, seed) not in losses:
                    yield Run(task, system, k, seed)


def again_rate(losses: Losses, task: str, system: str) -> int | None:
    """The k of what is run once more, or None before its search has ended."""
    given: int | None = GRID["again"][task]["of"][system]
    if given is not None or next_rates(losses, task, system):
        return given
    return _next_to_parabola(searched(losses, task, system))


def transfers() -> list[str]:
    """The systems of other sizes."""
    return [f"{parent}@{rank}" for parent, sizes in GRID["transfer"]["of"].items() for rank in sizes]


def wanted_transfers(losses: Losses, names: Collection[str]) -> Iterator[Run]:
    """What is to be run now: the searches at other sizes, of the parents whose rate is known."""
    task = GRID["transfer"]["task"]
    for system in transfers():
        parent = parent_of(system)
        if parent in names and best_rate(losses, task, parent) is not None:
            for k in next_rates(losses, task, system):
                yield Run(task, system, k, GRID["search"]["seed"])


def systems_of(task: str) -> list[str]:
    return [name for name, system in GRID["systems"].items() if task in system.get("tasks", list(GRID["tasks"]))]


def searched(losses: Losses, task: str, system: str) -> dict[int, float]:
    """k -> loss on Slice-A."""
    return {run.k: loss for run, loss in losses.items() if (run.task, run.system) == (task, system) and run.is_search}


def first_rates(losses: Losses, task: str, system: str) -> Sequence[int]:
    """The ks with which a search begins."""
    parent, _, rank = system.partition("@")
    if not rank:
        first: Sequence[int] = GRID["systems"][system].get("first", GRID["search"]["first"])
        return first
    best = best_rate(losses, task, parent)
    assert best is not None, f"the search of {parent} comes first"
    middle = best - GRID["transfer"]["below"][int(rank)]
    return [middle - 1, middle, middle + 1]


def next_rates(losses: Losses, task: str, system: str) -> list[int]:
    """The ks to be tried now; none where the search has ended."""
    search = GRID["search"]
    found = searched(losses, task, system)
    first = first_rates(losses, task, system)
    missing = [k for k in first if k not in found]
    if missing:
        return missing
    lowest = min(found, key=lambda k: (found[k], k))
    if found[lowest] == inf:
        return [min(found) - 1] if min(found) > search["lowest"] else []
    for best in (lowest, _chosen(found, task)):
        if best == min(found) and best > search["lowest"]:
            return [best - 1]
        if best == max(found) and best < search["highest"]:
            return [best + 1]
    return []


def best_rate(losses: Losses, task: str, system: str) -> int | None:
    """The k that the search has chosen, or None before its end."""
    return None if next_rates(losses, task, system) else _chosen(searched(losses, task, system), task)


def _chosen(found: Mapping[int, float], task: str) -> int:
    """Of k -> loss the k of the lowest loss; where the task says `parabola`, the one next to a parabola's lowest point,
    which one run's luck moves less.
    """
    if GRID["tasks"][task]["choose"] == "lowest":
        return min(found, key=lambda k: (found[k], k))
    return _next_to_parabola(found)


def _next_to_parabola(found: Mapping[int, float]) -> int:
    lowest, point = min(found, key=lambda k: (found[k], k)), lowest_point(found)
    return min((k for k in found if abs(k - lowest) <= 3 and found[k] < inf), key=lambda k: (abs(k - point), k))


def lowest_point(found: Mapping[int, float]) -> float:
    """The k at the lowest point of a parabola through the losses within three steps of the lowest, and inside these."""
    lowest = min(found, key=lambda k: (found[k], k))
    near = {k: loss for k, loss in found.items() if abs(k - lowest) <= 3 and loss < inf}
    if len(near) < 3:
        return lowest
    square, slope, _ = np.polyfit(list(near), list(near.values()), 2)
    if square <= 0:
        return lowest
    return float(np.clip(-slope / (2 * square), min(near), max(near)))


def wanted_runs(losses: Losses, tasks: Sequence[str], names: Collection[str] = GRID["systems"]) -> Iterator[Run]:
    """What is to be run now of these systems: those of all tasks first; task by task, searches before seeds.

    Runs whose rate is not known yet come once it is.
    """
    for of_all in (True, False):
        for task in tasks:
            systems = [s for s in systems_of(task) if s in names and ("tasks" not in GRID["systems"][s]) == of_all]
            for system in systems:
                for k in next_rates(losses, task, system):
                    yield Run(task, system, k, GRID["search"]["seed"])
            read = [s for s in systems if task not in GRID["systems"][s].get("after_slice_b", [])]
            for seed in GRID["seeds"]:
                for system in read:
                    best = best_rate(losses, task, system)
                    if best is not None and Run(task, system, best, seed) not in losses:
                        yield Run(task, system, best, seed)
