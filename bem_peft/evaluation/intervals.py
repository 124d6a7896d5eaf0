r"""Intervals and tests of a mean paired difference over seeds and items, D (seeds, items).

    v = max(v_i + v_s - v_c, v_i, v_s),   df = v^2 / (v_i^2 / df_i + v_s^2 / (K - 1))       (the parts: variance.py)
    T = mean(D) / sqrt(v),   g(T) = T + a T^2 / 3 + a^2 T^3 / 27 + a / 6 ~ t(df)

with a = skewness of the mean by its items (v_i / v)^1.5. The interval reaches as far as the farther of |T| and |g(T)|
at t's quantile, p goes with the larger: g covers log-normal items, of which few are large, and T covers where a few
clusters make an `a` that means nothing.

Two seeds say so little of others that this df is too hopeful; there each part has its own t, and no claim is made:
    mean(D) +- sqrt(t(df_i)^2 v_i + t(1)^2 max(0, v_s - v_c))

A claim over many comparisons reads far into the tails, where the estimated df is too hopeful for few seeds; it takes
its p-value from t(min(df, df_i, K - 1)) (`claim_p_value`), which is never too small (benchmarks/coverage.py).

Seeds and items are both drawn from something larger, so both vary. Items that belong together enter as clusters. With
one seed nothing is known of other seeds: the interval is over items alone (BCa; by the jackknife where there are
clusters) and says that it is conditional on this seed. Where a few clusters or items make up the variance of the
items, so that `df_i` is under LEAST_DEGREES, the comparison carries a `refusal`: its interval is no ground for a claim.

What degenerate data give: all differences 0: [0, 0], p = 1. All differences equal and not 0: the interval is that
value, and p the smallest that flipping the signs of K seeds (of N items with one seed) can give, 2^(1 - n).

Source: Cameron, Gelbach and Miller, Robust inference with multiway clustering, 2011 (eq. 2.2); Satterthwaite, 1946;
Cochran, Approximate significance levels of the Behrens-Fisher test, 1964 (a t for each part); Hall, On the removal of
skewness by transformation, 1992 (g); Efron, Better bootstrap
confidence intervals, 1987.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from bem_peft.evaluation.exact_tests import sign_flip_p_value
from bem_peft.evaluation.variance import Parts, variance_parts

TWO_WAY = "two-way standard error over seeds and items, Satterthwaite t"
TWO_SEEDS = "two-way standard error over two seeds and items, a t for each part"
ONE_SEED = "BCa over items, conditional on this seed"
ONE_SEED_JACKKNIFE = "jackknife over items or clusters, t, conditional on this seed"
LEAST_DEGREES = 4.0  # of the items' part of the variance, for any claim
LEAST_BY_SIZES = 6.0  # of clusters by their sizes, where these leave less than half of what equal ones would
BOOTSTRAP_LIMIT = 2_000  # items up to which one seed's interval is drawn


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference. `estimate`, `low`, `high`, `standard_error` and `mde` are in units of the metric.

    p_value goes with the interval, claim_p_value with a correction over many comparisons.
    df: degrees of freedom; None with one seed. d_z: mean over the standard deviation of the items' mean differences.
    mde: the smallest true difference that this design finds with the given power.
    is_conditional: on the one seed; such a result promotes nothing.
    refusal: why the data bear no claim though an interval can be written down; None: they do.
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
    refusal: str | None = None

    @property
    def may_claim(self) -> bool:
        return not self.is_conditional and self.refusal is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_differences(difference: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
    """D as float64 (K, N). Raises ValueError where it has no meaning as such."""
    found = np.asarray(difference, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] < 1:
        raise ValueError(f"`difference` has shape {found.shape}: must be (seeds, items).")
    if not np.isfinite(found).all():
        raise ValueError("`difference` has values that are not finite: give a failed item the metric's worst value.")
    if clusters is not None and np.shape(clusters) != (found.shape[1],):
        raise ValueError(f"`clusters` has shape {np.shape(clusters)}: must be ({found.shape[1]},), one an item.")
    reason = too_few(found, clusters)
    if reason is not None:
        raise ValueError(f"`difference` has {reason}.")
    return found


def too_few(difference: np.ndarray, clusters: np.ndarray | None) -> str | None:
    """Why D (seeds, items) has too few items or clusters for any interval, or None."""
    if difference.shape[1] < 3:
        return f"{difference.shape[1]} items: at least 3 are needed for any interval"
    count = None if clusters is None else len(np.unique(clusters))
    return f"{count} clusters: at least 3 are needed for any interval" if count is not None and count < 3 else None


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
    parts = variance_parts(found, clusters)
    if found.shape[0] == 1:
        return _one_seed(found[0], parts, clusters, confidence, power, resamples, random_seed)
    seeds, estimate = found.shape[0], float(found.mean())
    error, df, half = two_way(parts, seeds, confidence)
    if error <= 1e-15 * max(1.0, abs(estimate)):
        df, below, above, mde, error = float(seeds - 1), 0.0, 0.0, 0.0, 0.0
        p = claim = 1.0 if estimate == 0.0 else 2.0 ** (1 - seeds)
    else:
        skewness = parts.skewness * (float(np.sqrt(parts.items)) / error) ** 3
        below, above = _ends(half / error, error, skewness)
        size = _size(estimate / error, skewness)
        p = float(2.0 * stats.t.sf(size, df))
        claim = float(2.0 * stats.t.sf(size, min(df, parts.items_df, seeds - 1.0)))
        mde = half + error * float(stats.t.ppf(power, df))
    return Comparison(
        estimate, estimate + below, estimate + above, confidence, p, claim, error, df, _d_z(found.mean(0)), mde, seeds,
        found.shape[1], None if clusters is None else parts.clusters, TWO_WAY if seeds > 2 else TWO_SEEDS, False,
        _refusal(parts, seeds, clusters is not None),
    )  # fmt: skip


def two_way(parts: Parts, seeds: int, confidence: float) -> tuple[float, float, float]:
    """(standard error, df, half the interval's width without skewness) of the mean over `seeds` >= 2 seeds; df 1 where
    all is 0."""
    v_i, v_s, v_c = parts.items, parts.seeds, parts.both
    variance, tail = max(v_i + v_s - v_c, v_i, v_s), 0.5 + confidence / 2
    if variance == 0.0:
        return 0.0, 1.0, 0.0
    df = float(variance**2 / (v_i**2 / parts.items_df + v_s**2 / (seeds - 1)))
    error = float(np.sqrt(variance))
    half = float(stats.t.ppf(tail, df)) * error
    if seeds == 2:
        own = stats.t.ppf(tail, parts.items_df) ** 2 * v_i + stats.t.ppf(tail, 1) ** 2 * max(0.0, v_s - v_c)
        half = max(half, float(np.sqrt(own)))
    return error, df, half


def _ends(edge: float, error: float, skewness: float) -> tuple[float, float]:
    """(below, above): the ends of the interval from the estimate, |T| <= `edge`, each the farther of with and without
    skewness."""
    low, high = (-error * _without_skewness(side * edge, skewness) for side in (1.0, -1.0))
    return min(low, -error * edge), max(high, error * edge)


def _size(t: float, skewness: float) -> float:
    """How far T lies from 0, the smaller of with and without skewness, so that p goes with the interval."""
    transformed = t + skewness * t**2 / 3.0 + skewness**2 * t**3 / 27.0 + skewness / 6.0
    return 0.0 if t * transformed <= 0.0 else min(abs(t), abs(transformed))


def _without_skewness(y: float, skewness: float) -> float:
    """T of g(T) = `y`."""
    if abs(skewness) < 1e-6:  # within rounding of y itself
        return y
    return float(3.0 / skewness * (np.cbrt(1.0 + skewness * (y - skewness / 6.0)) - 1.0))


def _refusal(parts: Parts, seeds: int, has_clusters: bool) -> str | None:
    """Why no claim can be made, or None."""
    if seeds == 2:
        return "two seeds: how far seeds differ is known on one degree of freedom; run a third"
    is_dominated = parts.sizes_df < min(LEAST_BY_SIZES, (parts.clusters - 1) / 2)
    if parts.items == 0.0 or (parts.items_df >= LEAST_DEGREES and not is_dominated):
        return None
    if not has_clusters:
        return (
            f"too few effective items: a few of {parts.clusters} make up the difference ({parts.items_df:.1f} degrees "
            f"of freedom, {LEAST_DEGREES:g} are asked for)"
        )
    asked = f"{LEAST_DEGREES:g}, and {LEAST_BY_SIZES:g} by sizes, are asked for"
    return (
        f"too few effective clusters: {parts.effective_clusters:.1f} of {parts.clusters}, the largest holds "
        f"{parts.largest_share:.0%} of the items ({parts.items_df:.1f} degrees of freedom, {parts.sizes_df:.1f} by "
        f"sizes; {asked})"
    )


def _one_seed(
    row: np.ndarray, parts: Parts, clusters: np.ndarray | None, confidence: float, power: float, resamples: int,
    random_seed: int,
) -> Comparison:  # fmt: skip
    """Of one seed's row (N,)."""
    estimate, error, df = float(row.mean()), float(np.sqrt(parts.items)), parts.items_df
    low = high = estimate
    if error <= 1e-15 * max(1.0, abs(estimate)):
        p, error, mde = (1.0 if estimate == 0.0 else 2.0 ** (1 - parts.clusters)), 0.0, 0.0
    else:
        mde = error * float(stats.t.ppf(0.5 + confidence / 2, df) + stats.t.ppf(power, df))
        if clusters is None and row.size <= BOOTSTRAP_LIMIT:
            low, high = _bca(row, confidence, resamples, random_seed)
            p = sign_flip_p_value(row, resamples=resamples, random_seed=random_seed)
        else:
            tail = float(stats.t.ppf(0.5 + confidence / 2, df))
            low, high = (estimate + end for end in _ends(tail, error, parts.skewness))
            p = float(2.0 * stats.t.sf(_size(estimate / error, parts.skewness), df))
    return Comparison(
        estimate, low, high, confidence, p, p, error, None, _d_z(row), mde, 1, row.size,
        None if clusters is None else parts.clusters,
        ONE_SEED if clusters is None and row.size <= BOOTSTRAP_LIMIT else ONE_SEED_JACKKNIFE, True,
        _refusal(parts, 1, clusters is not None),
    )  # fmt: skip


def _bca(row: np.ndarray, confidence: float, resamples: int, random_seed: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (row,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", batch=256,
            rng=np.random.default_rng(random_seed),
        ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _d_z(means: np.ndarray) -> float | None:
    spread = float(means.std(ddof=1))
    return None if spread == 0.0 else float(means.mean() / spread)
