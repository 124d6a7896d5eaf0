"""How often the 95 % interval of a paired difference holds the truth, and how often nothing is called something.

    python benchmarks/coverage.py [--studies 2000]

Each study has 3, 5 or 10 seeds and 100 or 1,319 items; the systems' scores differ from seed to seed by 0, 1 or 2.4
points (standard deviation of a system's mean), and are right-or-wrong or continuous. Both systems are equally good.
False discoveries: families of 3 metrics x 4 overlapping slices; the share of studies with any claim, after correction.
Adds rows to benchmarks/results/coverage.csv. Also times 10,000 resamples of 5 seeds x 5,000 items.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from results_table import ResultsTable, add_output

from bem_peft.evaluation.intervals import bootstrap_means, compare_means, sign_flip_p_value
from bem_peft.evaluation.multiplicity import METHODS, adjusted_p_values

COLUMNS = (
    "seeds", "items", "seed_spread_points", "scores", "studies", "coverage", "median_width_points",
    *(f"false_{method}" for method in METHODS),
)  # fmt: skip
SLICES = (slice(None), slice(0, None, 2), slice(0, None, 3), slice(1, None, 2))


def difference(rng: np.random.Generator, seeds: int, items: int, spread: float, is_binary: bool) -> np.ndarray:
    """Scores of one system minus the other's, (seeds, items); the mean over all seeds and items there could be is 0."""
    ease = rng.beta(1.2, 1.2, items)  # items differ far more than systems do
    taste = rng.normal(0.0, 0.1, (2, 1, items))  # what one system finds easier than the other
    drift = rng.normal(0.0, spread, (2, seeds, 1))
    chance = np.clip(ease + taste + drift, 0.0, 1.0)
    if is_binary:
        scores = (rng.random((2, seeds, items)) < chance).astype(float)
    else:
        scores = chance + rng.normal(0.0, 0.1, (2, seeds, items))
    found: np.ndarray = scores[0] - scores[1]
    return found


def cell(seeds: int, items: int, spread: float, is_binary: bool, studies: int) -> dict[str, object]:
    rng = np.random.default_rng(hash((seeds, items, round(spread * 1e4), is_binary)) % 2**32)
    covered, widths = 0, []
    claims = dict.fromkeys(METHODS, 0)
    for _ in range(studies):
        family = {}
        for metric in range(3):
            values = difference(rng, seeds, items, spread, is_binary)
            for i, part in enumerate(SLICES):
                found = compare_means(values[:, part])
                family[metric, i] = found.claim_p_value
                if metric == i == 0:
                    covered += found.low <= 0.0 <= found.high
                    widths.append(found.high - found.low)
        for method in METHODS:
            claims[method] += min(adjusted_p_values(family, method).values()) <= 0.05
    return {
        "seeds": seeds, "items": items, "seed_spread_points": 100 * spread,
        "scores": "binary" if is_binary else "continuous", "studies": studies,
        "coverage": f"{covered / studies:.4f}", "median_width_points": f"{100 * np.median(widths):.2f}",
        **{f"false_{method}": f"{count / studies:.4f}" for method, count in claims.items()},
    }  # fmt: skip


def timing() -> None:
    values = np.random.default_rng(0).normal(size=(5, 5_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, work in (
        (
            "bootstrap_means, 10,000 resamples of 5 seeds x 5,000 items",
            lambda: bootstrap_means(values, resamples=10_000),
        ),
        (
            "sign_flip_p_value, 10,000 patterns of 5,000 items",
            lambda: sign_flip_p_value(values.mean(0), resamples=10_000),
        ),
        ("compare_means, 5 seeds x 5,000 items", lambda: compare_means(values)),
    ):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        print(f"{name}: median {np.median(seconds):.3f} s, from {min(seconds):.3f} to {max(seconds):.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory: {(peak - before) / 1024:.0f} MiB above the {before / 1024:.0f} MiB of the imports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2_000)
    parser.add_argument("--timing", action="store_true", help="only time the resampling")
    add_output(parser)
    options = parser.parse_args()
    table = ResultsTable(None if options.timing else options.out, "coverage.csv", COLUMNS)
    timing()
    if options.timing:
        return
    rows = []
    for is_binary in (True, False):
        for items in (100, 1_319):
            for seeds in (3, 5, 10):
                for spread in (0.0, 0.01, 0.024):
                    rows.append(cell(seeds, items, spread, is_binary, options.studies))
                    print(*rows[-1].values(), flush=True)
    table.append(rows)


if __name__ == "__main__":
    main()
