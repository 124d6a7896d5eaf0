r"""Intervals and tests of a mean paired difference over seeds and items, D (seeds, items).

    v_i = var(D.mean(0)) / N,  v_s = var(D.mean(1)) / K,  v_c = var(D) / (K N)            (ddof 1)
    v = max(v_i + v_s - v_c, v_i, v_s),   df = v^2 / (v_i^2 / (N - 1) + v_s^2 / (K - 1))
    mean(D) +- t(df) sqrt(v)

A claim over many comparisons reads far into the tails, where the estimated df is too hopeful for few seeds; it takes
its p-value from t(K - 1) (`claim_p_value`), which is never too small (benchmarks/coverage.py).

Seeds and items are both drawn from something larger, so both vary. Clustered items enter as one value a cluster, whose
variance is the cluster-robust one. With one seed nothing is known of other seeds: the interval is BCa over items and
says that it is conditional on this seed.

What degenerate data give: all differences 0: [0, 0], p = 1. All differences equal and not 0: the interval is that
value, and p the smallest that flipping the signs of K seeds (of N items with one seed) can give, 2^(1 - n).

Source: Cameron, Gelbach and Miller, Robust inference with multiway clustering, 2011 (eq. 2.2); Satterthwaite, 1946;
Efron, Better bootstrap confidence intervals, 1987.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

TWO_WAY = "two-way standard error over seeds and items, Satterthwaite t"
ONE_SEED = "BCa over items, conditional on this seed"
EXACT_LIMIT = 2**14  # sign patterns that are enumerated instead of drawn


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference. `estimate`, `low`, `high`, `standard_error` and `mde` are in units of the metric.

    p_value goes with the interval, claim_p_value with a correction over many comparisons.
    df: degrees of freedom; None with one seed. d_z: mean over the standard deviation of the items' mean differences.
    mde: the smallest true difference that this design finds with the given power.
    is_conditional: on the one seed; such a result promotes nothing.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    p_value: float
    claim_p_value: float
    standard_error: float
    df: float | None
    d_z: float | None
    mde: float
    seeds: int
    items: int
    clusters: int | None
    method: str
    is_conditional: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_differences(difference: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
    """D as float64 (K, N). Raises ValueError where it has no meaning as such."""
    found = np.asarray(difference, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] < 1:
        raise ValueError(f"`difference` has shape {found.shape}: must be (seeds, items).")
    if found.shape[1] < 3:
        raise ValueError(f"`difference` has {found.shape[1]} items: at least 3 are needed for any interval.")
    if not np.isfinite(found).all():
        raise ValueError("`difference` has values that are not finite: give a failed item the metric's worst value.")
    if clusters is not None:
        if np.shape(clusters) != (found.shape[1],):
            raise ValueError(f"`clusters` has shape {np.shape(clusters)}: must be ({found.shape[1]},), one an item.")
        if len(np.unique(clusters)) < 3:
            raise ValueError(f"`clusters` has {len(np.unique(clusters))} clusters: at least 3 are needed.")
    return found


def cluster_values(difference: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """One value a cluster, (K, C), whose mean is the items' mean and whose variance is the cluster-robust one.

    u_c = m + C/N sum_{i in c} (d_i - m); for clusters of one size the cluster means.
    """
    if clusters is None:
        return difference
    index = np.unique(clusters, return_inverse=True)[1]
    count = int(index.max()) + 1
    mean = difference.mean()
    sums = np.stack([np.bincount(index, weights=row - mean, minlength=count) for row in difference])
    found: np.ndarray = mean + sums * (count / difference.shape[1])
    return found


def variance_components(values: np.ndarray) -> tuple[float, float, float]:
    """(v_i, v_s, v_c) of values (K >= 2, N); see the module's formula."""
    seeds, items = values.shape
    item_part = values.mean(0).var(ddof=1) / items
    seed_part = values.mean(1).var(ddof=1) / seeds
    return float(item_part), float(seed_part), float(values.var(ddof=1) / (seeds * items))


def compare_means(
    difference: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    power: float = 0.8,
    resamples: int = 9_999,
    random_seed: int = 0,
) -> Comparison:
    """The mean of D (seeds, items) with its interval.

    Args:
        clusters: (N,), what items belong together; None: each alone.
        confidence, power: in (0, 1). power is for `mde`.
        resamples: of the bootstrap with one seed, and of its sign-flip test.

    Raises:
        ValueError: fewer than 3 items or clusters, values that are not finite, or a share outside (0, 1).
    """
    for name, share in (("confidence", confidence), ("power", power)):
        if not 0.0 < share < 1.0:
            raise ValueError(f"`{name}` = {share!r}: must lie in (0, 1); 0.95 is 95 %.")
    found = check_differences(difference, clusters)
    values = cluster_values(found, clusters)
    if values.shape[0] == 1:
        return _one_seed(found, values, clusters, confidence, power, resamples, random_seed)
    seeds, units = values.shape
    v_i, v_s, v_c = variance_components(values)
    variance = max(v_i + v_s - v_c, v_i, v_s)
    estimate, error = float(found.mean()), float(np.sqrt(variance))
    degenerate = error <= 1e-15 * max(1.0, abs(estimate))
    if degenerate:
        df, half, p, mde, error = float(seeds - 1), 0.0, 1.0 if estimate == 0.0 else 2.0 ** (1 - seeds), 0.0, 0.0
        claim = p
    else:
        df = float(variance**2 / (v_i**2 / (units - 1) + v_s**2 / (seeds - 1)))
        half = float(stats.t.ppf(0.5 + confidence / 2, df)) * error
        p = float(2.0 * stats.t.sf(abs(estimate) / error, df))
        claim = float(2.0 * stats.t.sf(abs(estimate) / error, min(df, seeds - 1.0)))
        mde = _detectable(error, df, confidence, power)
    return Comparison(
        estimate, estimate - half, estimate + half, confidence, p, claim, error, df, _d_z(values), mde,
        seeds, found.shape[1], None if clusters is None else units, TWO_WAY, False,
    )  # fmt: skip


