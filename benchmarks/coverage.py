"""How often the 95 % interval of a paired difference holds the truth, and how often nothing is called something.

    python benchmarks/coverage.py [--studies 1000] [--designs NAME ...]

Every design is a way in which items come: alone (right-or-wrong, continuous, heavy-tailed, log-normal, skewed, nearly
always equal), in clusters (equal, Zipf, one or two that dominate), or as sentences of BLEU with a few very long ones.
Each is drawn with 1, 2, 3 and 5 seeds, whose means spread by 0, or by as much as the items make the mean vary. The two
systems are equally good; "skewed" and "BLEU" have differences that are not symmetric about the truth.

coverage: of all studies. refused: share of the studies in which the code makes no claim whatever it sees (one or two
seeds, too few effective clusters or items). false claims: share of the studies with any claim in a family of 3 metrics
x 4 overlapping slices, after each correction. A cell passes where coverage is .92 to .99 and false claims are at most
5 %, or where at least 90 % of its studies are refused. Adds rows to benchmarks/results/coverage_designs.csv. Also
times 10,000 resamples of 5 seeds x 5,000 items.
"""

from __future__ import annotations

import argparse
import resource
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from results_table import ResultsTable, add_output

from bem_peft.evaluation.corpus import pseudo_values
from bem_peft.evaluation.exact_tests import sign_flip_p_value
from bem_peft.evaluation.intervals import compare_means
from bem_peft.evaluation.metrics import corpus_metric
from bem_peft.evaluation.multiplicity import METHODS
from bem_peft.evaluation.resampling import bootstrap_means
from bem_peft.evaluation.slices import WHOLE, judge_slices

COLUMNS = (
    "design", "items", "clusters", "seeds", "seed_spread", "studies", "refused", "coverage", "median_width",
    *(f"false_{method}" for method in METHODS), "passes",
)  # fmt: skip
SLICES = (slice(None), slice(0, None, 2), slice(0, None, 3), slice(1, None, 2))
SEEDS = (1, 2, 3, 5)
Drawn = tuple[np.ndarray, np.ndarray | None]  # D (seeds, items) whose truth is 0, and the items' clusters
Draw = Callable[[np.random.Generator, int, float], Drawn]


def alone(items: int, taste: Callable[[np.random.Generator, int], np.ndarray], noise: float = 0.5) -> Draw:
    """Items that belong to no cluster: `taste` is what the two systems differ by, of mean 0 and a spread of about 1."""

    def draw(rng: np.random.Generator, seeds: int, spread: float) -> Drawn:
        shifts = rng.normal(0.0, spread / np.sqrt(items), (seeds, 1))
        return taste(rng, items) + shifts + rng.normal(0.0, noise, (seeds, items)), None

    return draw


def right_or_wrong(rng: np.random.Generator, seeds: int, spread: float) -> Drawn:
    """400 items of their own ease, on each of which both systems are right or wrong."""
    ease = rng.beta(1.2, 1.2, 400) + rng.normal(0.0, 0.1, (2, 1, 400))
    chance = np.clip(ease + rng.normal(0.0, spread * 0.45 / np.sqrt(400), (2, seeds, 1)), 0.0, 1.0)
    scores = (rng.random((2, seeds, 400)) < chance).astype(float)
    return scores[0] - scores[1], None


def clustered(sizes: list[int], together: float) -> Draw:
    """Clusters of `sizes`; `together`: the share of the items' variance that a cluster has in common."""
    number = np.repeat(np.arange(len(sizes)), sizes)

    def draw(rng: np.random.Generator, seeds: int, spread: float) -> Drawn:
        shared = rng.normal(0.0, np.sqrt(together), len(sizes))[number]
        by_seed = rng.normal(0.0, np.sqrt(together / 4), (seeds, len(sizes)))[:, number]
        shifts = rng.normal(0.0, spread / np.sqrt(len(number)), (seeds, 1))
        own = rng.normal(0.0, np.sqrt(1.0 - together), len(number)) + rng.normal(0.0, 0.7, (seeds, len(number)))
        return shared + by_seed + shifts + own, number

    return draw


def sentences_of_bleu(rng: np.random.Generator, seeds: int, spread: float) -> Drawn:
    """Pseudo-values of the corpus BLEU of 200 sentences, 4 of them 20 times as long; both systems have one
    precision."""
    lengths = rng.integers(8, 30, 200)
    lengths[:4] *= 20
    metric, difference = corpus_metric("bleu"), []
    ease = np.clip(rng.normal(0.6, 0.15, 200), 0.1, 0.95)
    tastes = np.clip(ease + rng.normal(0.0, 0.08, (2, 200)), 0.05, 0.98)
    for _ in range(seeds):
        values = []
        for taste in tastes:
            right = np.clip(taste + rng.normal(0.0, spread * 0.01), 0.05, 0.98)
            matches = [rng.binomial(np.maximum(lengths - n, 1), right ** (1 + 0.6 * n)) for n in range(4)]
            totals = [np.maximum(lengths - n, 1) for n in range(4)]
            counts = np.stack([lengths, lengths, *matches, *totals], axis=1).astype(float)
            values.append(pseudo_values(metric, counts))
        difference.append(values[0] - values[1])
    return np.array(difference), None


