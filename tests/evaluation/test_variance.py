"""The parts of the variance against deletion by hand, dense matrices, statsmodels and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm

from bem_peft.evaluation.variance import degrees_by_sizes, degrees_by_values, variance_parts

SIZES = {
    "equal": [10] * 12, "one dominant": [400] + [10] * 9, "two dominant": [100, 100] + [2] * 30,
    "zipf": [max(1, 60 // i) for i in range(1, 41)], "alone": [1] * 30,
}  # fmt: skip


def study(sizes: list[int], seeds: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    items = rng.normal(0, 0.5, len(sizes))[clusters] + rng.normal(0, 1, len(clusters))
    return items + rng.normal(0, 0.2, (seeds, 1)) + rng.normal(0, 0.7, (seeds, len(clusters))), clusters


@pytest.mark.parametrize("kind", SIZES)
def test_the_items_part_is_the_jackknife_over_clusters(kind: str) -> None:
    difference, clusters = study(SIZES[kind])
    count = clusters.max() + 1
    left_out = np.array([difference[:, clusters != c].mean() for c in range(count)])
    by_hand = (count - 1) / count * ((left_out - difference.mean()) ** 2).sum()
    parts = variance_parts(difference, clusters)
    assert parts.items == pytest.approx(by_hand, rel=1e-9)
    assert parts.clusters == count
    shares = np.array(SIZES[kind]) / len(clusters)
    assert (parts.effective_clusters, parts.largest_share) == pytest.approx((1 / (shares**2).sum(), shares.max()))


def test_the_items_part_without_clusters_is_the_variance_of_a_mean() -> None:
    difference, _ = study([1] * 50)
    parts = variance_parts(difference)
    assert parts.items == pytest.approx(difference.mean(0).var(ddof=1) / 50, rel=1e-12)
    assert parts.seeds == pytest.approx(difference.mean(1).var(ddof=1) / 3, rel=1e-12)
    alone = variance_parts(difference, np.array([f"item {i}" for i in range(50)]))
    assert (alone.items, alone.items_df) == pytest.approx((parts.items, parts.items_df))
    assert variance_parts(difference[:1]).seeds == 0.0


def test_the_part_of_both_is_statsmodels_sandwich_of_the_cells() -> None:
    difference, clusters = study(SIZES["zipf"], seeds=4)
    cells = (np.arange(4)[:, None] * 1_000 + clusters).ravel()
    model = sm.OLS(difference.ravel(), np.ones(difference.size)).fit(
        cov_type="cluster", cov_kwds={"groups": cells, "use_correction": False}
    )
    assert variance_parts(difference, clusters).both == pytest.approx(float(model.bse[0]) ** 2, rel=1e-9)


@pytest.mark.parametrize("kind", SIZES)
def test_degrees_by_sizes_are_those_of_the_dense_quadratic_form(kind: str) -> None:
    n = np.array(SIZES[kind], dtype=float)
    h, count = n / n.sum(), len(n)
    b = np.eye(count) - np.outer(h, np.ones(count))
    product = b.T @ np.diag(1 / (n.sum() - n) ** 2) @ b @ np.diag(n)
    expected = np.trace(product) ** 2 / np.trace(product @ product)
    assert degrees_by_sizes(n) == pytest.approx(expected, rel=1e-9)
    if len(set(SIZES[kind])) == 1:
        assert degrees_by_sizes(n) == pytest.approx(count - 1)


def test_degrees_by_sizes_are_seen_in_a_simulation() -> None:
    """df = 2 E[v]^2 / var(v) of normal items."""
    sizes = SIZES["two dominant"]
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(1)
    drawn = np.array([variance_parts(rng.normal(size=(1, len(clusters))), clusters).items for _ in range(8_000)])
    assert 2 * drawn.mean() ** 2 / drawn.var() == pytest.approx(degrees_by_sizes(np.array(sizes, float)), rel=0.12)


def test_degrees_by_values_are_few_where_a_few_values_make_the_variance() -> None:
    rng = np.random.default_rng(2)
    assert degrees_by_values(rng.normal(size=20_000)) == pytest.approx(20_000, rel=0.1)
    spikes = np.zeros(1_000)
    spikes[:2] = 5.0, -5.0
    assert degrees_by_values(spikes) < 5
    assert degrees_by_values(np.tile([1.0, -1.0], 10)) == np.inf
    assert degrees_by_values(np.zeros(5)) == np.inf