def _one_seed(
    found: np.ndarray, values: np.ndarray, clusters: np.ndarray | None, confidence: float, power: float, resamples: int,
    random_seed: int,
) -> Comparison:  # fmt: skip
    row = values[0]
    estimate, units = float(found.mean()), row.shape[0]
    spread = float(row.std(ddof=1))
    error = spread / np.sqrt(units)
    if spread <= 1e-15 * max(1.0, abs(estimate)):
        low = high = estimate
        p, error, mde = (1.0 if estimate == 0.0 else 2.0 ** (1 - units)), 0.0, 0.0
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=stats.DegenerateDataWarning)
            interval = stats.bootstrap(
                (row,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", batch=256,
                rng=np.random.default_rng(random_seed),
            ).confidence_interval  # fmt: skip
        low, high = float(interval.low), float(interval.high)
        p = sign_flip_p_value(row, resamples=resamples, random_seed=random_seed)
        mde = _detectable(error, units - 1.0, confidence, power)
    return Comparison(
        estimate, low, high, confidence, p, p, float(error), None, _d_z(values), mde, 1, found.shape[1],
        None if clusters is None else units, ONE_SEED, True,
    )  # fmt: skip


def _d_z(values: np.ndarray) -> float | None:
    means = values.mean(0)
    spread = float(means.std(ddof=1))
    return None if spread == 0.0 else float(means.mean() / spread)


def _detectable(error: float, df: float, confidence: float, power: float) -> float:
    return error * float(stats.t.ppf(0.5 + confidence / 2, df) + stats.t.ppf(power, df))


def sign_flip_p_value(differences: np.ndarray, *, resamples: int = 9_999, random_seed: int = 0) -> float:
    """Two-sided p-value of mean(differences) = 0 by flipping signs, (n,) -> (0, 1].

    Patterns at least as extreme count (>=, within rounding), and so does the observed one: p is never 0, and 1 for
    identical systems. All 2^n patterns are enumerated where they are at most 16,384.
    """
    row = np.asarray(differences, dtype=np.float64)
    if row.ndim != 1 or row.size < 1 or not np.isfinite(row).all():
        raise ValueError(f"`differences` has shape {row.shape}: must be (n,), finite, n at least 1.")
    observed = abs(float(row.sum()))
    bound = observed - 1e-12 * float(np.abs(row).sum())
    if 2**row.size <= EXACT_LIMIT:
        patterns = (np.arange(2**row.size)[:, None] >> np.arange(row.size)) & 1
        return float((np.abs((1.0 - 2.0 * patterns) @ row) >= bound).mean())
    rng = np.random.default_rng(random_seed)
    extreme, left = 0, resamples
    bytes_a_row = -(-row.size // 8)
    while left:
        block = min(left, 1024)
        bits = np.unpackbits(rng.integers(0, 256, (block, bytes_a_row), dtype=np.uint8), axis=1, count=row.size)
        sums = row.sum() - 2.0 * (bits @ row)
        extreme += int((np.abs(sums) >= bound).sum())
        left -= block
    return (extreme + 1) / (resamples + 1)


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


def mcnemar_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Exact McNemar test of two systems' binary scores (n,) on one seed: binomial on the items that they split."""
    first, second = np.asarray(a), np.asarray(b)
    for name, given in (("a", first), ("b", second)):
        if given.ndim != 1 or not np.isin(given, (0, 1)).all():
            raise ValueError(f"`{name}` must be (n,) of zeros and ones.")
    if first.shape != second.shape:
        raise ValueError(f"`a` has {first.size} items and `b` {second.size}: score both on the same ones.")
    wins, losses = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def required_items(
    difference: np.ndarray, effect: float, *, seeds: int | None = None, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Items that find a true difference of `effect` with `power`, with this many seeds (None: as many as D has).

    Returns:
        The number, or None where the seeds' own spread hides the effect however many items there are: add seeds.

    Raises:
        ValueError: one seed in D (its spread over seeds is unknown), or an effect of 0.
    """
    found = check_differences(difference)
    if found.shape[0] < 2:
        raise ValueError("`difference` has one seed: how far seeds differ is unknown; run at least 2.")
    if effect == 0.0:
        raise ValueError("`effect` = 0: no number of items finds it.")
    have_seeds, have_items = found.shape
    planned = have_seeds if seeds is None else seeds
    v_i, v_s, v_c = variance_components(found)
    # v_i N = s_item + s_rest / K and so on: the components of one observation
    rest = max(0.0, v_c * have_seeds * have_items - max(0.0, v_i * have_items) - max(0.0, v_s * have_seeds))
    rest = max(rest, found.var(ddof=1) * 1e-12)
    item = max(0.0, v_i * have_items - rest / have_seeds)
    seed = max(0.0, v_s * have_seeds - rest / have_items)
    low, high = 3, 10**9

    def finds(items: int) -> bool:
        i_part, s_part = (item + rest / planned) / items, (seed + rest / items) / planned
        variance = max(i_part + s_part - rest / (planned * items), i_part, s_part)
        df = variance**2 / (i_part**2 / (items - 1) + s_part**2 / max(1, planned - 1))
        return _detectable(float(np.sqrt(variance)), df, confidence, power) <= abs(effect)

    if not finds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if finds(middle) else (middle + 1, high)
    return low