def zipf(largest: int, count: int) -> list[int]:
    return [max(1, largest // i) for i in range(1, count + 1)]


CLUSTERS = {
    "40 x 10": [10] * 40, "10 x 40": [40] * 10, "Zipf, 200 from 100": zipf(100, 200),
    "Zipf, 30 from 100": zipf(100, 30),
    "1 x 400 + 9 x 10": [400] + [10] * 9, "1 x 200 + 20 x 10": [200] + [10] * 20,
    "2 x 100 + 100 x 2": [100, 100] + [2] * 100, "2 x 60 + 300 x 2": [60, 60] + [2] * 300,
}  # fmt: skip
DESIGNS: dict[str, Draw] = {
    "right or wrong": right_or_wrong,
    "continuous": alone(400, lambda rng, n: rng.normal(0.0, 1.0, n)),
    "continuous, few": alone(30, lambda rng, n: rng.normal(0.0, 1.0, n)),
    "heavy tails (t3)": alone(200, lambda rng, n: rng.standard_t(3, n) / np.sqrt(3)),
    "heavy tails (t2.1), few": alone(40, lambda rng, n: rng.standard_t(2.1, n) / 4.6),
    "log-normal items": alone(200, lambda rng, n: rng.lognormal(0.0, 1.5, n) * rng.normal(0.0, 0.1, n)),
    "skewed (log-normal, sigma 1)": alone(100, lambda rng, n: (rng.lognormal(0.0, 1.0, n) - np.exp(0.5)) / 2.16),
    "skewed (log-normal, sigma 1.5)": alone(200, lambda rng, n: (rng.lognormal(0.0, 1.5, n) - np.exp(1.125)) / 8.97),
    "nearly always equal": alone(400, lambda rng, n: (rng.random(n) < 0.02) * rng.choice([-1.0, 1.0], n), noise=0.0),
    "BLEU, 4 of 200 sentences long": sentences_of_bleu,
    **{
        f"clusters {name}, {together:.0%} in common": clustered(sizes, together)
        for name, sizes in CLUSTERS.items() for together in (0.1, 0.5)
    },
}  # fmt: skip


def cell(name: str, seeds: int, spread: float, studies: int) -> dict[str, object]:
    draw, rng = DESIGNS[name], np.random.default_rng(zlib.crc32(f"{name} {seeds} {spread}".encode()))
    covered, refused, widths = 0, 0, []
    claims = dict.fromkeys(METHODS, 0)
    items = count = 0
    for _ in range(studies):
        family = {}
        for metric in range(3 if seeds > 2 else 1):  # fewer seeds claim nothing
            difference, clusters = draw(rng, seeds, spread)
            items, count = difference.shape[1], difference.shape[1] if clusters is None else int(clusters.max()) + 1
            for i, part in enumerate(SLICES if seeds > 2 else SLICES[:1]):
                some = None if clusters is None else clusters[part]
                found = compare_means(difference[:, part], some, resamples=1_999)
                family[f"metric {metric}", WHOLE if i == 0 else f"slice {i}"] = found
                if metric == i == 0:
                    covered += found.low <= 0.0 <= found.high
                    refused += not found.may_claim
                    widths.append(found.high - found.low)
        for method in METHODS:
            judged = judge_slices({"b": family}, stands_on="slice_a", correction=method)["b"]
            claims[method] += any(result.is_better or result.is_worse for result in judged)
    shares = {method: claims[method] / studies for method in METHODS}
    passes = (0.92 <= covered / studies <= 0.99 and max(shares.values()) <= 0.05) or refused >= 0.9 * studies
    return {
        "design": name, "items": items, "clusters": count, "seeds": seeds, "seed_spread": spread, "studies": studies,
        "refused": f"{refused / studies:.3f}", "coverage": f"{covered / studies:.4f}",
        "median_width": f"{np.median(widths):.3g}", **{f"false_{m}": f"{share:.4f}" for m, share in shares.items()},
        "passes": "refused" if refused >= 0.9 * studies else "yes" if passes else "NO",
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
    parser.add_argument("--studies", type=int, default=1_000)
    parser.add_argument("--designs", nargs="+", help="parts of their names; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timing", action="store_true", help="only time the resampling")
    add_output(parser)
    options = parser.parse_args()
    table = ResultsTable(None if options.timing else options.out, "coverage_designs.csv", COLUMNS)
    timing()
    if options.timing:
        return
    names = [n for n in DESIGNS if options.designs is None or any(part in n for part in options.designs)]
    cells = [(n, k, spread) for n in names for k in options.seeds for spread in ((0.0,) if k == 1 else (0.0, 1.0))]
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        waiting = [pool.submit(cell, *each, options.studies) for each in cells]
        for future in waiting:
            rows.append(future.result())
            print(*rows[-1].values(), sep=" | ", flush=True)
    table.append(rows)
    failed = [row for row in rows if row["passes"] == "NO"]
    print(f"{len(rows)} cells: {len(failed)} outside of .92 to .99 or with false claims over 5 %")


if __name__ == "__main__":
    main()
