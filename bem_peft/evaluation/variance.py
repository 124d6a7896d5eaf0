r"""What a mean over seeds and clusters of items varies by, D (K seeds, N items), and on how many degrees of freedom.

    items    v_i = (C - 1) / C sum_c (m_without_c - m)^2,   m_without_c - m = -s_c / (N - n_c)
    seeds    v_s = var(D.mean(1)) / K                        (ddof 1)
    both     v_c = sum_kc s_kc^2 / (K N)^2
    m: the mean; n_c: items of cluster c; s_kc = sum over cluster c of (D[k, i] - m), s_c its mean over seeds

An item that belongs to no cluster is one of its own; then v_i = var(D.mean(0)) / N. The jackknife holds for clusters of
any sizes, but a variance that hangs on a few of them is known badly: its degrees of freedom are the smaller of

    sizes    tr(M S)^2 / tr(M S M S) of v_i as a quadratic form in the cluster sums, whose variances S are those of
             items that vary alone (n_c)
    values   2 C / (m_4 / m_2^2 - 1) of the terms of the sum: C - 1 for normal ones, few where a few terms make it up

Source: Bell and McCaffrey, Bias reduction in standard errors for linear regression with multi-stage samples, 2002 (the
quadratic form); MacKinnon, Nielsen and Webb, Leverage, influence, and the jackknife in clustered regression models,
2023 (CV3); Cameron, Gelbach and Miller, Robust inference with multiway clustering, 2011 (v_c). The variance of a
variance with kurtosis: Cramer, Mathematical methods of statistics, 1946, 27.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parts:
    """v_i, v_s, v_c as above, in units of the metric squared, and the degrees of freedom of v_i.

    skewness: of the mean by its items, sum g_c^3 / (sum g_c^2)^1.5 with g_c = m - m_without_c.
    clusters: C. sizes_df: the degrees of freedom by the clusters' sizes alone. effective_clusters: 1 / sum (n_c /
    N)^2, C where all are of one size.
    """

    items: float
    seeds: float
    both: float
    items_df: float
    skewness: float
    sizes_df: float
    clusters: int
    effective_clusters: float
    largest_share: float


def variance_parts(difference: np.ndarray, clusters: np.ndarray | None = None) -> Parts:
    """The parts of D (K, N); `clusters` (N,) names what items belong together. With one seed, v_s and v_c are 0."""
    seeds, items = difference.shape
    mean = difference.mean()
    if clusters is None:
        sizes, sums = np.ones(items), difference - mean
    else:
        index = np.unique(clusters, return_inverse=True)[1]
        sizes = np.bincount(index).astype(np.float64)
        sums = np.stack([np.bincount(index, weights=row - mean, minlength=len(sizes)) for row in difference])
    count, whole = len(sizes), float(items)
    deletions = sums.mean(0) / (whole - sizes)  # m - m_without_c
    by_items = float((count - 1) / count * (deletions**2).sum())
    by_sizes = degrees_by_sizes(sizes)
    df = max(1.0, min(by_sizes, degrees_by_values(deletions)))
    square = float((deletions**2).sum())
    skewness = float((deletions**3).sum() / square**1.5) if square > 0.0 else 0.0
    by_seeds = float(difference.mean(1).var(ddof=1) / seeds) if seeds > 1 else 0.0
    both = float((sums**2).sum() / (seeds * whole) ** 2) if seeds > 1 else 0.0
    shares = sizes / whole
    return Parts(
        by_items, by_seeds, both, df, skewness, by_sizes, count, float(1.0 / (shares**2).sum()), float(shares.max())
    )


def degrees_by_sizes(sizes: np.ndarray) -> float:
    """tr(M S)^2 / tr(M S M S) for clusters of `sizes` (C,): C - 1 where all are equal. Linear in C.

    v_i is s' M s with M = B' diag(1 / (N - n)^2) B and B = 1 - h 1', h = n / N; B S B' is written out, so that no
    matrix of C x C is formed.
    """
    whole = sizes.sum()
    h, weight, own = sizes / whole, 1.0 / (whole - sizes) ** 2, sizes
    total = own.sum()
    outside = -2.0 * h * own + total * h**2  # the diagonal of B S B' without S itself
    trace = (weight * (own + outside)).sum()
    hh, ss, hs = (weight * h * h).sum(), (weight * own * own).sum(), (weight * h * own).sum()
    square = 2.0 * hh * ss + (total * hh) ** 2 + 2.0 * hs**2 - 4.0 * total * hh * hs
    square += (weight**2 * ((own + outside) ** 2 - outside**2)).sum()
    return float(trace**2 / square)


def degrees_by_values(values: np.ndarray) -> float:
    """2 n / (m_4 / m_2^2 - 1) of values (n,) about their mean, infinite where all are as far from it."""
    squares = (values - values.mean()) ** 2
    second = squares.mean()
    if second == 0.0:
        return float("inf")
    spread = float((squares / second).var())
    return float("inf") if spread <= 0.0 else 2.0 * len(values) / spread
