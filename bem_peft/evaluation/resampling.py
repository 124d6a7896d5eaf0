"""How the means of systems would change with other seeds and other items: joint resamples, for statistics that have no
formula (a place on a frontier). For the interval of a difference use `compare_means`, whose coverage is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bem_peft.evaluation.scores import Scores


def resampled_means(scores: Sequence[Scores], *, resamples: int = 1_000, random_seed: int = 0) -> np.ndarray | None:
    """Means of each system in draws of seeds and of items (of clusters, where there are some), (systems, resamples).

    Every system gets the same draws. A deviation is made sqrt(n / (n - 1)) as wide, for what n seeds and n clusters
    drawn with replacement lack in variance. One seed: items alone vary.

    Returns:
        None where there are no scores, or the systems have other seeds or items: there is no joint draw then.
    """
    if not scores:
        return None
    first = scores[0]
    if any(set(s.seeds) != set(first.seeds) or set(s.items) != set(first.items) for s in scores):
        return None
    values = np.stack([_in_order_of(first, s) for s in scores])  # (S, K, N)
    systems, seeds, items = values.shape
    names = first.items if first.clusters is None else first.clusters
    index = np.unique(np.array(names), return_inverse=True)[1]
    clusters = int(index.max()) + 1
    rng = np.random.default_rng(random_seed)
    weights = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=resamples)[:, index].astype(np.float64)
    by_items = np.einsum("rn,mn->rm", weights, values.reshape(-1, items), optimize=True)
    by_items = (by_items / weights.sum(1, keepdims=True)).reshape(resamples, systems, seeds)
    means = values.mean(2)
    by_items = means + _widened(clusters) * (by_items - means)
    drawn = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples) / seeds
    middle = by_items.mean(2)
    found: np.ndarray = middle + _widened(seeds) * (np.einsum("rsk,rk->rs", by_items, drawn) - middle)
    return found.T


def _widened(count: int) -> float:
    return float(np.sqrt(count / (count - 1))) if count > 1 else 1.0


def _in_order_of(first: Scores, other: Scores) -> np.ndarray:
    items = {item: i for i, item in enumerate(other.items)}
    seeds = {seed: i for i, seed in enumerate(other.seeds)}
    found: np.ndarray = other.values[[seeds[s] for s in first.seeds]][:, [items[i] for i in first.items]]
    return found
