"""Pareto frontiers: who is dominated by nobody, how sure that is, and how much a frontier covers.

    x dominates y  <=>  x is at least as good in every objective and better in one

Equal points do not dominate each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Objective:
    """What is traded off. `unit` is printed beside it."""

    name: str
    higher_is_better: bool
    unit: str = ""


def non_dominated(costs: np.ndarray, *, block: int = 512) -> np.ndarray:
    """Which rows of costs (n, d), lower is better, no other row dominates; (n,) bool.

    Rows are sorted by their sum, so that a row can only be dominated by one before it; each is compared with the
    frontier so far.
    """
    points = np.asarray(costs, dtype=np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"`costs` has shape {points.shape}: must be (n, d), finite.")
    if points.shape[0] == 0:
        return np.zeros(0, dtype=bool)
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in unique.T], axis=1)
    order = np.lexsort((*ranks.T[::-1], ranks.sum(1)))
    keep = np.zeros(len(unique), dtype=bool)
    front = np.empty((0, ranks.shape[1]), dtype=ranks.dtype)
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        rows = rows[~_dominated_by(ranks[rows], front)]
        rows = rows[~_dominated_by(ranks[rows], ranks[rows])]
        keep[rows] = True
        front = np.concatenate((front, ranks[rows]))
    found: np.ndarray = keep[inverse.ravel()]
    return found


def _dominated_by(rows: np.ndarray, others: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Which of rows (n, d) some row of others (m, d), different from it, is at most equal to everywhere."""
    found = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(others), chunk):
        left = np.flatnonzero(~found)
        if not left.size:
            break
        part = others[start : start + chunk]
        not_worse = np.ones((left.size, len(part)), dtype=bool)
        better = np.zeros_like(not_worse)
        for column in range(rows.shape[1]):
            mine, theirs = rows[left, column, None], part[None, :, column]
            not_worse &= theirs <= mine
            better |= theirs < mine
        found[left] = (not_worse & better).any(1)
    return found


def hypervolume(costs: np.ndarray, reference: Sequence[float]) -> float:
    """The volume that costs (n, d), lower is better, dominate up to `reference` (d,). Exact, by slicing.

    Raises:
        ValueError: shapes that do not agree.
    """
    points, bound = np.asarray(costs, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if points.ndim != 2 or bound.shape != (points.shape[1],):
        raise ValueError(f"`costs` {points.shape} and `reference` {bound.shape}: must be (n, d) and (d,).")
    points = points[(points < bound).all(1)]
    return _volume(points, bound)


def _volume(points: np.ndarray, bound: np.ndarray) -> float:
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(bound[0] - points.min())
    points = np.unique(points[non_dominated(points)], axis=0)  # by the first objective
    if points.shape[1] == 2:
        lower = np.append(bound[1], points[:-1, 1])
        return float(((bound[0] - points[:, 0]) * (lower - points[:, 1])).sum())
    edges = np.append(points[:, 0], bound[0])
    return float(
        sum(
            (edges[i + 1] - edges[i]) * _volume(points[: i + 1, 1:], bound[1:])
            for i in range(len(points))
            if edges[i + 1] > edges[i]
        )
    )


@dataclass(frozen=True)
class ParetoPoint:
    """A system on the frontiers. `probability`: share of the replicates in which it is on the frontier; None: no
    replicates. `dominated_by`: who dominates it in the means."""

    name: str
    values: dict[str, float]
    is_on_frontier: bool
    probability: float | None
    dominated_by: tuple[str, ...]
    frontiers: tuple[tuple[str, str], ...]  # pairs of objectives whose frontier it is on


class ParetoAnalyzer:
    """Systems with values in several objectives, and with replicates (seeds, resamples) where there are some.

    Raises:
        ValueError: fewer than two objectives, or names that stand twice.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = tuple(objectives)
        names = [objective.name for objective in objectives]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"`objectives` = {names}: must be two or more with different names.")
        self.values: dict[str, dict[str, float]] = {}
        self.replicates: dict[str, np.ndarray] = {}

    def add_result(
        self, name: str, values: Mapping[str, float], replicates: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Add a system. `replicates`: objective -> (R,) values, the same draw at the same place for every system; an
        objective that is exact may be left out.

        Raises:
            ValueError: a name that is known, an objective that is missing or unknown, or a value that is not finite.
        """
        known = [objective.name for objective in self.objectives]
        if name in self.values:
            raise ValueError(f"the system {name!r} was added before.")
        if set(values) != set(known):
            raise ValueError(f"the system {name!r} has values of {sorted(values)}, the objectives are {sorted(known)}.")
        for objective, value in values.items():
            if not np.isfinite(value):
                raise ValueError(f"{objective} of {name!r} is {value!r}: must be finite.")
        if replicates is not None:
            lengths = {len(drawn) for drawn in replicates.values()}
            if len(lengths) != 1 or set(replicates) - set(known):
                raise ValueError(f"`replicates` of {name!r}: must be of one length, for objectives among {known}.")
            count = lengths.pop()
            table = [np.asarray(replicates.get(o, np.full(count, values[o])), dtype=np.float64) for o in known]
            self.replicates[name] = np.stack(table, axis=1)
        self.values[name] = {objective: float(values[objective]) for objective in known}

    def costs(self, objectives: Sequence[int] | None = None) -> np.ndarray:
        """(systems, d), lower is better."""
        table = np.array([list(values.values()) for values in self.values.values()]).reshape(len(self.values), -1)
        signed: np.ndarray = table * self._signs()
        return signed if objectives is None else signed[:, list(objectives)]

    def _signs(self) -> np.ndarray:
        return np.array([-1.0 if objective.higher_is_better else 1.0 for objective in self.objectives])

    def analyze(self) -> list[ParetoPoint]:
        """Every system, in the order of adding.

        Raises:
            ValueError: no system, or replicates of different lengths (or of some systems only).
        """
        if not self.values:
            raise ValueError("no system was added.")
        names, costs = list(self.values), self.costs()
        on_front, probability = non_dominated(costs), self._probabilities()
        two = {
            (self.objectives[i].name, self.objectives[j].name): non_dominated(costs[:, [i, j]])
            for i, j in combinations(range(len(self.objectives)), 2)
        }
        points = []
        for row, name in enumerate(names):
            above = (costs <= costs[row]).all(1) & (costs < costs[row]).any(1)
            chance = None if probability is None else float(probability[row])
            pairs = tuple(pair for pair, front in two.items() if front[row])
            dominators = tuple(names[i] for i in np.flatnonzero(above))
            points.append(ParetoPoint(name, self.values[name], bool(on_front[row]), chance, dominators, pairs))
        return points

    def _probabilities(self) -> np.ndarray | None:
        if not self.replicates:
            return None
        lengths = {len(self.replicates[name]) if name in self.replicates else 0 for name in self.values}
        if len(lengths) != 1:
            raise ValueError(f"the systems have {sorted(lengths)} replicates: all must have the same draws.")
        table = np.stack([self.replicates[name] for name in self.values], axis=1) * self._signs()
        found: np.ndarray = np.mean([non_dominated(draw) for draw in table], axis=0)
        return found

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """The volume that all systems dominate up to `reference`, in the product of the objectives' units."""
        bound = [reference[objective.name] for objective in self.objectives] * self._signs()
        return hypervolume(self.costs(), bound)
