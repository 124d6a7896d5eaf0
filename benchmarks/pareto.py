"""How long a frontier of many points takes, in two and in five objectives.

    python benchmarks/pareto.py [--points 100000]

Three kinds of points: independent (few on the frontier), with whole-number ties, and against each other (a point that
is better here is worse there, so that nearly all are on the frontier: the worst case).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from bem_peft.evaluation.pareto import non_dominated


def costs(kind: str, points: int, objectives: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "independent":
        return rng.random((points, objectives))
    if kind == "ties":
        return rng.integers(0, 100, (points, objectives)).astype(float)
    on_a_sphere = np.abs(rng.normal(size=(points, objectives)))
    return -on_a_sphere / np.linalg.norm(on_a_sphere, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    args = parser.parse_args()
    for objectives in (2, 3, 5):
        for kind in ("independent", "ties", "against each other"):
            table = costs(kind, args.points, objectives)
            start = time.perf_counter()
            found = int(non_dominated(table).sum())
            seconds = time.perf_counter() - start
            print(
                f"{args.points:,} points, {objectives} objectives, {kind}: {found:,} on the frontier, {seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
