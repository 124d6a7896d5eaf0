"""How the means of systems would change with other seeds and other items: joint resamples, for statistics that have no
formula (a place on a frontier, the best of many). For the interval of a difference use `compare_means`, whose coverage
is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bem_peft.evaluation.scores import Scores

NUMBERS_AT_ONCE = 4_000_000  # drawn weights held at a time


def resampled_means(scores: Sequence[Scores], *, resamples: int = 1_000, random_seed: int = 0) -> np.ndarray | None:
    """Means of each system in draws of seeds and of items (of clusters, where there are some), (systems, resamples).

    Every system gets the same draws. A deviation is made sqrt(n / (n - 1)) as wide, for what n seeds and n clusters
    drawn with replacement lack in variance. One seed: items alone vary.

    Returns:
        None where there are no scores, or the systems have other seeds or items: there is no joint draw then.
    """
    if not scores or not share_items(scores):
        return None
    first = scores[0]
    values = on_shared_items(scores)  # (S, K, N)
    systems, seeds, items = values.shape
    names = first.items if first.clusters is None else first.clusters
    index = np.unique(np.array(names), return_inverse=True)[1]
    clusters = int(index.max()) + 1
    sizes = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, weights=row, minlength=clusters) for row in values.reshape(-1, items)])
    rng = np.random.default_rng(random_seed)
    by_items = np.empty((resamples, systems, seeds))
    block = max(1, NUMBERS_AT_ONCE // clusters)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        drawn = rng.integers(0, clusters, (count, clusters))
        drawn += np.arange(count)[:, None] * clusters
        weights = np.bincount(drawn.ravel(), minlength=count * clusters).reshape(count, clusters).astype(np.float64)
        found = weights @ sums.T / (weights @ sizes)[:, None]
        by_items[start : start + count] = found.reshape(count, systems, seeds)
    means = values.mean(2)
    by_items = means + _widened(clusters) * (by_items - means)
    chosen = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples) / seeds
    middle = by_items.mean(2)
    result: np.ndarray = middle + _widened(seeds) * (np.einsum("rsk,rk->rs", by_items, chosen) - middle)
    return result.T


def bootstrap_means(
    difference: np.ndarray, *, resamples: int = 10_000, random_seed: int = 0, block: int = 500
) -> np.ndarray:
    """Means of D (seeds, items) with seeds and items both drawn again, (resamples,).

    For statistics that have no formula; for an interval of the mean use `compare_means`, whose coverage is better.
    """
    found = np.asarray(difference, dtype=np.float64)
    seeds, items = found.shape
    rng = np.random.default_rng(random_seed)
    means = np.empty(resamples)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        rows = rng.integers(0, seeds, (count, seeds))
        weights = np.stack([(rows == k).sum(1) for k in range(seeds)], axis=1) / seeds  # (count, K)
        drawn = rng.integers(0, items, (count, items), dtype=np.int32)
        drawn += (np.arange(count, dtype=np.int32) * items)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items)
        means[start : start + count] = np.einsum("rk,rk->r", weights, counts @ found.T / items)
    return means


def share_items(scores: Sequence[Scores]) -> bool:
    """Whether all have the same seeds and items, in any order."""
    first = scores[0]
    return all(
        (s.seeds == first.seeds or set(s.seeds) == set(first.seeds))
        and (s.items == first.items or set(s.items) == set(first.items))
        for s in scores
    )


def on_shared_items(scores: Sequence[Scores]) -> np.ndarray:
    """The values of systems with the same seeds and items, in the order of the first, (systems, seeds, items)."""
    return np.stack([_in_order_of(scores[0], found) for found in scores])


def _widened(count: int) -> float:
    return float(np.sqrt(count / (count - 1))) if count > 1 else 1.0


def _in_order_of(first: Scores, other: Scores) -> np.ndarray:
    if (first.items, first.seeds) == (other.items, other.seeds):
        return other.values
    items = {item: i for i, item in enumerate(other.items)}
    seeds = {seed: i for i, seed in enumerate(other.seeds)}
    found: np.ndarray = other.values[[seeds[s] for s in first.seeds]][:, [items[i] for i in first.items]]
    return found
